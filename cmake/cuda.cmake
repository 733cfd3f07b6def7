# CUDA kernels, if a compiler is there: architectures of the GPUs present, else 80, 90 and 100 with PTX
# of the last for GPUs to come.
include(CheckLanguage)
if(QKERNELS_CUDA_ARCH)
  set(CMAKE_CUDA_ARCHITECTURES ${QKERNELS_CUDA_ARCH})
else()
  execute_process(
    COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE QK_GPUS ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE QK_SMI)
  if(QK_SMI EQUAL 0 AND QK_GPUS MATCHES "^[0-9.\n]+$")
    string(REPLACE "." "" QK_GPUS "${QK_GPUS}")
    string(REPLACE "\n" ";" QK_GPUS "${QK_GPUS}")
    list(REMOVE_DUPLICATES QK_GPUS)
    set(CMAKE_CUDA_ARCHITECTURES ${QK_GPUS})
  else()
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100)
  endif()
endif()

check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  add_library(qk_cuda OBJECT ${QK_CUDA_SOURCES})
  target_include_directories(qk_cuda PRIVATE csrc)
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " QK_CUDA_ARCHS)
  target_compile_definitions(qk_cuda PRIVATE "QK_CUDA_ARCHS=\"${QK_CUDA_ARCHS}\"")
  # the numerics contract again: no fused multiply-add, and everything else as IEEE has it
  target_compile_options(qk_cuda PRIVATE --fmad=false)
  set_target_properties(qk_cuda PROPERTIES
    CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
  target_sources(_C PRIVATE $<TARGET_OBJECTS:qk_cuda>)
  target_compile_definitions(_C PRIVATE
    QK_WITH_CUDA "QK_CUDA_VERSION=\"${CMAKE_CUDA_COMPILER_VERSION}\"")
  # static, so that _C imports on a machine without a GPU
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(_C PRIVATE CUDA::cudart_static)
elseif(QKERNELS_CUDA STREQUAL "ON")
  message(FATAL_ERROR "QKERNELS_CUDA must be OFF or AUTO without a CUDA compiler (nvcc), got ON")
else()
  message(STATUS "No CUDA compiler: building the CPU kernels only")
endif()
