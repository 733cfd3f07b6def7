// Noise added to one element. Formula: reference/noise.py.
#pragma once

#include "math/philox.h"

namespace qk {
inline namespace QK_ISA {

// What one channel needs. Uniform noise: std is the scale. The previous statistics are those of
// delta_{t-1}.
template <class C>
struct NoiseChannel {
  C mean, std, prev_mean, prev_std;
};

// NaN where a mean is not finite, or a std negative or not finite.
template <class C>
QK_HD C valid_mean(C mean) {
  return qk_abs(mean) <= Limits<C>::largest ? mean : qk_nan<C>();
}

template <class C>
QK_HD C valid_std(C std) {
  return std >= C(0) && std <= Limits<C>::largest ? std : qk_nan<C>();
}

template <class C>
QK_HD NoiseChannel<C> make_noise_channel(C mean, C std, C prev_mean, C prev_std) {
  return {valid_mean(mean), valid_std(std), valid_mean(prev_mean), valid_std(prev_std)};
}

template <class C>
QK_HD C gaussian(C mean, C std, float eps) {
  return mean + std * C(eps);
}

// x + ramp (d_t - d_{t-1})
template <class C>
QK_HD C differential_value(C x, float eps, float prev_eps, C ramp, const NoiseChannel<C>& c) {
  const C change = gaussian(c.mean, c.std, eps) - gaussian(c.prev_mean, c.prev_std, prev_eps);
  return x + change * ramp;
}

// x + ramp (mean + std eps), if the gate is open
template <class C>
QK_HD C drop_in_value(C x, float eps, bool open, C ramp, const NoiseChannel<C>& c) {
  const C noisy = x + gaussian(c.mean, c.std, eps) * ramp;
  return open ? noisy : x;
}

// x + scale u, if the gate is open
template <class C>
QK_HD C uniform_value(C x, float u, bool open, const NoiseChannel<C>& c) {
  const C noisy = x + c.std * C(u);
  return open ? noisy : x;
}

}  // namespace QK_ISA
}  // namespace qk
