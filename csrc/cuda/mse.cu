// The range whose fake quantization has the least squared error: every candidate in one read.
#include "cuda/quant_range.h"
#include "dispatch.h"

namespace qk::cuda {

// A block holds all candidates; each of kLanes threads of a candidate sees every kLanes-th element
// of a tile in shared memory, where the threads of a warp read one or two addresses together.
constexpr int kLanes = 8, kSearchThreads = kLanes * kMseCandidates, kMseTile = 1024;

template <class T, class C>
struct MseArgs {
  const void* x;
  const C* range;   // [2, channels]: of the elements
  double* partial;  // [channels, parts, candidates]
  ChannelParts cut;
  RangeResult<C> result;

  __device__ Range<C> candidate(int64_t channel, int k) const {
    return mse_candidate(Range<C>{range[channel], range[cut.channels + channel]}, k);
  }

  __device__ void finish(int64_t channel, const double* errors) const {
    int best = 0;
    double least = INFINITY;
    for (int k = 0; k < kMseCandidates; ++k) {
      best = errors[k] < least ? k : best;
      least = errors[k] < least ? errors[k] : least;
    }
    result.write(channel, candidate(channel, best));
  }
};

template <class C>
struct MseShared {
  C tile[kMseTile];
  double lanes[kLanes][kMseCandidates];
  double errors[kMseCandidates];
};

// Ideal bytes an element: reads 4 in fp32; bound by arithmetic, 80 candidates of some 15
// operations.
template <class T, class C>
__global__ void __launch_bounds__(kSearchThreads)
    mse_kernel(const __grid_constant__ Batch<MseArgs<T, C>, false> batch) {
  MseShared<C>& s = shared<MseShared<C>>();
  const Work work(batch);
  const int k = threadIdx.x % kMseCandidates, lane = threadIdx.x / kMseCandidates;
  const MseArgs<T, C>& a = *work;
  const int64_t items = a.cut.channels * a.cut.parts;
  for (int64_t item = work.block; item < items; item += work.blocks) {
    // blocks side by side read channels side by side, which may lie in the same lines
    const int64_t part = item / a.cut.channels, channel = item - part * a.cut.channels;
    const int64_t begin = part * a.cut.part_size, next = begin + a.cut.part_size;
    const int64_t end = next < a.cut.n ? next : a.cut.n;
    const QParams<C> q = a.result.qparams(a.candidate(channel, k));
    const Channel<C> c = make_channel(q.scale, C(q.zero_point), C(a.result.qmin), C(a.result.qmax));
    double sum = 0;
    for (int64_t first = begin; first < end; first += kMseTile) {
      const int count = end - first < kMseTile ? int(end - first) : kMseTile;
      for (int e = threadIdx.x; e < count; e += kSearchThreads)
        s.tile[e] = widen(static_cast<const T*>(a.x)[a.cut.index(channel, first + e)]);
      __syncthreads();
#pragma unroll 4
      for (int e = lane; e < count; e += kLanes) {
        const C x = s.tile[e];
        const double error = double(dequantize_value(quantize_value<false>(x, c).q, c) - x);
        sum += error * error;
      }
      __syncthreads();
    }
    s.lanes[lane][k] = sum;
    __syncthreads();
    if (threadIdx.x < kMseCandidates) {
      sum = 0;
      for (int l = 0; l < kLanes; ++l) sum += s.lanes[l][k];
      if (a.cut.parts > 1)
        a.partial[(channel * a.cut.parts + part) * kMseCandidates + k] = sum;
      else
        s.errors[k] = sum;
    }
    __syncthreads();
    if (a.cut.parts == 1 && threadIdx.x == 0) a.finish(channel, s.errors);
    __syncthreads();
  }
}

// Adds the errors of a channel's parts, a thread to each candidate, and chooses.
constexpr int kChooseThreads = 96;

template <class T, class C>
__global__ void __launch_bounds__(kChooseThreads)
    choose_kernel(const __grid_constant__ Batch<MseArgs<T, C>, false> batch) {
  double* errors = shared<MseShared<C>>().errors;
  const Work work(batch);
  const MseArgs<T, C>& a = *work;
  const double* partial = a.partial + int64_t(work.block) * a.cut.parts * kMseCandidates;
  if (threadIdx.x < kMseCandidates) {
    double sum = 0;
    for (int64_t part = 0; part < a.cut.parts; ++part)
      sum += partial[part * kMseCandidates + threadIdx.x];
    errors[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) a.finish(work.block, errors);
}

int64_t mse_parts(const Layout& l) {
  constexpr int64_t kBlocks = 1024, kPart = 4096;
  const int64_t wanted = ceil_div(kBlocks, l.channels), most = l.outer * l.inner / kPart;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

size_t mse_workspace(const Layout& layout) {
  const Layout l = simplest(layout);
  const int64_t parts = mse_parts(l);
  return parts > 1 ? size_t(l.channels * parts) * kMseCandidates * sizeof(double) : 0;
}

template <class T, class C>
Error launch_mse(const std::vector<QuantRangeParams>& calls, const std::vector<const C*>& ranges,
                 Stream stream) {
  using Args = MseArgs<T, C>;
  constexpr size_t bytes = sizeof(MseShared<C>);
  Batcher<Args> search(nullptr, mse_kernel<T, C>, {kSearchThreads, bytes}, stream);
  Batcher<Args> choose(nullptr, choose_kernel<T, C>, {kChooseThreads, bytes}, stream);
  std::vector<Args> cut;  // in parts, so that a choice is left
  for (size_t k = 0; k < calls.size(); ++k) {
    const QuantRangeParams& p = calls[k];
    const Layout l = simplest(p.layout);
    const Args args = {p.x, ranges[k], static_cast<double*>(p.workspace),
                       ChannelParts(l, mse_parts(l)), RangeResult<C>(p)};
    search.add(args, l.channels * args.cut.parts);
    if (args.cut.parts > 1) cut.push_back(args);
  }
  const Error error = search.finish();
  if (error) return error;
  for (const Args& args : cut) choose.add(args, args.cut.channels);
  return choose.finish();
}

template Error launch_mse<float, float>(const std::vector<QuantRangeParams>&,
                                        const std::vector<const float*>&, Stream);
template Error launch_mse<double, double>(const std::vector<QuantRangeParams>&,
                                          const std::vector<const double*>&, Stream);
template Error launch_mse<Half, float>(const std::vector<QuantRangeParams>&,
                                       const std::vector<const float*>&, Stream);
template Error launch_mse<BFloat16, float>(const std::vector<QuantRangeParams>&,
                                           const std::vector<const float*>&, Stream);

}  // namespace qk::cuda
