#include "cuda/batch.h"
#include "cuda/channels.h"
#include "dispatch.h"
#include "math/noise.h"

namespace qk::cuda {

// Statistics in device memory; without previous ones they are the present ones.
template <class C>
struct NoiseStats {
  const C *mean, *std, *prev_mean, *prev_std;

  __device__ NoiseChannel<C> operator[](int64_t channel) const {
    const C m = mean ? mean[channel] : C(0), s = std[channel];
    return make_noise_channel(m, s, prev_mean ? prev_mean[channel] : m,
                              prev_std ? prev_std[channel] : s);
  }
};

// 24 to a launch.
template <class C>
struct NoiseArgs {
  const void* x;
  void* y;
  int64_t numel, units;  // units of quads, each thread takes one at a time
  Rows rows;
  NoiseStats<C> params;
  Counter counter;
  int64_t offset;
  C ramp;
  int32_t threshold;
};

// Seed and step where the call has them, read once.
struct Streams {
  uint64_t seed, step, before;

  __device__ explicit Streams(const Counter& c)
      : seed(uint64_t(c.seed_at ? *c.seed_at & kLargestSeed : c.seed)) {
    const int64_t t = c.step_at ? *c.step_at & kLargestSeed : c.step;
    step = uint64_t(t);
    before = uint64_t(t - 1) & uint64_t(kLargestSeed);
  }
};

__device__ __forceinline__ bool all_open(int32_t threshold) { return threshold >= 1 << 24; }

// The draws of one element.
struct Draw {
  float value, previous;
  bool open;
};

template <NoiseKind kKind, class C>
__device__ __forceinline__ C noisy(C x, const Draw& d, C ramp, const NoiseChannel<C>& c) {
  if constexpr (kKind == NoiseKind::differential)
    return differential_value(x, d.value, d.previous, ramp, c);
  else if constexpr (kKind == NoiseKind::drop_in)
    return drop_in_value(x, d.value, d.open, ramp, c);
  else
    return uniform_value(x, d.value, d.open, c);
}

__device__ __forceinline__ void normals(uint64_t quad, uint64_t seed, uint64_t step,
                                        float (&z)[4]) {
  const PhiloxWords words = philox(quad, seed, step);
  const NormalPair low = normal_pair(words.w[0], words.w[1]);
  const NormalPair high = normal_pair(words.w[2], words.w[3]);
  z[0] = low.even;
  z[1] = low.odd;
  z[2] = high.even;
  z[3] = high.odd;
}

// The draws of the elements of a quad.
template <NoiseKind kKind>
__device__ __forceinline__ void draw_quad(uint64_t quad, const Streams& s, int32_t threshold,
                                          Draw (&d)[4]) {
  float value[4], previous[4] = {};
  if constexpr (kKind == NoiseKind::uniform) {
    const PhiloxWords words = philox(quad, s.seed, s.step | kValues);
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] = uniform_of(words.w[e]);
  } else {
    normals(quad, s.seed, s.step | kValues, value);
  }
  if constexpr (kKind == NoiseKind::differential) normals(quad, s.seed, s.before, previous);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] = {value[e], previous[e], true};
  if (kKind == NoiseKind::differential || all_open(threshold)) return;
  const PhiloxWords words = philox(quad, s.seed, s.step | kGates);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e].open = gate_of(words.w[e], threshold);
}

__device__ __forceinline__ uint32_t word_of(uint64_t index, uint64_t seed, uint64_t step) {
  const PhiloxWords words = philox(index / 4, seed, step);
  const uint32_t low = index & 1 ? words.w[1] : words.w[0];
  const uint32_t high = index & 1 ? words.w[3] : words.w[2];
  return index & 2 ? high : low;
}

__device__ __forceinline__ float normal_of(uint64_t index, uint64_t seed, uint64_t step) {
  const PhiloxWords words = philox(index / 4, seed, step);
  const NormalPair z =
      normal_pair(index & 2 ? words.w[2] : words.w[0], index & 2 ? words.w[3] : words.w[1]);
  return index & 1 ? z.odd : z.even;
}

// The draws of a single element.
template <NoiseKind kKind>
__device__ __forceinline__ Draw draw_one(uint64_t index, const Streams& s, int32_t threshold) {
  Draw d = {0.0f, 0.0f, true};
  if constexpr (kKind == NoiseKind::uniform)
    d.value = uniform_of(word_of(index, s.seed, s.step | kValues));
  else
    d.value = normal_of(index, s.seed, s.step | kValues);
  if constexpr (kKind == NoiseKind::differential) d.previous = normal_of(index, s.seed, s.before);
  if (kKind != NoiseKind::differential && !all_open(threshold))
    d.open = gate_of(word_of(index, s.seed, s.step | kGates), threshold);
  return d;
}

template <class C>
using NoiseCursor = ChannelCursor<C, NoiseChannel<C>>;

// Element i of memory, whose draws are those of `index`.
template <NoiseKind kKind, class T, class C>
__device__ __forceinline__ void noise_element(const NoiseArgs<C>& a, int64_t i, int64_t index,
                                              const Streams& streams, NoiseCursor<C>& cursor) {
  const C x = widen(static_cast<const T*>(a.x)[i]);
  const Draw d = draw_one<kKind>(uint64_t(index), streams, a.threshold);
  const C y = noisy<kKind>(x, d, a.ramp, cursor.at(a, a.rows.row(i)));
  static_cast<T*>(a.y)[i] = Store<T>::from(y);
}

// Row-major tensors. Ideal bytes an element: reads 4, writes 4 in fp32; 2 and 2 in fp16 and bf16.
// In place (x == y) is allowed. A unit is a packet, or two of fp64: whole quads.
template <NoiseKind kKind, class T, class C>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const __grid_constant__ Batch<NoiseArgs<C>> batch) {
  constexpr int N = kVector<T>, U = N < 4 ? 4 : N;
  const Work work(batch);
  const Streams streams(work->counter);
  NoiseCursor<C> cursor;
  int64_t unit = work.thread();
#pragma unroll 1
  for (; unit < work->units; unit += work.threads()) {
    const NoiseArgs<C>& a = *work;
    const int64_t first = unit * U;
    C v[U];
#pragma unroll
    for (int k = 0; k < U / N; ++k)
      Packet<T, N>::load(a.x, first + k * N).unpack(*reinterpret_cast<C(*)[N]>(v + k * N));
    const int64_t row = a.rows.row(first);
    const bool one_row = a.rows.row(first + U - 1) == row;
#pragma unroll
    for (int q = 0; q < U / 4; ++q) {
      Draw d[4];
      draw_quad<kKind>(uint64_t(a.offset + first) / 4 + q, streams, a.threshold, d);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = first + q * 4 + e;
        const NoiseChannel<C>& c = cursor.at(a, one_row ? row : a.rows.row(i));
        v[q * 4 + e] = noisy<kKind>(v[q * 4 + e], d[e], a.ramp, c);
      }
    }
#pragma unroll
    for (int k = 0; k < U / N; ++k)
      Packet<T, N>::pack(*reinterpret_cast<const C(*)[N]>(v + k * N)).store(a.y, first + k * N);
  }
  const NoiseArgs<C>& a = *work;
#pragma unroll 1
  for (int64_t i = a.units * U + (unit - a.units); i < a.numel; i += work.threads())
    noise_element<kKind, T>(a, i, a.offset + i, streams, cursor);
}

// From the place in memory to the row-major index.
struct WalkIndex {
  int rank;
  FastDivision size[Walk::kMostDims];
  int64_t stride[Walk::kMostDims];

  WalkIndex() = default;
  explicit WalkIndex(const Walk& w) : rank(w.rank) {
    for (int d = 0; d < w.rank; ++d) {
      size[d] = FastDivision(w.size[d]);
      stride[d] = w.stride[d];
    }
  }

  __device__ int64_t operator()(int64_t place) const {
    int64_t index = 0;
#pragma unroll
    for (int d = Walk::kMostDims - 1; d > 0; --d) {
      if (d >= rank) continue;
      const int64_t before = size[d].quotient(place);
      index += (place - before * size[d].divisor()) * stride[d];
      place = before;
    }
    return index + place * stride[0];
  }
};

template <class C>
struct StridedNoiseArgs {
  NoiseArgs<C> elements;
  WalkIndex walk;
};

// Other layouts: a thread to an element, which draws its quad for itself alone.
template <NoiseKind kKind, class T, class C>
__global__ void __launch_bounds__(kThreads)
    noise_strided(const __grid_constant__ Batch<StridedNoiseArgs<C>> batch) {
  const Work work(batch);
  const Streams streams(work->elements.counter);
  NoiseCursor<C> cursor;
#pragma unroll 1
  for (int64_t i = work.thread(); i < work->elements.numel; i += work.threads()) {
    const StridedNoiseArgs<C>& a = *work;
    noise_element<kKind, T>(a.elements, i, a.elements.offset + a.walk(i), streams, cursor);
  }
}

template <class T, class C>
NoiseArgs<C> arguments(const NoiseParams& p) {
  constexpr int unit = kVector<T> < 4 ? 4 : kVector<T>;
  const int64_t numel = p.layout.numel();
  const bool vectors = aligned(p.x, 16) && aligned(p.y, 16) && p.offset % 4 == 0;
  const NoiseStats<C> stats = {static_cast<const C*>(p.mean), static_cast<const C*>(p.std),
                               static_cast<const C*>(p.prev_mean),
                               static_cast<const C*>(p.prev_std)};
  return {
      p.x,      p.y,       numel,      vectors ? numel / unit : 0, Rows(p.layout), stats, p.counter,
      p.offset, C(p.ramp), p.threshold};
}

template <NoiseKind kKind, class T, class C>
Error launch_typed(const std::vector<NoiseParams>& calls, Stream stream) {
  if (calls[0].walk.rank > 1) {
    Batcher<StridedNoiseArgs<C>> batcher(noise_strided<kKind, T, C>, stream_grid(), stream);
    for (const NoiseParams& p : calls)
      batcher.add({arguments<T, C>(p), WalkIndex(p.walk)},
                  blocks_for(ceil_div(p.layout.numel(), kWarp)));
    return batcher.finish();
  }
  Batcher<NoiseArgs<C>> batcher(noise_kernel<kKind, T, C>, stream_grid(), stream);
  for (const NoiseParams& p : calls) {
    const NoiseArgs<C> args = arguments<T, C>(p);
    batcher.add(args, blocks_for(ceil_div(args.units ? args.units : args.numel, kWarp)));
  }
  return batcher.finish();
}

template <class T, class C>
Error launch_kind(const std::vector<NoiseParams>& calls, Stream stream) {
  switch (calls[0].kind) {
    case NoiseKind::differential:
      return launch_typed<NoiseKind::differential, T, C>(calls, stream);
    case NoiseKind::drop_in:
      return launch_typed<NoiseKind::drop_in, T, C>(calls, stream);
    default:
      return launch_typed<NoiseKind::uniform, T, C>(calls, stream);
  }
}

Error launch_noise(const NoiseParams* calls, int64_t count, Stream stream) {
  const auto kind_of = [](const NoiseParams& p) {
    if (p.layout.numel() == 0) return -1;
    return (int(p.dtype) * 3 + int(p.kind)) * 2 + (p.walk.rank > 1);
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<NoiseParams>& group) {
    QK_DISPATCH(group[0].dtype, return launch_kind<T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

}  // namespace qk::cuda
