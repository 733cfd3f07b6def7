// The one switch from a dtype at run time to a type.
#pragma once

#include "math/half.h"
#include "params.h"

// Runs `...` with T the storage type and C the compute type.
#define QK_DISPATCH(dtype, ...) \
  switch (dtype) {              \
    case ::qk::DType::f32: {    \
      using T = float;          \
      using C = float;          \
      __VA_ARGS__;              \
      break;                    \
    }                           \
    case ::qk::DType::f64: {    \
      using T = double;         \
      using C = double;         \
      __VA_ARGS__;              \
      break;                    \
    }                           \
    case ::qk::DType::f16: {    \
      using T = ::qk::Half;     \
      using C = float;          \
      __VA_ARGS__;              \
      break;                    \
    }                           \
    case ::qk::DType::bf16: {   \
      using T = ::qk::BFloat16; \
      using C = float;          \
      __VA_ARGS__;              \
      break;                    \
    }                           \
  }
