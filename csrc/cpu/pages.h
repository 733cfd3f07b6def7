// Memory that a kernel is about to fill.
#pragma once

#include <cstdint>

namespace qk::cpu {

// Asks the system for huge pages under a large output. Fresh memory costs a fault for each of its
// pages, and 512 times fewer of them take a third of the time (docs/speed.md). Outputs that are
// the input, small ones, and systems without such pages stay as they are.
void expect_output(const void* input, void* output, int64_t bytes);

}  // namespace qk::cpu
