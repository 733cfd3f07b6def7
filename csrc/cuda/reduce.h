// Sums over the elements of each channel, in an order that depends on the shape (and on whether the
// addresses allow 16-byte accesses) alone: one pass over the elements, then one over the partial
// sums.
//
// An Op says what is summed:
//   Type, Sum             element type; what is summed: Sum() is empty, merge(Sum) adds
//   Context               constants of a channel: context(channel)
//   Loaded<N>, load<N>(i) the N elements from index i on
//   add<kStep>(loaded, i, contexts, sums)  element e goes to sums[e * kStep] under contexts[e *
//   kStep] finish(channel, sum)  writes the result aligned()             16-byte accesses are
//   allowed
#pragma once

#include "cuda/channels.h"

namespace qk::cuda {

// How [outer, channels, inner] is cut.
struct ReducePlan {
  bool columns;      // lanes side by side in memory belong to different channels
  int width;         // rows: threads that share a channel's part
  int64_t parts;     // of a channel (rows), of outer (columns)
  int64_t partials;  // sums between the passes; 0: one pass is enough
};

inline Layout simplest(const Layout& l) { return l.channels == 1 ? Layout{1, 1, l.numel()} : l; }

inline ReducePlan plan_reduction(const Layout& layout) {
  constexpr int64_t kBlocks = 2048, kPart = 4096, kFew = 1024;
  const Layout l = simplest(layout);
  const auto parts_of = [&](int64_t blocks, int64_t most) {
    const int64_t wanted = blocks > 0 ? ceil_div(kBlocks, blocks) : 1;
    return wanted < most ? wanted : most > 1 ? most : 1;
  };
  if (Columns::fit(l)) {
    const int64_t parts = parts_of(Columns::tiles_of(l, 4), l.outer / 64);
    return {true, 0, parts, parts * l.channels * l.inner};
  }
  const int64_t n = l.outer * l.inner;
  if (n > kFew) {
    const int64_t parts = parts_of(l.channels, n / kPart);
    return {false, kThreads, parts, parts > 1 ? parts * l.channels : 0};
  }
  int width = 4;
  while (width < kWarp && width * 16 < n) width *= 2;
  return {false, width, 1, 0};
}

template <class Sum>
struct ReduceRowsArgs {
  Sum* partial;
  int64_t channels, n;  // n elements of each channel, in rows of inner
  FastDivision inner;
  int width;
  int64_t parts, packets, part_packets;

  // index in memory of a channel's element
  __device__ int64_t index(int64_t channel, int64_t element) const {
    const int64_t row = inner.quotient(element);
    return element + (row * (channels - 1) + channel) * inner.divisor();
  }
};

template <class Op, int N>
__device__ __forceinline__ void add_packets(const Op& op, const ReduceRowsArgs<typename Op::Sum>& a,
                                            int64_t channel, int64_t begin, int64_t end,
                                            const typename Op::Context& context,
                                            typename Op::Sum& sum) {
  constexpr int kInFlight = 4;
  for (int64_t k = begin; k < end; k += kInFlight * a.width) {
    typename Op::template Loaded<N> loaded[kInFlight];
    int64_t at[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      at[u] = a.index(channel, (k + u * a.width) * N);
      if (k + u * a.width < end) loaded[u] = op.template load<N>(at[u]);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (k + u * a.width < end) op.template add<0>(loaded[u], at[u], &context, &sum);
  }
}

// `width` threads to each part of each channel: some lanes of a warp, or the block.
template <class Op, int N>
__global__ void __launch_bounds__(kThreads) reduce_rows(Op op, ReduceRowsArgs<typename Op::Sum> a) {
  using Sum = typename Op::Sum;
  struct Shared {
    Sum scratch[kWarp];
  };
  const int lane = threadIdx.x % a.width, per_block = kThreads / a.width;
  const int64_t items = a.channels * a.parts;
  for (int64_t first = int64_t(blockIdx.x) * per_block; first < items;
       first += int64_t(gridDim.x) * per_block) {
    const int64_t item = first + threadIdx.x / a.width;
    const int64_t channel = a.parts == 1 ? item : item / a.parts, part = item - channel * a.parts;
    Sum sum;
    if (item < items) {
      const typename Op::Context context = op.context(channel);
      const int64_t begin = part * a.part_packets, next = begin + a.part_packets;
      const int64_t end = next < a.packets ? next : a.packets;
      add_packets<Op, N>(op, a, channel, begin + lane, end, context, sum);
      const int64_t tail = a.packets * N + lane;
      if (part == a.parts - 1 && tail < a.n) {
        const int64_t i = a.index(channel, tail);
        op.template add<0>(op.template load<1>(i), i, &context, &sum);
      }
    }
    if (a.width == kThreads)
      reduce_block(sum, shared<Shared>().scratch);
    else
      reduce_lanes(sum, a.width);
    if (item < items && lane == 0) {
      if (a.parts == 1)
        op.finish(channel, sum);
      else
        a.partial[item] = sum;
    }
    if (a.width == kThreads) __syncthreads();
  }
}

// partial: [parts, columns]
template <class Op, int N>
__global__ void __launch_bounds__(kThreads)
    reduce_columns(Op op, Columns a, typename Op::Sum* partial) {
  using Sum = typename Op::Sum;
  constexpr int kInFlight = 2;
  struct Shared {
    Sum sums[kThreads * N];
  };
  Sum* sums_of_block = shared<Shared>().sums;
  const int height = kThreads / a.width, wide = a.width * N;
  const int x = threadIdx.x % a.width, y = threadIdx.x / a.width;
  const int64_t tiles = (a.columns + wide - 1) / wide;
  for (int64_t item = blockIdx.x; item < tiles * a.parts; item += gridDim.x) {
    const int64_t part = item / tiles, first = (item - part * tiles) * wide, column = first + x * N;
    const int64_t begin = part * a.part_rows, next = begin + a.part_rows;
    const int64_t end = next < a.outer ? next : a.outer;
    Sum sums[N];
    if (column < a.columns) {
      typename Op::Context contexts[N];
#pragma unroll
      for (int e = 0; e < N; ++e) contexts[e] = op.context(a.inner.quotient(column + e));
      for (int64_t row = begin + y; row < end; row += kInFlight * height) {
        typename Op::template Loaded<N> loaded[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (row + u * height < end)
            loaded[u] = op.template load<N>((row + u * height) * a.columns + column);
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (row + u * height < end)
            op.template add<1>(loaded[u], (row + u * height) * a.columns + column, contexts, sums);
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) sums_of_block[y * wide + x * N + e] = sums[e];
    __syncthreads();
    if (int(threadIdx.x) < wide && first + threadIdx.x < a.columns) {
      Sum sum = sums_of_block[threadIdx.x];
      for (int r = 1; r < height; ++r) sum.merge(sums_of_block[r * wide + threadIdx.x]);
      partial[part * a.columns + first + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// A warp to each channel adds its partial sums: `run` neighbours in each of `runs` lines of
// partial, which are `line` apart.
template <class Sum>
struct ReducePartialsArgs {
  const Sum* partial;
  int64_t channels, line;
  int run, runs;
};

template <class Op>
__global__ void __launch_bounds__(kThreads)
    reduce_partials(Op op, ReducePartialsArgs<typename Op::Sum> a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp);
  for (int64_t channel = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
       channel < a.channels; channel += warps) {
    typename Op::Sum sum;
    for (int e = lane; e < a.run * a.runs; e += kWarp)
      sum.merge(a.partial[(e / a.run) * a.line + channel * a.run + e % a.run]);
    reduce_lanes(sum, kWarp);
    if (lane == 0) op.finish(channel, sum);
  }
}

template <class Op>
Error launch_partials(const Op& op, const ReducePartialsArgs<typename Op::Sum>& args,
                      Stream stream) {
  const int64_t blocks = ceil_div(args.channels, kThreads / kWarp);
  return launch(reduce_partials<Op>, blocks, kThreads, 0, stream, op, args);
}

template <class Op, int N>
Error launch_columns(const Op& op, const Layout& l, const ReducePlan& plan, void* workspace,
                     Stream stream) {
  using Sum = typename Op::Sum;
  Sum* partial = static_cast<Sum*>(workspace);
  const Columns columns(l, N, plan.parts);
  const int64_t blocks = Columns::tiles_of(l, N) * plan.parts;
  const Error error = launch(reduce_columns<Op, N>, blocks, kThreads, kThreads * N * sizeof(Sum),
                             stream, op, columns, partial);
  if (error) return error;
  return launch_partials(op, {partial, l.channels, columns.columns, int(l.inner), int(plan.parts)},
                         stream);
}

template <class Op, int N>
Error launch_rows(const Op& op, const Layout& l, const ReducePlan& plan, void* workspace,
                  Stream stream) {
  using Sum = typename Op::Sum;
  Sum* partial = static_cast<Sum*>(workspace);
  const int64_t n = l.outer * l.inner, packets = n / N;
  const ReduceRowsArgs<Sum> args = {partial,    l.channels, n,       FastDivision(l.inner),
                                    plan.width, plan.parts, packets, ceil_div(packets, plan.parts)};
  const int64_t blocks = ceil_div(l.channels * plan.parts, kThreads / plan.width);
  const Error error =
      launch(reduce_rows<Op, N>, blocks, kThreads, kWarp * sizeof(Sum), stream, op, args);
  if (error || plan.parts == 1) return error;
  return launch_partials(op, {partial, l.channels, 0, int(plan.parts), 1}, stream);
}

// The results of all channels; a channel without elements gets finish(Sum()).
template <class Op>
Error launch_reduction(const Op& op, const Layout& layout, void* workspace, Stream stream) {
  using Type = typename Op::Type;
  const Layout l = simplest(layout);
  if (l.channels == 0) return 0;
  if (l.numel() == 0) return launch_partials(op, {nullptr, l.channels, 0, 1, 0}, stream);
  const ReducePlan plan = plan_reduction(l);
  if (plan.columns) {
    // four elements at most, to keep their channels and sums in registers
    constexpr int N = kVector<Type> < 4 ? kVector<Type> : 4;
    return op.aligned() && l.channels * l.inner % N == 0
               ? launch_columns<Op, N>(op, l, plan, workspace, stream)
               : launch_columns<Op, 1>(op, l, plan, workspace, stream);
  }
  constexpr int N = kVector<Type>;
  return op.aligned() && (l.channels == 1 || l.inner % N == 0)
             ? launch_rows<Op, N>(op, l, plan, workspace, stream)
             : launch_rows<Op, 1>(op, l, plan, workspace, stream);
}

}  // namespace qk::cuda
