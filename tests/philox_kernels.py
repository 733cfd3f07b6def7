"""Triton kernels that show what the noise kernels draw on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from qkernels.backends.triton import philox


@triton.jit
def philox_of(in_ptr, out_ptr):
    """The four words of a counter and a key, six words as int64."""
    c0, c1 = tl.load(in_ptr).to(tl.uint32), tl.load(in_ptr + 1).to(tl.uint32)
    c2, c3 = tl.load(in_ptr + 2).to(tl.uint32), tl.load(in_ptr + 3).to(tl.uint32)
    k0, k1 = tl.load(in_ptr + 4).to(tl.uint32), tl.load(in_ptr + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, k0, k1)
    tl.store(out_ptr, w0.to(tl.int64))
    tl.store(out_ptr + 1, w1.to(tl.int64))
    tl.store(out_ptr + 2, w2.to(tl.int64))
    tl.store(out_ptr + 3, w3.to(tl.int64))


@triton.jit(do_not_specialize=["quad", "seed", "step"])
def words_of(out_ptr, quad, seed, step, draw: tl.constexpr, size: tl.constexpr):
    """Words of `size` quads from a given one on, as int64 [size, 4]."""
    lane = tl.arange(0, size)
    quads = philox.load_number(quad) + lane
    w0, w1, w2, w3 = philox.words(quads, philox.load_number(seed), philox.load_number(step), draw)
    at = out_ptr + 4 * lane
    tl.store(at, w0.to(tl.int64))
    tl.store(at + 1, w1.to(tl.int64))
    tl.store(at + 2, w2.to(tl.int64))
    tl.store(at + 3, w3.to(tl.int64))


@triton.jit
def polar_of(word_ptr, out_ptr, size: tl.constexpr):
    """Radius, cosine and sine of words, as [3, size]."""
    lane = tl.arange(0, size)
    word = tl.load(word_ptr + lane).to(tl.uint32)
    cos, sin = philox.turn(word)
    tl.store(out_ptr + lane, philox.radius(word))
    tl.store(out_ptr + size + lane, cos)
    tl.store(out_ptr + 2 * size + lane, sin)
