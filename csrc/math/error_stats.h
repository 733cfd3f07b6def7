// Statistics of the quantization error from its sums. Formula: reference/error_stats.py.
#pragma once

#include "math/numeric.h"

namespace qk {
inline namespace QK_ISA {

template <class C>
struct ErrorStats {
  C mean, var, mean_square, clip_rate;
};

// spread: sum of squared distances from the mean of n errors.
template <class C>
QK_HD ErrorStats<C> error_stats_of(double n, double mean, double spread, double clipped) {
  if (n == 0.0) return {C(0), C(0), C(0), C(0)};
  const double var = spread / n;
  return {C(mean), C(var), C(mean * mean + var), C(clipped / n)};
}

// weight <- weight + rate (1 - weight); returns by how much the averages follow what is new
template <class C>
QK_HD C ema_step(C& weight, C rate) {
  weight = weight + (C(1) - weight) * rate;
  return rate / weight;
}

template <class C>
QK_HD C ema_value(C average, C value, C step) {
  return average + (value - average) * step;
}

// Writes the statistics of a channel, and moves its averages if there are any; they pass over what
// is not finite, which would stay in them for good.
template <class C>
QK_HD void write_error_stats(const ErrorStats<C>& s, int64_t channel, int64_t channels, C* stats,
                             C* ema, C rate) {
  const C values[4] = {s.mean, s.var, s.mean_square, s.clip_rate};
  const bool moves = ema && qk_abs(s.mean) <= Limits<C>::largest &&
                     s.mean_square <= Limits<C>::largest && s.var <= Limits<C>::largest;
  const C step = moves ? ema_step(ema[4 * channels + channel], rate) : C(0);
  for (int i = 0; i < 4; ++i) {
    const int64_t at = i * channels + channel;
    stats[at] = values[i];
    if (moves) ema[at] = ema_value(ema[at], values[i], step);
  }
}

}  // namespace QK_ISA
}  // namespace qk
