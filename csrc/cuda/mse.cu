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
__global__ void __launch_bounds__(kSearchThreads) mse_kernel(MseArgs<T, C> a) {
  MseShared<C>& s = shared<MseShared<C>>();
  const int k = threadIdx.x % kMseCandidates, lane = threadIdx.x / kMseCandidates;
  const int64_t items = a.cut.channels * a.cut.parts;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t channel = item / a.cut.parts, part = item - channel * a.cut.parts;
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
        a.partial[item * kMseCandidates + k] = sum;
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
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(MseArgs<T, C> a) {
  double* errors = shared<MseShared<C>>().errors;
  const double* partial = a.partial + int64_t(blockIdx.x) * a.cut.parts * kMseCandidates;
  if (threadIdx.x < kMseCandidates) {
    double sum = 0;
    for (int64_t part = 0; part < a.cut.parts; ++part)
      sum += partial[part * kMseCandidates + threadIdx.x];
    errors[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) a.finish(blockIdx.x, errors);
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
Error launch_mse(const QuantRangeParams& p, const C* range, void* workspace, Stream stream) {
  const Layout l = simplest(p.layout);
  const MseArgs<T, C> args = {p.x, range, static_cast<double*>(workspace),
                              ChannelParts(l, mse_parts(l)), RangeResult<C>(p)};
  constexpr size_t bytes = sizeof(MseShared<C>);
  const int64_t blocks = l.channels * args.cut.parts;
  const Error error = launch(mse_kernel<T, C>, blocks, kSearchThreads, bytes, stream, args);
  if (error || args.cut.parts == 1) return error;
  return launch(choose_kernel<T, C>, l.channels, kChooseThreads, bytes, stream, args);
}

template Error launch_mse<float, float>(const QuantRangeParams&, const float*, void*, Stream);
template Error launch_mse<double, double>(const QuantRangeParams&, const double*, void*, Stream);
template Error launch_mse<Half, float>(const QuantRangeParams&, const float*, void*, Stream);
template Error launch_mse<BFloat16, float>(const QuantRangeParams&, const float*, void*, Stream);

}  // namespace qk::cuda
