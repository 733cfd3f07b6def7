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

// A round is a unit for each lane of a warp: a packet, or two of fp64, since a unit has whole
// quads.
template <class T>
constexpr int kUnit = kVector<T> < 4 ? 4 : kVector<T>;

// 24 to a launch.
template <class C>
struct NoiseArgs {
  const void* x;
  void* y;
  int64_t numel;
  int rounds;
  Rows rows;
  NoiseStats<C> params;
  Counter counter;
  int64_t offset;
  C ramp;
  int32_t threshold;
};

// Seed and step where the call has them, read once. The keys of all rounds stay in registers, which
// the compiler would rather add up again for each quad.
struct Streams {
  uint32_t key_low[kPhiloxRounds], key_high[kPhiloxRounds];
  uint64_t step, before;

  __device__ __forceinline__ explicit Streams(const Counter& c) {
    const PhiloxSeed seed(uint64_t(c.seed_at ? *c.seed_at & kLargestSeed : c.seed));
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key_low[round] = uint32_t(opaque(int(seed.low(round))));
      key_high[round] = uint32_t(opaque(int(seed.high(round))));
    }
    const int64_t t = c.step_at ? *c.step_at & kLargestSeed : c.step;
    step = uint64_t(t);
    before = uint64_t(t - 1) & uint64_t(kLargestSeed);
  }

  __device__ uint32_t low(int round) const { return key_low[round]; }
  __device__ uint32_t high(int round) const { return key_high[round]; }
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

__device__ __forceinline__ void normals(uint64_t quad, const Streams& s, uint64_t step,
                                        float (&z)[4]) {
  const PhiloxWords words = philox(quad, s, step);
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
    const PhiloxWords words = philox(quad, s, s.step | kValues);
#pragma unroll
    for (int e = 0; e < 4; ++e) value[e] = uniform_of(words.w[e]);
  } else {
    normals(quad, s, s.step | kValues, value);
  }
  if constexpr (kKind == NoiseKind::differential) normals(quad, s, s.before, previous);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] = {value[e], previous[e], true};
  if (kKind == NoiseKind::differential || all_open(threshold)) return;
  const PhiloxWords words = philox(quad, s, s.step | kGates);
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e].open = gate_of(words.w[e], threshold);
}

__device__ __forceinline__ uint32_t word_of(uint64_t index, const Streams& s, uint64_t step) {
  const PhiloxWords words = philox(index / 4, s, step);
  const uint32_t low = index & 1 ? words.w[1] : words.w[0];
  const uint32_t high = index & 1 ? words.w[3] : words.w[2];
  return index & 2 ? high : low;
}

__device__ __forceinline__ float normal_of(uint64_t index, const Streams& s, uint64_t step) {
  const PhiloxWords words = philox(index / 4, s, step);
  const NormalPair z =
      normal_pair(index & 2 ? words.w[2] : words.w[0], index & 2 ? words.w[3] : words.w[1]);
  return index & 1 ? z.odd : z.even;
}

// The draws of a single element.
template <NoiseKind kKind>
__device__ __forceinline__ Draw draw_one(uint64_t index, const Streams& s, int32_t threshold) {
  Draw d = {0.0f, 0.0f, true};
  if constexpr (kKind == NoiseKind::uniform)
    d.value = uniform_of(word_of(index, s, s.step | kValues));
  else
    d.value = normal_of(index, s, s.step | kValues);
  if constexpr (kKind == NoiseKind::differential) d.previous = normal_of(index, s, s.before);
  if (kKind != NoiseKind::differential && !all_open(threshold))
    d.open = gate_of(word_of(index, s, s.step | kGates), threshold);
  return d;
}

// Element i of memory, whose draws are those of `index`.
template <NoiseKind kKind, class T, class C>
__device__ __forceinline__ void noise_element(const NoiseArgs<C>& a, int64_t i, int64_t index,
                                              const Streams& streams) {
  const C x = widen(static_cast<const T*>(a.x)[i]);
  const Draw d = draw_one<kKind>(uint64_t(index), streams, a.threshold);
  const C y = noisy<kKind>(x, d, a.ramp, a.params[a.rows.channel(a.rows.row(i))]);
  static_cast<T*>(a.y)[i] = Store<T>::from(y);
}

// The channels of a unit. Long: at least a unit to a row, so two of them at most, which are kept
// until the row ends; else every element finds its own.
template <bool kLong, int U, class C>
class UnitChannels {
 public:
  __device__ __forceinline__ void move(const NoiseArgs<C>& a, int64_t first) {
    first_ = first;
    if (!kLong || first + U <= end_) return;
    const int64_t row = a.rows.row(first);
    end_ = (row + 1) * a.rows.inner.divisor();
    channel_ = a.params[a.rows.channel(row)];
    if (first + U > end_) next_ = a.params[a.rows.channel(row + 1)];
  }

  // f(e, channel) for the elements e of a quad
  template <class F>
  __device__ __forceinline__ void for_quad(const NoiseArgs<C>& a, int quad, F f) const {
    const int64_t left = end_ - first_;
    if (kLong && left >= U) {
#pragma unroll
      for (int e = quad * 4; e < quad * 4 + 4; ++e) f(e, channel_);
    } else {
#pragma unroll
      for (int e = quad * 4; e < quad * 4 + 4; ++e)
        f(e, !kLong     ? a.params[a.rows.channel(a.rows.row(first_ + e))]
             : e < left ? channel_
                        : next_);
    }
  }

 private:
  int64_t first_ = 0, end_ = 0;
  NoiseChannel<C> channel_, next_;
};

// Row-major tensors. Ideal bytes an element: reads 4, writes 4 in fp32; 2 and 2 in fp16 and bf16.
// In place (x == y) is allowed. Bound by arithmetic: some 90 instructions an element for the two
// normal draws of differential noise. A warp's rounds are neighbours, so that it seldom changes its
// channel.
template <bool kOne, NoiseKind kKind, bool kLong, class T, class C>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(const __grid_constant__ Batch<NoiseArgs<C>, kOne> batch) {
  constexpr int N = kVector<T>, U = kUnit<T>;
  const Work work(batch);
  const Streams streams(work->counter);
  const int share = (work->rounds + work.warps() - 1) / work.warps();
  const int begin = work.warp() * share, left = work->rounds - begin;
  const int64_t start = int64_t(begin) * kWarp * U + threadIdx.x % kWarp * U;
  UnitChannels<kLong, U, C> channels;
#pragma unroll 1
  for (int round = 0; round < share && round < left; ++round) {
    const NoiseArgs<C>& a = *work;
    const int64_t first = start + int64_t(round) * (kWarp * U);
    C v[U];
#pragma unroll
    for (int k = 0; k < U / N; ++k)
      Packet<T, N>::load(a.x, first + k * N).unpack(*reinterpret_cast<C(*)[N]>(v + k * N));
    channels.move(a, first);
#pragma unroll
    for (int q = 0; q < U / 4; ++q) {
      Draw d[4];
      draw_quad<kKind>(uint64_t(a.offset + first) / 4 + q, streams, a.threshold, d);
      channels.for_quad(a, q, [&](int e, const NoiseChannel<C>& channel) {
        v[e] = noisy<kKind>(v[e], d[e % 4], a.ramp, channel);
      });
    }
#pragma unroll
    for (int k = 0; k < U / N; ++k)
      Packet<T, N>::pack(*reinterpret_cast<const C(*)[N]>(v + k * N)).store(a.y, first + k * N);
  }
  const NoiseArgs<C>& a = *work;
  int64_t i = int64_t(a.rounds) * (kWarp * U) + work.thread();
#pragma unroll 1
  for (; i < a.numel; i += work.threads()) noise_element<kKind, T>(a, i, a.offset + i, streams);
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

// The elements of a quad lie `step` apart in memory, in one channel.
template <class C>
struct StridedNoiseArgs {
  NoiseArgs<C> elements;
  WalkIndex walk;
  int64_t quads;
  FastDivision step;
};

// Other layouts, the same bytes. A thread takes a quad where it can, whose elements are apart;
// neighbouring threads have neighbouring elements. Else a thread takes an element and draws its
// quad for it alone.
template <NoiseKind kKind, class T, class C>
__global__ void __launch_bounds__(kThreads)
    noise_strided(const __grid_constant__ Batch<StridedNoiseArgs<C>, false> batch) {
  const Work work(batch);
  const Streams streams(work->elements.counter);
#pragma unroll 1
  for (int64_t k = work.thread(); k < work->quads; k += work.threads()) {
    const StridedNoiseArgs<C>& own = *work;
    const NoiseArgs<C>& a = own.elements;
    const int64_t apart = own.step.divisor(), first = 4 * k - 3 * own.step.remainder(k);
    T x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = static_cast<const T*>(a.x)[first + e * apart];
    const NoiseChannel<C> channel = a.params[a.rows.channel(a.rows.row(first))];
    Draw d[4];
    draw_quad<kKind>(uint64_t(a.offset + own.walk(first)) / 4, streams, a.threshold, d);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const C y = noisy<kKind>(widen(x[e]), d[e], a.ramp, channel);
      static_cast<T*>(a.y)[first + e * apart] = Store<T>::from(y);
    }
  }
#pragma unroll 1
  for (int64_t i = work->quads * 4 + work.thread(); i < work->elements.numel; i += work.threads()) {
    const StridedNoiseArgs<C>& a = *work;
    noise_element<kKind, T>(a.elements, i, a.elements.offset + a.walk(i), streams);
  }
}

template <class T, class C>
NoiseArgs<C> arguments(const NoiseParams& p) {
  const int64_t numel = p.layout.numel();
  const bool vectors = aligned(p.x, 16) && aligned(p.y, 16) && p.offset % 4 == 0;
  const NoiseStats<C> stats = {static_cast<const C*>(p.mean), static_cast<const C*>(p.std),
                               static_cast<const C*>(p.prev_mean),
                               static_cast<const C*>(p.prev_std)};
  return {p.x,
          p.y,
          numel,
          vectors ? int(numel / (kWarp * kUnit<T>)) : 0,
          Rows(p.layout),
          stats,
          p.counter,
          p.offset,
          C(p.ramp),
          p.threshold};
}

// How far apart in memory the elements of a quad are, where each lies in one channel; else 0.
static int64_t quad_step(const NoiseParams& p) {
  const Walk& w = p.walk;
  int64_t step = 1;
  for (int d = w.rank - 1; d >= 0; step *= w.size[d--]) {
    if (w.stride[d] != 1) continue;
    const Layout& l = p.layout;
    const bool inside = l.channels == 1 || l.inner % (step * w.size[d]) == 0;
    const bool outside = step % (l.channels * l.inner) == 0;
    return w.size[d] % 4 == 0 && p.offset % 4 == 0 && (inside || outside) ? step : 0;
  }
  return 0;
}

template <NoiseKind kKind, class T, class C>
Error launch_strided(const std::vector<NoiseParams>& calls, Stream stream) {
  Batcher<StridedNoiseArgs<C>> batcher(nullptr, noise_strided<kKind, T, C>, stream_grid(), stream);
  for (const NoiseParams& p : calls) {
    const int64_t step = quad_step(p), quads = step ? p.layout.numel() / 4 : 0;
    batcher.add({arguments<T, C>(p), WalkIndex(p.walk), quads, FastDivision(step)},
                blocks_for(ceil_div(step ? quads : p.layout.numel(), kWarp)));
  }
  return batcher.finish();
}

template <NoiseKind kKind, bool kLong, class T, class C>
Error launch_rows(const std::vector<NoiseParams>& calls, Stream stream) {
  BatchKernel<NoiseArgs<C>, true> one = nullptr;
  if constexpr (kLong && sizeof(T) <= 4) one = noise_kernel<true, kKind, true, T, C>;
  Batcher<NoiseArgs<C>> batcher(one, noise_kernel<false, kKind, kLong, T, C>, stream_grid(),
                                stream);
  for (const NoiseParams& p : calls) {
    const NoiseArgs<C> args = arguments<T, C>(p);
    batcher.add(args, blocks_for(args.rounds ? args.rounds : ceil_div(args.numel, kWarp)));
  }
  return batcher.finish();
}

enum class NoisePath { long_rows, short_rows, strided };

static NoisePath path_of(const NoiseParams& p) {
  if (p.walk.rank > 1) return NoisePath::strided;
  const int unit = vector_of(p.dtype) < 4 ? 4 : vector_of(p.dtype);
  return p.layout.channels == 1 || p.layout.inner >= unit ? NoisePath::long_rows
                                                          : NoisePath::short_rows;
}

template <NoiseKind kKind, class T, class C>
Error launch_typed(const std::vector<NoiseParams>& calls, Stream stream) {
  switch (path_of(calls[0])) {
    case NoisePath::strided:
      return launch_strided<kKind, T, C>(calls, stream);
    case NoisePath::long_rows:
      return launch_rows<kKind, true, T, C>(calls, stream);
    default:
      return launch_rows<kKind, false, T, C>(calls, stream);
  }
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
    return (int(p.dtype) * 3 + int(p.kind)) * 3 + int(path_of(p));
  };
  return for_kinds(calls, count, kind_of, [&](const std::vector<NoiseParams>& group) {
    QK_DISPATCH(group[0].dtype, return launch_kind<T, C>(group, stream));
    return int(cudaErrorInvalidValue);
  });
}

}  // namespace qk::cuda
