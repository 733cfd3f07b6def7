#include "cpu/pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qk::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

// Below this the request costs more than it brings.
static constexpr int64_t kLarge = 4 << 20;
static constexpr uintptr_t kHugePage = 2 << 20;

void expect_output(const void* input, void* output, int64_t bytes) {
  if (bytes < kLarge || input == output) return;
  // whole huge pages inside the output: what lies around it is not ours
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + kHugePage - 1) & -kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + uintptr_t(bytes)) & -kHugePage;
  // a refusal leaves small pages, which are as right
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

#else

void expect_output(const void*, void*, int64_t) {}

#endif

}  // namespace qk::cpu
