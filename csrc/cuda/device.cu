#include <atomic>

#include "cuda/launch.h"

namespace qk::cuda {

#ifndef QK_CUDA_ARCHS
#define QK_CUDA_ARCHS "unknown"
#endif

int sm_count() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= kDevices) return 1;
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
      return 1;
    known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

const char* error_text(Error error) { return cudaGetErrorString(cudaError_t(error)); }

int set_device(int device) {
  int previous = device;
  if (cudaGetDevice(&previous) == cudaSuccess && previous != device) (void)cudaSetDevice(device);
  return previous;
}

const char* architectures() { return QK_CUDA_ARCHS; }

}  // namespace qk::cuda
