// Chooses the instruction set once, at the first call.
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace qk::cpu {

namespace base {
extern const Kernels table;
}
#ifdef QK_X86
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

static const Kernels& choose() {
#ifdef QK_X86
  const char* asked = getenv("QKERNELS_SIMD");
  const auto allowed = [asked](const char* name) {
    // a name allows itself and everything narrower; the order below is from wide to narrow
    if (!asked || !*asked || !strcmp(asked, "avx512")) return true;
    return !strcmp(asked, name);
  };
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512::table;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    return avx2::table;
#endif
  return base::table;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qk::cpu
