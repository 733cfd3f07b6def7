// Marks a function for host and device, and gives each CPU instruction set a namespace of its own.
#pragma once

#if defined(__CUDACC__)
#define QK_HD __host__ __device__ __forceinline__
#else
#define QK_HD inline
#endif

// Whether rint is an instruction, so that it vectorises.
#if defined(__CUDACC__) || defined(__SSE4_1__) || defined(__aarch64__)
#define QK_HAS_RINT 1
#else
#define QK_HAS_RINT 0
#endif

// The CPU kernels are compiled once per instruction set. Without a namespace each, the linker would
// keep one copy of an inline function, perhaps the AVX-512 one, for all of them.
#ifndef QK_ISA
#define QK_ISA base
#endif
