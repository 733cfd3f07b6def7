"""An access outside of an allocation, on purpose: a sanitizer that does not see it proves nothing.

Run with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that the allocation ends where the tensor does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def store_one_at(ptr, n):
    tl.store(ptr + n, 1.0)


if __name__ == "__main__":
    x = torch.zeros(1024).cuda()
    store_one_at[(1,)](x, 1024 + 64)
    torch.cuda.synchronize()
