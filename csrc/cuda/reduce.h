// Sums over the elements of each channel, in an order that depends on the shape (and on whether the
// addresses allow 16-byte accesses) alone: one pass over the elements, then one over the partial
// sums.
//
// An Op says what is summed:
//   Type, Sum             element type; what is summed: Sum() is empty, merge(Sum) adds
//   Context               constants of a channel: context(channel)
//   Loaded<N>, load<N>(i) the N elements from index i on
//   add<kStep>(loaded, i, contexts, sums)  element e goes to sums[e * kStep] under
//                         contexts[e * kStep]
//   finish(channel, sum)  writes the result
//   aligned()             16-byte accesses are allowed
//   kBlocks               blocks that a multiprocessor can hold, which bounds the registers
// It is an argument of the kernel and must be copied and left uninitialised at no cost.
#pragma once

#include "cuda/batch.h"
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

// One call: its plan, and the kernel that takes the first pass.
template <class Op>
struct Reduction {
  using Sum = typename Op::Sum;
  enum Path { rows, rows_vector, columns, columns_vector, no_elements, no_channels };
  static constexpr int kRowVector = kVector<typename Op::Type>;
  // four elements at most, to keep their channels and sums in registers
  static constexpr int kColumnVector = kRowVector < 4 ? kRowVector : 4;

  Op op;
  Layout layout;
  Sum* partial;
  ReducePlan plan;
  Path path;

  Reduction(const Op& op, const Layout& l, void* workspace)
      : op(op), layout(simplest(l)), partial(static_cast<Sum*>(workspace)) {
    path = no_channels;
    if (layout.channels == 0) return;
    path = no_elements;
    if (layout.numel() == 0) return;
    plan = plan_reduction(layout);
    const int64_t line = layout.channels * layout.inner;
    if (plan.columns)
      path = op.aligned() && line % kColumnVector == 0 ? columns_vector : columns;
    else
      path = op.aligned() && (layout.channels == 1 || layout.inner % kRowVector == 0) ? rows_vector
                                                                                      : rows;
  }
};

template <class Op>
struct ReduceRowsArgs {
  Op op;
  typename Op::Sum* partial;
  int64_t channels, n;  // n elements of each channel, in rows of inner
  FastDivision inner;
  int width, parts;
  int64_t part_packets;

  // index in memory of a channel's element
  __device__ int64_t index(int64_t channel, int64_t element) const {
    if (n == inner.divisor()) return channel * n + element;
    const int64_t row = inner.quotient(element);
    return element + (row * (channels - 1) + channel) * inner.divisor();
  }
};

// `count` packets of a channel from `begin` on, every width-th of them from `lane` on.
template <class Op, int N, class W>
__device__ __forceinline__ void add_packets(const W& work, int64_t channel, int64_t begin, int lane,
                                            int count, const typename Op::Context& context,
                                            typename Op::Sum& sum) {
  constexpr int kInFlight = 4;
  for (int k = lane; k < count; k += kInFlight * work->width) {
    typename Op::template Loaded<N> loaded[kInFlight];
    int64_t at[kInFlight];
    const int step = work->width;
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      at[u] = work->index(channel, (begin + k + u * step) * N);
      if (k + u * step < count) loaded[u] = work->op.template load<N>(at[u]);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      if (k + u * step < count) work->op.template add<0>(loaded[u], at[u], &context, &sum);
  }
}

// `width` threads to each part of each channel: some lanes of a warp, or the block. An int counts
// the packets of a part: where it is long, there are thousands.
template <bool kOne, class Op, int N>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    reduce_rows(const __grid_constant__ Batch<ReduceRowsArgs<Op>, kOne> batch) {
  using Sum = typename Op::Sum;
  struct Shared {
    Sum scratch[kWarp];
  };
  const Work work(batch);
  const int width = work->width, lane = threadIdx.x % width, per_block = kThreads / width;
  for (int64_t first = int64_t(work.block) * per_block;;
       first += int64_t(work.blocks) * per_block) {
    const int64_t item = first + threadIdx.x / width, items = work->channels * work->parts;
    if (first >= items) break;
    Sum sum;
    if (item < items) {
      const ReduceRowsArgs<Op>& a = *work;
      const int64_t channel = a.parts == 1 ? item : item / a.parts;
      const int part = int(item - channel * a.parts);
      const typename Op::Context context = a.op.context(channel);
      const int64_t begin = part * a.part_packets, left = a.n / N - begin;
      const int count = int(left < a.part_packets ? left : a.part_packets);
      add_packets<Op, N>(work, channel, begin, lane, count, context, sum);
      if (N > 1 && part == work->parts - 1) {
        const ReduceRowsArgs<Op>& b = *work;
        // a packet of halves has more elements than the fewest lanes
        for (int64_t tail = b.n / N * N + lane; tail < b.n; tail += width) {
          const int64_t i = b.index(channel, tail);
          b.op.template add<0>(b.op.template load<1>(i), i, &context, &sum);
        }
      }
    }
    if (width == kThreads)
      reduce_block(sum, shared<Shared>().scratch);
    else
      reduce_lanes(sum, width);
    if (item < items && lane == 0) {
      if (work->parts == 1)
        work->op.finish(item, sum);
      else
        work->partial[item] = sum;
    }
    if (width == kThreads) __syncthreads();
  }
}

template <class Op>
struct ReduceColumnsArgs {
  Op op;
  typename Op::Sum* partial;  // [parts, columns]
  Columns cut;
};

template <class Sum, int N>
struct ColumnsShared {
  Sum sums[kThreads * N];
  int64_t first, to;  // column of the block's first one, and where its sum goes
};

template <class Op, int N>
__global__ void __launch_bounds__(kThreads, Op::kBlocks)
    reduce_columns(const __grid_constant__ Batch<ReduceColumnsArgs<Op>, false> batch) {
  using Sum = typename Op::Sum;
  constexpr int kInFlight = 2;
  ColumnsShared<Sum, N>& s = shared<ColumnsShared<Sum, N>>();
  const Work work(batch);
  for (int64_t item = work.block;; item += work.blocks) {
    const ReduceColumnsArgs<Op>& a = *work;
    const int width = a.cut.width, height = kThreads / width, wide = width * N;
    const int x = threadIdx.x % width, y = threadIdx.x / width;
    const int64_t tiles = (a.cut.columns + wide - 1) / wide, part = item / tiles;
    if (part >= a.cut.parts) break;
    const int64_t first = (item - part * tiles) * wide, column = first + x * N;
    const int64_t begin = part * a.cut.part_rows, left = a.cut.outer - begin;
    const int rows = int(left < a.cut.part_rows ? left : a.cut.part_rows);
    const int64_t origin = begin * a.cut.columns + column;
    if (threadIdx.x == 0) {
      s.first = first;
      s.to = part * a.cut.columns + first;
    }
    Sum sums[N];
    if (column < a.cut.columns) {
      typename Op::Context contexts[N];
#pragma unroll
      for (int e = 0; e < N; ++e) contexts[e] = a.op.context(a.cut.inner.quotient(column + e));
      for (int row = y; row < rows; row += kInFlight * height) {
        const auto at = [&](int u) { return origin + (row + u * height) * work->cut.columns; };
        typename Op::template Loaded<N> loaded[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (row + u * height < rows) loaded[u] = work->op.template load<N>(at(u));
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
          if (row + u * height < rows) work->op.template add<1>(loaded[u], at(u), contexts, sums);
      }
    }
#pragma unroll
    for (int e = 0; e < N; ++e) s.sums[threadIdx.x * N + e] = sums[e];
    __syncthreads();
    const int line = work->cut.width * N;
    if (int(threadIdx.x) < line && s.first + threadIdx.x < work->cut.columns) {
      Sum sum = s.sums[threadIdx.x];
      for (int r = line; r < kThreads * N; r += line) sum.merge(s.sums[r + threadIdx.x]);
      work->partial[s.to + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// A warp to each channel adds its partial sums: `run` neighbours in each of `runs` lines of
// partial, which are `line` apart.
template <class Op>
struct ReducePartialsArgs {
  Op op;
  const typename Op::Sum* partial;
  int64_t channels, line;
  int run, runs;
};

template <bool kOne, class Op>
__global__ void __launch_bounds__(kThreads)
    reduce_partials(const __grid_constant__ Batch<ReducePartialsArgs<Op>, kOne> batch) {
  const Work work(batch);
  const int lane = threadIdx.x % kWarp;
  for (int64_t channel = work.thread() / kWarp; channel < work->channels;
       channel += work.threads() / kWarp) {
    typename Op::Sum sum;
    for (int e = lane; e < work->run * work->runs; e += kWarp) {
      const ReducePartialsArgs<Op>& a = *work;
      sum.merge(a.partial[(e / a.run) * a.line + channel * a.run + e % a.run]);
    }
    reduce_lanes(sum, kWarp);
    if (lane == 0) work->op.finish(channel, sum);
  }
}

// A kernel for single calls is worth its code where speed counts.
template <class Op, int N>
constexpr bool kHasOne = N > 1 && sizeof(typename Op::Type) <= 4;

template <class Op, int N>
Error launch_rows(const std::vector<Reduction<Op>>& calls, typename Reduction<Op>::Path path,
                  Stream stream) {
  const Grid grid = {kThreads, kWarp * sizeof(typename Op::Sum)};
  BatchKernel<ReduceRowsArgs<Op>, true> one = nullptr;
  if constexpr (kHasOne<Op, N>) one = reduce_rows<true, Op, N>;
  Batcher<ReduceRowsArgs<Op>> batcher(one, reduce_rows<false, Op, N>, grid, stream);
  for (const Reduction<Op>& r : calls) {
    if (r.path != path) continue;
    const Layout& l = r.layout;
    const int64_t n = l.outer * l.inner, parts = r.plan.parts;
    batcher.add({r.op, r.partial, l.channels, n, FastDivision(l.inner), r.plan.width, int(parts),
                 ceil_div(n / N, parts)},
                ceil_div(l.channels * parts, kThreads / r.plan.width));
  }
  return batcher.finish();
}

template <class Op, int N>
Error launch_columns(const std::vector<Reduction<Op>>& calls, typename Reduction<Op>::Path path,
                     Stream stream) {
  const Grid grid = {kThreads, sizeof(ColumnsShared<typename Op::Sum, N>)};
  Batcher<ReduceColumnsArgs<Op>> batcher(nullptr, reduce_columns<Op, N>, grid, stream);
  for (const Reduction<Op>& r : calls) {
    if (r.path != path) continue;
    batcher.add({r.op, r.partial, Columns(r.layout, N, r.plan.parts)},
                Columns::tiles_of(r.layout, N) * r.plan.parts);
  }
  return batcher.finish();
}

// A channel without elements gets finish(Sum()).
template <class Op>
Error launch_partials(const std::vector<Reduction<Op>>& calls, Stream stream) {
  using R = Reduction<Op>;
  Batcher<ReducePartialsArgs<Op>> batcher(reduce_partials<true, Op>, reduce_partials<false, Op>,
                                          Grid(), stream);
  for (const R& r : calls) {
    const Layout& l = r.layout;
    const int64_t blocks = blocks_for(l.channels);
    if (r.path == R::no_elements)
      batcher.add({r.op, nullptr, l.channels, 0, 1, 0}, blocks);
    else if (r.path == R::columns || r.path == R::columns_vector)
      batcher.add(
          {r.op, r.partial, l.channels, l.channels * l.inner, int(l.inner), int(r.plan.parts)},
          blocks);
    else if (r.path != R::no_channels && r.plan.parts > 1)
      batcher.add({r.op, r.partial, l.channels, 0, int(r.plan.parts), 1}, blocks);
  }
  return batcher.finish();
}

// The results of all channels of all calls: up to four kernels for the elements, then one for the
// partial sums. The bits of a result do not depend on the rest of the list.
template <class Op>
Error launch_reductions(const std::vector<Reduction<Op>>& calls, Stream stream) {
  using R = Reduction<Op>;
  Error error = launch_rows<Op, R::kRowVector>(calls, R::rows_vector, stream);
  if (!error) error = launch_rows<Op, 1>(calls, R::rows, stream);
  if (!error) error = launch_columns<Op, R::kColumnVector>(calls, R::columns_vector, stream);
  if (!error) error = launch_columns<Op, 1>(calls, R::columns, stream);
  return error ? error : launch_partials(calls, stream);
}

}  // namespace qk::cuda
