// Exact percentiles by radix select: from the top, each pass counts the next digit of the elements
// that agree with a wanted rank in all digits before it, and so finds the rank's next digit. Counts
// are integers, so their atomic additions commute.
#include "cuda/quant_range.h"
#include "dispatch.h"

namespace qk::cuda {

constexpr int kDigit = 11, kBins = 1 << kDigit;
constexpr int kRanks = 4;  // two neighbours for each of the two bounds
constexpr int kCountThreads = 512;

// Unsigned keys that order as the values do: negative numbers with all bits turned, the others with
// the sign turned.
template <int kBytes>
struct KeyType {
  using Raw = uint32_t;
  using Key = uint32_t;
};
template <>
struct KeyType<8> {
  using Raw = uint64_t;
  using Key = uint64_t;
};
template <>
struct KeyType<2> {
  using Raw = uint16_t;
  using Key = uint32_t;
};

template <class T>
struct Keys {
  using Raw = typename KeyType<sizeof(T)>::Raw;
  using Key = typename KeyType<sizeof(T)>::Key;
  static constexpr int kBits = 8 * sizeof(T), kPasses = (kBits + kDigit - 1) / kDigit;

  __device__ static Key from(T v) {
    const Raw raw = qk_bits<Raw>(v);
    return raw >> (kBits - 1) ? Raw(~raw) : Raw(raw | Raw(1) << (kBits - 1));
  }
  __device__ static T value(Key key) {
    const Raw raw = Raw(key);
    return qk_bits<T>(raw >> (kBits - 1) ? Raw(raw ^ Raw(1) << (kBits - 1)) : Raw(~raw));
  }
  // bits below the digit of a pass, and below the digit before it
  __device__ static int shift(int pass) {
    const int rest = kBits - kDigit * (pass + 1);
    return rest > 0 ? rest : 0;
  }
  __device__ static int above(int pass) { return kBits - kDigit * pass; }
};

// What is known of the wanted ranks of a channel: their leading digits, and their rank among the
// elements that begin so.
template <class Key>
struct Selection {
  Key prefix[kRanks];
  int64_t rank[kRanks];
  int nan;

  // ranks with the same digits share the counts of the first of them
  __device__ int counts_of(int r) const {
    for (int s = 0; s < r; ++s)
      if (prefix[s] == prefix[r]) return s;
    return r;
  }
};

// Of a channel that several blocks read, in the workspace.
template <class Key>
struct ChannelCounts {
  unsigned long long counts[kRanks][kBins];
  Selection<Key> selection;
};

template <class Key>
struct CountShared {
  uint32_t counts[kRanks][kBins];
  Selection<Key> selection;
};

template <class T, class C>
struct PercentileArgs {
  using Key = typename Keys<T>::Key;

  const void* x;
  ChannelParts cut;
  int64_t ranks[kRanks];
  double lo_w, hi_w;
  RangeResult<C> result;
  ChannelCounts<Key>* counts;
  int pass;

  __device__ void finish(int64_t channel, const Selection<Key>& s) const {
    if (s.nan) return result.write(channel, {qk_nan<C>(), qk_nan<C>()});
    C v[kRanks];
    for (int r = 0; r < kRanks; ++r) v[r] = widen(Keys<T>::value(s.prefix[r]));
    result.write(channel, {interpolate(v[0], v[1], C(lo_w)), interpolate(v[2], v[3], C(hi_w))});
  }
};

template <class Key>
__device__ void clear_counts(CountShared<Key>& s) {
  for (int b = threadIdx.x; b < kBins; b += kCountThreads)
    for (int r = 0; r < kRanks; ++r) s.counts[r][b] = 0;
}

// Adds elements [begin, end) of a channel to the counts of a pass. In the first all ranks share one
// histogram; its four copies part the warps, which would wait for each other at the common
// exponents.
template <class T, class C, int N>
__device__ __forceinline__ void count_digits(const PercentileArgs<T, C>& a, int64_t channel,
                                             int64_t begin, int64_t end, int pass,
                                             CountShared<typename Keys<T>::Key>& s) {
  using Key = typename Keys<T>::Key;
  constexpr int kInFlight = 2;
  const int shift = Keys<T>::shift(pass), above = Keys<T>::above(pass);
  const Key bins = (Key(1) << (above - shift)) - 1;
  Key prefix[kRanks];
#pragma unroll
  for (int r = 0; r < kRanks; ++r)
    prefix[r] = s.selection.counts_of(r) == r ? s.selection.prefix[r] : ~Key(0);
  const int copy = threadIdx.x / kWarp % kRanks;
  bool nan = false;
  const auto count = [&](T v) {
    const Key key = Keys<T>::from(v);
    const int digit = int((key >> shift) & bins);
    if (pass == 0) {
      const C c = widen(v);
      nan = nan || c != c;
      atomicAdd(&s.counts[copy][digit], 1u);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r)
      if (key >> above == prefix[r]) atomicAdd(&s.counts[r][digit], 1u);
  };
  const int64_t stop = begin + (end - begin) / N * N;
  for (int64_t k = begin + threadIdx.x * N; k < stop; k += kInFlight * kCountThreads * N) {
    Packet<T, N> x[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = k + u * kCountThreads * N;
      if (i < stop) x[u] = Packet<T, N>::load(a.x, a.cut.index(channel, i));
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (k + u * kCountThreads * N >= stop) break;
      T v[N];
      x[u].elements(v);
#pragma unroll
      for (int e = 0; e < N; ++e) count(v[e]);
    }
  }
  if (stop + threadIdx.x < end)
    count(static_cast<const T*>(a.x)[a.cut.index(channel, stop + threadIdx.x)]);
  if (nan) atomicOr(&s.selection.nan, 1);
}

template <class Key>
__device__ void add_copies(CountShared<Key>& s) {
  for (int b = threadIdx.x; b < kBins; b += kCountThreads)
    for (int r = 1; r < kRanks; ++r) s.counts[0][b] += s.counts[r][b];
}

__device__ inline int64_t scan_warp(int64_t v) {
  const int lane = threadIdx.x % kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const int64_t other = __shfl_up_sync(kAllLanes, (long long)v, d);
    if (lane >= d) v += other;
  }
  return v;
}

// The bin that holds the rank-th counted element; rank becomes the rank within it. For a whole
// warp.
template <class Count>
__device__ int find_bin(const Count* counts, int64_t& rank) {
  constexpr int kChunk = kBins / kWarp;
  const int lane = threadIdx.x % kWarp;
  int64_t sum = 0;
  for (int k = 0; k < kChunk; ++k) sum += int64_t(counts[lane * kChunk + (k + lane) % kChunk]);
  int64_t upto = scan_warp(sum);
  const int chunk = __ffs(int(__ballot_sync(kAllLanes, upto > rank))) - 1;
  rank -= __shfl_sync(kAllLanes, (long long)(upto - sum), chunk);
  const Count* pair = counts + chunk * kChunk + 2 * lane;
  const int64_t first = int64_t(pair[0]), both = first + int64_t(pair[1]);
  upto = scan_warp(both);
  const int owner = __ffs(int(__ballot_sync(kAllLanes, upto > rank))) - 1;
  rank -= __shfl_sync(kAllLanes, (long long)(upto - both), owner);
  const int64_t low = __shfl_sync(kAllLanes, (long long)first, owner);
  const bool second = rank >= low;
  if (second) rank -= low;
  return chunk * kChunk + 2 * owner + second;
}

// The next digit of rank r, by one warp; a barrier must follow.
template <class T, class Count>
__device__ void select_digit(const Count* counts, int pass, int r,
                             const Selection<typename Keys<T>::Key>& from,
                             Selection<typename Keys<T>::Key>& to) {
  using Key = typename Keys<T>::Key;
  int64_t rank = from.rank[r];
  const Key digit = Key(find_bin(counts, rank));
  if (threadIdx.x % kWarp != 0) return;
  to.prefix[r] = from.prefix[r] << (Keys<T>::above(pass) - Keys<T>::shift(pass)) | digit;
  to.rank[r] = rank;
}

// Ideal bytes an element: reads 4 a pass, 3 passes in fp32; 2 and 2 in fp16 and bf16. A block to
// each channel does all passes.
template <class T, class C, int N>
__global__ void __launch_bounds__(kCountThreads)
    percentile_kernel(const __grid_constant__ Batch<PercentileArgs<T, C>, false> batch) {
  using Key = typename Keys<T>::Key;
  CountShared<Key>& s = shared<CountShared<Key>>();
  const Work work(batch);
  const PercentileArgs<T, C>& a = *work;
  const int r = threadIdx.x / kWarp;
  for (int64_t channel = work.block; channel < a.cut.channels; channel += work.blocks) {
    if (threadIdx.x < kRanks) {
      s.selection.prefix[threadIdx.x] = 0;
      s.selection.rank[threadIdx.x] = a.ranks[threadIdx.x];
    }
    if (threadIdx.x == 0) s.selection.nan = 0;
    for (int pass = 0; pass < Keys<T>::kPasses; ++pass) {
      clear_counts(s);
      __syncthreads();
      count_digits<T, C, N>(a, channel, 0, a.cut.n, pass, s);
      __syncthreads();
      if (pass == 0) add_copies(s);
      __syncthreads();
      const int mine = r < kRanks ? s.selection.counts_of(r) : 0;
      __syncthreads();
      if (r < kRanks) select_digit<T>(s.counts[mine], pass, r, s.selection, s.selection);
      __syncthreads();
    }
    if (threadIdx.x == 0) a.finish(channel, s.selection);
    __syncthreads();
  }
}

// One pass with several blocks to each channel: counts of the parts are added in the workspace.
template <class T, class C, int N>
__global__ void __launch_bounds__(kCountThreads)
    count_kernel(const __grid_constant__ Batch<PercentileArgs<T, C>, false> batch) {
  using Key = typename Keys<T>::Key;
  CountShared<Key>& s = shared<CountShared<Key>>();
  const Work work(batch);
  const PercentileArgs<T, C>& a = *work;
  const int pass = a.pass;
  // blocks side by side read channels side by side, which may lie in the same lines
  const int64_t part = work.block / a.cut.channels, channel = work.block - part * a.cut.channels;
  const int64_t begin = part * a.cut.part_size, next = begin + a.cut.part_size;
  const int64_t end = next < a.cut.n ? next : a.cut.n;
  ChannelCounts<Key>& whole = a.counts[channel];
  clear_counts(s);
  if (threadIdx.x < kRanks) s.selection.prefix[threadIdx.x] = whole.selection.prefix[threadIdx.x];
  if (threadIdx.x == 0) s.selection.nan = 0;
  __syncthreads();
  if (begin < end) count_digits<T, C, N>(a, channel, begin, end, pass, s);
  __syncthreads();
  if (pass == 0) add_copies(s);
  __syncthreads();
  for (int r = 0; r < kRanks; ++r) {
    if (s.selection.counts_of(r) != r) continue;
    for (int b = threadIdx.x; b < kBins; b += kCountThreads)
      if (s.counts[r][b]) atomicAdd(&whole.counts[r][b], (unsigned long long)s.counts[r][b]);
  }
  if (threadIdx.x == 0 && s.selection.nan) atomicOr(&whole.selection.nan, 1);
}

// The next digit of each rank of a channel, a warp to each rank; clears the counts for the next
// pass.
template <class T, class C>
__global__ void __launch_bounds__(kRanks* kWarp)
    select_kernel(const __grid_constant__ Batch<PercentileArgs<T, C>, false> batch) {
  using Key = typename Keys<T>::Key;
  const Work work(batch);
  const PercentileArgs<T, C>& a = *work;
  const int pass = a.pass;
  Selection<Key>& next = shared<Selection<Key>>();
  const int r = threadIdx.x / kWarp;
  ChannelCounts<Key>& whole = a.counts[work.block];
  if (pass == 0 && threadIdx.x < kRanks) whole.selection.rank[threadIdx.x] = a.ranks[threadIdx.x];
  __syncthreads();
  const int mine = whole.selection.counts_of(r);
  select_digit<T>(whole.counts[mine], pass, r, whole.selection, next);
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += kRanks * kWarp)
    for (int k = 0; k < kRanks; ++k) whole.counts[k][b] = 0;
  if (threadIdx.x < kRanks) {
    whole.selection.prefix[threadIdx.x] = next.prefix[threadIdx.x];
    whole.selection.rank[threadIdx.x] = next.rank[threadIdx.x];
  }
  if (pass < Keys<T>::kPasses - 1 || threadIdx.x != 0) return;
  next.nan = whole.selection.nan;
  a.finish(work.block, next);
}

// Blocks to each channel: several where the channels are few and long.
int64_t percentile_parts(const Layout& l) {
  constexpr int64_t kBlocks = 512, kFewChannels = 128, kPart = 16384;
  const int64_t n = l.outer * l.inner;
  if (l.channels > kFewChannels || n < 2 * kPart) return 1;
  const int64_t wanted = ceil_div(kBlocks, l.channels), most = n / kPart;
  return wanted < most ? wanted : most;
}

size_t percentile_workspace(DType dtype, const Layout& layout) {
  const Layout l = simplest(layout);
  if (percentile_parts(l) == 1) return 0;
  return size_t(l.channels) *
         (dtype == DType::f64 ? sizeof(ChannelCounts<uint64_t>) : sizeof(ChannelCounts<uint32_t>));
}

template <class T, class C>
using PercentileCalls = std::vector<PercentileArgs<T, C>>;

// Channels that a block each does at once.
template <class T, class C, int N>
Error launch_whole(const PercentileCalls<T, C>& calls, Stream stream) {
  const Grid grid = {kCountThreads, sizeof(CountShared<typename Keys<T>::Key>)};
  Batcher<PercentileArgs<T, C>> batcher(nullptr, percentile_kernel<T, C, N>, grid, stream);
  for (const PercentileArgs<T, C>& a : calls) batcher.add(a, a.cut.channels);
  return batcher.finish();
}

// Channels in parts: all of them together take two launches a pass.
template <class T, class C, int N>
Error launch_passes(PercentileCalls<T, C> calls, Stream stream) {
  using Key = typename Keys<T>::Key;
  using Args = PercentileArgs<T, C>;
  Error error = 0;
  for (const Args& a : calls) {
    const size_t bytes = size_t(a.cut.channels) * sizeof(ChannelCounts<Key>);
    if (!error) error = int(cudaMemsetAsync(a.counts, 0, bytes, stream));
  }
  for (int pass = 0; pass < Keys<T>::kPasses && !error; ++pass) {
    Batcher<Args> count(nullptr, count_kernel<T, C, N>, {kCountThreads, sizeof(CountShared<Key>)},
                        stream);
    Batcher<Args> select(nullptr, select_kernel<T, C>, {kRanks * kWarp, sizeof(Selection<Key>)},
                         stream);
    for (Args& a : calls) {
      a.pass = pass;
      count.add(a, a.cut.channels * a.cut.parts);
    }
    error = count.finish();
    for (const Args& a : calls) select.add(a, a.cut.channels);
    if (!error) error = select.finish();
  }
  return error;
}

template <class T, class C>
PercentileArgs<T, C> percentile_arguments(const QuantRangeParams& p) {
  const Layout l = simplest(p.layout);
  const int64_t n = l.outer * l.inner;
  PercentileArgs<T, C> args = {p.x,
                               ChannelParts(l, percentile_parts(l)),
                               {p.ranks.lo_k, p.ranks.lo_k + 1, p.ranks.hi_k, p.ranks.hi_k + 1},
                               p.ranks.lo_w,
                               p.ranks.hi_w,
                               RangeResult<C>(p),
                               static_cast<ChannelCounts<typename Keys<T>::Key>*>(p.workspace),
                               0};
  for (int64_t& rank : args.ranks) rank = rank < n ? rank : n - 1;  // then its weight is 0
  args.cut.part_size = ceil_div(args.cut.part_size, kVector<T>) * kVector<T>;
  return args;
}

template <class T, class C>
Error launch_percentile(const std::vector<QuantRangeParams>& calls, Stream stream) {
  constexpr int N = kVector<T>;
  PercentileCalls<T, C> whole[2], parts[2];  // by elements, by vectors
  for (const QuantRangeParams& p : calls) {
    const Layout l = simplest(p.layout);
    const bool vectors = aligned(p.x, 16) && (l.channels == 1 || l.inner % N == 0);
    (percentile_parts(l) == 1 ? whole : parts)[vectors].push_back(percentile_arguments<T, C>(p));
  }
  Error error = launch_whole<T, C, N>(whole[1], stream);
  if (!error) error = launch_whole<T, C, 1>(whole[0], stream);
  if (!error && !parts[1].empty()) error = launch_passes<T, C, N>(parts[1], stream);
  if (!error && !parts[0].empty()) error = launch_passes<T, C, 1>(parts[0], stream);
  return error;
}

template Error launch_percentile<float, float>(const std::vector<QuantRangeParams>&, Stream);
template Error launch_percentile<double, double>(const std::vector<QuantRangeParams>&, Stream);
template Error launch_percentile<Half, float>(const std::vector<QuantRangeParams>&, Stream);
template Error launch_percentile<BFloat16, float>(const std::vector<QuantRangeParams>&, Stream);

}  // namespace qk::cuda
