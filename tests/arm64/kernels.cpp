// Runs every CPU kernel on made-up inputs and prints a line for each case: its name and a hash of
// all bytes that it wrote. Machines and instruction sets must print the same lines. Only NaN is
// hashed as one value: which of its many bit patterns comes out is the machine's choice.
#include "cpu/kernels.h"

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "math/half.h"

using namespace qk;

static int threads = 1;

static uint64_t mix(uint64_t i) {  // splitmix64 (Steele, Lea and Flood 2014)
  i = (i + 1) * 0x9E3779B97F4A7C15u;
  i = (i ^ (i >> 30)) * 0xBF58476D1CE4E5B9u;
  i = (i ^ (i >> 27)) * 0x94D049BB133111EBu;
  return i ^ (i >> 31);
}

// Size of an element in bytes, and the bits of infinity: what is above is NaN.
struct Format {
  int bytes;
  uint64_t infinity;
};

constexpr Format kByte = {1, UINT64_MAX}, kInt32 = {4, UINT64_MAX};
constexpr Format kFloat = {4, 0x7F800000u}, kDouble = {8, 0x7FF0000000000000u};
constexpr Format kHalf = {2, 0x7C00u}, kBFloat16 = {2, 0x7F80u};
constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};
constexpr const char* kNames[] = {"f32", "f64", "f16", "bf16"};

static Format stored(DType dtype) {
  const Format formats[] = {kFloat, kDouble, kHalf, kBFloat16};
  return formats[int(dtype)];
}

static Format computed(DType dtype) { return dtype == DType::f64 ? kDouble : kFloat; }

// n elements between two margins, which a kernel must leave as they are; they begin where a vector
// load is not aligned.
class Array {
 public:
  Array(Format format, int64_t n)
      : format(format), n(n), bytes(size_t(2 * kMargin + size()), 165) {}

  int64_t size() const { return n * format.bytes; }
  uint8_t* data() { return bytes.data() + kMargin; }

  // Of the floating formats.
  void set(int64_t i, double v) {
    const float f = float(v);
    const uint16_t half = format.infinity == kHalf.infinity ? Store<Half>::from(f).bits
                                                            : Store<BFloat16>::from(f).bits;
    const void* from = format.bytes == 8   ? static_cast<const void*>(&v)
                       : format.bytes == 4 ? static_cast<const void*>(&f)
                                           : static_cast<const void*>(&half);
    put(i, from);
  }

  void put(int64_t i, const void* from) {
    memcpy(data() + i * format.bytes, from, size_t(format.bytes));
  }

  uint64_t hash(uint64_t h) const {
    for (size_t i = 0; i < size_t(kMargin); ++i)
      h = mix(h ^ bytes[i] ^ uint64_t(bytes[bytes.size() - 1 - i]) << 8);
    const uint64_t sign = uint64_t(1) << (8 * format.bytes - 1);
    for (int64_t i = 0; i < n; ++i) {
      uint64_t bits = 0;
      memcpy(&bits, bytes.data() + kMargin + i * format.bytes, size_t(format.bytes));
      const bool nan = format.infinity != UINT64_MAX && (bits & (sign - 1)) > format.infinity;
      h = mix(h ^ (nan ? format.infinity + 1 : bits));
    }
    return h;
  }

 private:
  static constexpr int64_t kMargin = 72;
  Format format;
  int64_t n;
  std::vector<uint8_t> bytes;
};

static void report(const std::string& name, std::initializer_list<const Array*> written) {
  uint64_t h = 0;
  for (const Array* array : written) h = array->hash(h);
  printf("%s: %016" PRIx64 "\n", name.c_str(), h);
}

enum class Content { plain, extreme };

// Multiples of 2^-8, many of them ties, in turn with numbers of a full mantissa; extreme:
// infinities, NaN, subnormals, negative zeros and numbers far outside of the range here and there.
static double value(uint64_t i, Content content) {
  const double extremes[] = {INFINITY, -INFINITY, NAN,   -0.0,  1e-45, -1e-40,  1e30,
                             -3e38,    5e-8,      -6e-5, 65504, 65520, 8388609, -2.5e-8};
  const uint64_t r = mix(i), choice = r >> 20;
  if (content == Content::extreme && choice % 23 == 0) return extremes[choice / 23 % 14];
  if (i % 2) return double(r >> 40) * 0x1p-21 - 4.0;
  return (double(r % 4001) - 2000.0) / 256.0;
}

static Array made(Format format, int64_t n, uint64_t seed, Content content) {
  Array array(format, n);
  for (int64_t i = 0; i < n; ++i) array.set(i, value(seed * 1000003 + uint64_t(i), content));
  return array;
}

// A layout, a dtype and what follows from both.
struct Case {
  Layout layout;
  DType dtype;
  Content content;
  int number;  // of the layout

  std::string name(const std::string& op) const {
    char text[80];
    snprintf(text, sizeof(text), " %s %" PRId64 "x%" PRId64 "x%" PRId64 "%s", kNames[int(dtype)],
             layout.outer, layout.channels, layout.inner,
             content == Content::extreme ? " extreme" : "");
    return op + text;
  }
  Array x(uint64_t seed = 1) const { return made(stored(dtype), layout.numel(), seed, content); }
  Array output() const { return Array(stored(dtype), layout.numel()); }
  Array mask() const { return Array(kByte, (layout.numel() + 7) / 8); }
  Array per_channel(int64_t rows = 1) const {
    return Array(computed(dtype), rows * layout.channels);
  }
};

// Scales and zero points of a case: none, int32 or floating, as the layout's number says.
struct Given {
  Array scale, floating, integer;
  QuantParams quant;

  Given(const Case& c, int32_t qmin, int32_t qmax)
      : scale(c.per_channel()), floating(c.per_channel()), integer(kInt32, c.layout.channels) {
    for (int64_t i = 0; i < c.layout.channels; ++i) {
      const int32_t zp = int32_t(i * 7 % (qmax - qmin + 1)) + qmin;
      scale.set(i, i % 3 ? 0.03 + 0.0717 * double(i % 11) : 0.25);
      floating.set(i, double(zp) + 0.5);
      integer.put(i, &zp);
    }
    const bool is_int = c.number % 3 == 1;
    void* zero_point = c.number % 3 == 0 ? nullptr : is_int ? integer.data() : floating.data();
    quant = {scale.data(), zero_point, is_int, qmin, qmax};
  }
};

static const cpu::Kernels& kernels() { return cpu::kernels(); }

static std::string clip_name(bool clip_value) { return clip_value ? " by value" : " by code"; }

static void run_fake_quant(const Case& c, bool clip_value) {
  Given g(c, c.number % 2 ? -8 : 0, c.number % 2 ? 7 : 15);
  Array x = c.x(), y = c.output(), mask = c.mask();
  FakeQuantParams p = {c.dtype, c.layout, g.quant, clip_value, x.data(), y.data(), mask.data()};
  kernels().fake_quant(&p, 1, threads);
  report(c.name("fake_quant" + clip_name(clip_value)), {&y, &mask});

  Array grad = c.x(2), grad_x = c.output();
  FakeQuantBwdParams b = {c.dtype, c.layout.numel(), grad.data(), mask.data(), grad_x.data()};
  kernels().fake_quant_bwd(&b, 1, threads);
  report(c.name("fake_quant_bwd" + clip_name(clip_value)), {&grad_x});
}

static void run_lsq_bwd(const Case& c, bool clip_value) {
  Given g(c, c.number % 2 ? -8 : 0, c.number % 2 ? 7 : 15);
  Array x = c.x(), grad = c.x(2), grad_x = c.output();
  Array grad_s = c.per_channel(), grad_zp = c.per_channel();
  LsqBwdParams p = {};
  p.dtype = c.dtype, p.layout = c.layout, p.quant = g.quant, p.clip_value = clip_value;
  p.grad_scale = 0.0123;
  p.grad = grad.data(), p.x = x.data(), p.grad_x = grad_x.data();
  p.grad_s = grad_s.data(), p.grad_zp = grad_zp.data();
  kernels().lsq_bwd(&p, 1, threads);
  report(c.name("lsq_bwd" + clip_name(clip_value)), {&grad_x, &grad_s, &grad_zp});
}

// A range search and its outputs.
struct Search {
  Array x, scale, zero_point, range;
  QuantRangeParams params = {};

  Search(const Case& c, Method method, bool symmetric)
      : x(c.x()),
        scale(c.per_channel()),
        zero_point(kInt32, c.layout.channels),
        range(c.per_channel(2)) {
    const double last = double(c.layout.outer * c.layout.inner - 1);
    const auto rank = [last](double q, int64_t& k, double& w) {
      k = int64_t(floor(last * q));
      w = last * q - double(k);
    };
    params.dtype = c.dtype, params.layout = c.layout;
    params.qmin = symmetric ? -8 : 0, params.qmax = symmetric ? 7 : 15;
    params.symmetric = symmetric, params.method = method;
    rank(0.02, params.ranks.lo_k, params.ranks.lo_w);
    rank(0.98, params.ranks.hi_k, params.ranks.hi_w);
    params.x = x.data(), params.scale = scale.data();
    params.zero_point = reinterpret_cast<int32_t*>(zero_point.data());
    params.range = range.data();
  }

  static std::string name(Method method, bool symmetric) {
    const char* names[] = {" minmax", " percentile", " mse", " lsq"};
    return names[int(method)] + std::string(symmetric ? " symmetric" : " affine");
  }
};

static void run_ranges(const Case& c, Method method, bool symmetric) {
  if (c.layout.numel() == 0 && method == Method::percentile) return;  // the caller's own case
  const bool slow = method == Method::mse;
  if (slow && c.content == Content::extreme) return;
  const std::string name = Search::name(method, symmetric);
  Search s(c, method, symmetric);
  kernels().quant_range(&s.params, 1, threads);
  report(c.name("quant_range" + name), {&s.scale, &s.zero_point, &s.range});

  Array scale = c.per_channel(), zero_point(kInt32, c.layout.channels);
  QParamsParams q = {c.dtype == DType::f64,
                     c.layout.channels,
                     s.params.qmin,
                     s.params.qmax,
                     symmetric,
                     s.range.data(),
                     scale.data(),
                     reinterpret_cast<int32_t*>(zero_point.data()),
                     nullptr,
                     0.1};
  kernels().qparams(&q, 1, threads);
  report(c.name("qparams" + name), {&scale, &zero_point});
  q.running = s.range.data();  // moves by itself: any range does
  kernels().qparams(&q, 1, threads);
  report(c.name("qparams running" + name), {&s.range, &scale, &zero_point});
  if (slow) return;

  Search d(c, method, symmetric);
  Array y = c.output(), mask = c.mask();
  FakeQuantDynamicParams f = {d.params, symmetric, y.data(), mask.data()};
  kernels().fake_quant_dynamic(&f, 1, threads);
  report(c.name("fake_quant_dynamic" + name), {&d.scale, &d.zero_point, &y, &mask});

  Search e(c, method, symmetric);
  Array stats = c.per_channel(4);
  ErrorStatsDynamicParams p = {};
  p.range = e.params, p.clip_value = symmetric, p.stats = stats.data();
  kernels().error_stats_dynamic(&p, 1, threads);
  report(c.name("error_stats_dynamic" + name), {&e.scale, &e.zero_point, &stats});
}

static void run_error_stats(const Case& c, bool clip_value) {
  Given g(c, c.number % 2 ? -2 : 0, c.number % 2 ? 1 : 3);
  Array stats = c.per_channel(4), ema = c.per_channel(5);
  for (int64_t i = 0; i < 5 * c.layout.channels; ++i) ema.set(i, 0.0);
  for (uint64_t step = 1; step <= 2; ++step) {
    Array x = c.x(step);
    ErrorStatsParams p = {};
    p.dtype = c.dtype, p.layout = c.layout, p.quant = g.quant, p.clip_value = clip_value;
    p.x = x.data(), p.stats = stats.data(), p.ema = ema.data(), p.decay = 0.9;
    kernels().error_stats(&p, 1, threads);
  }
  report(c.name("error_stats" + clip_name(clip_value)), {&stats, &ema});
}

// bits: of a packed code, or 8, 16 or 32 for those of whole bytes
static void run_quantize(const Case& c, int bits) {
  const bool is_signed = c.number % 2;
  const int32_t levels = 1 << (bits < 8 ? bits : 8), qmin = is_signed ? -levels / 2 : 0;
  const int pack = bits < 8 ? bits : 0, code_bytes = bits < 8 ? 1 : bits / 8;
  const int64_t row = c.layout.inner > 1 ? c.layout.inner : c.layout.channels;
  const int64_t bytes =
      pack ? c.layout.numel() / row * ((row * pack + 7) / 8) : c.layout.numel() * code_bytes;
  Given g(c, qmin, qmin + levels - 1);
  Array x = c.x(), codes(kByte, bytes), y = c.output();
  QuantizeParams q = {};
  q.dtype = c.dtype, q.layout = c.layout, q.quant = g.quant;
  q.code_bytes = code_bytes, q.pack = pack, q.row_size = row;
  q.x = x.data(), q.codes = codes.data();
  kernels().quantize(&q, 1, threads);
  report(c.name("quantize " + std::to_string(bits) + " bits"), {&codes});

  DequantizeParams d = {};
  d.dtype = c.dtype, d.layout = c.layout, d.quant = g.quant;
  d.code_bytes = code_bytes, d.code_signed = is_signed || code_bytes > 1, d.pack = pack;
  d.row_size = row, d.codes = codes.data(), d.y = y.data();
  kernels().dequantize(&d, 1, threads);
  report(c.name("dequantize " + std::to_string(bits) + " bits"), {&y});
}

// Conversions: every size of number to the storage dtype, and every fp16 and back.
static void run_conversions(DType dtype) {
  const Case c = {{1, 96, 67}, dtype, Content::plain, 0};
  Given g(c, 0, 255);
  for (int64_t i = 0; i < 96; ++i) g.scale.set(i, ldexp(1.0 + double(i) / 97.0, int(i) - 66));
  Array codes(kInt32, c.layout.numel()), y = c.output();
  for (int64_t i = 0; i < c.layout.numel(); ++i) {
    const int32_t code = int32_t(mix(uint64_t(i)) >> 44) - (1 << 19);
    codes.put(i, &code);
  }
  DequantizeParams d = {};
  d.dtype = dtype, d.layout = c.layout, d.quant = g.quant, d.code_bytes = 4, d.code_signed = true;
  d.row_size = c.layout.inner, d.codes = codes.data(), d.y = y.data();
  kernels().dequantize(&d, 1, threads);
  report(c.name("dequantize to every exponent"), {&y});
}

static NoiseParams noise_params(const Case& c, NoiseKind kind, const Walk& walk) {
  NoiseParams p = {};
  p.dtype = c.dtype, p.layout = c.layout, p.walk = walk, p.kind = kind;
  p.counter.seed = 0x123456789ABCDEF, p.counter.step = 0x700000003;
  p.offset = 5, p.ramp = 0.7, p.threshold = 1 << 24;
  return p;
}

static void run_noise(const Case& c, const Walk& walk, NoiseKind kind, int32_t threshold) {
  Array mean = c.per_channel(), std = c.per_channel(), prev_mean = c.per_channel(),
        prev_std = c.per_channel(), x = c.x(), y = c.output();
  for (int64_t i = 0; i < c.layout.channels; ++i) {
    mean.set(i, 0.01 * double(i % 5) - 0.02), std.set(i, 0.1 + 0.03 * double(i % 7));
    prev_mean.set(i, 0.03 - 0.01 * double(i % 3)), prev_std.set(i, 0.2 - 0.02 * double(i % 4));
  }
  NoiseParams p = noise_params(c, kind, walk);
  p.threshold = threshold;
  p.mean = kind == NoiseKind::uniform ? nullptr : mean.data(), p.std = std.data();
  if (kind == NoiseKind::differential) p.prev_mean = prev_mean.data(), p.prev_std = prev_std.data();
  p.x = x.data(), p.y = y.data();
  kernels().noise(&p, 1, threads);
  const char* names[] = {"noise differential", "noise drop-in", "noise uniform"};
  const std::string op = names[int(kind)] + std::string(threshold < 1 << 24 ? " gated" : "");
  report(c.name(op + (walk.rank > 1 ? " channels_last" : "")), {&y});
}

static void run_all_noise(const Case& c, const Walk& walk) {
  run_noise(c, walk, NoiseKind::differential, 1 << 24);
  for (const NoiseKind kind : {NoiseKind::drop_in, NoiseKind::uniform})
    for (const int32_t threshold : {1 << 24, 5000000}) run_noise(c, walk, kind, threshold);
}

// x + 0 u of every fp16, from one conversion to the other.
static void run_every_half() {
  const Case c = {{1, 1, 1 << 16}, DType::f16, Content::plain, 0};
  Array x = c.output(), y = c.output(), std = c.per_channel();
  for (int32_t i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = uint16_t(i);
    x.put(i, &bits);
  }
  std.set(0, 0.0);
  NoiseParams p = noise_params(c, NoiseKind::uniform, {1, {1 << 16}, {1}});
  p.std = std.data(), p.x = x.data(), p.y = y.data();
  kernels().noise(&p, 1, threads);
  report("noise of zero on every fp16", {&y});
}

static void run_case(const Case& c) {
  for (const bool clip_value : {false, true}) {
    run_fake_quant(c, clip_value);
    run_lsq_bwd(c, clip_value);
    run_error_stats(c, clip_value);
    for (const Method m : {Method::minmax, Method::percentile, Method::mse, Method::lsq})
      run_ranges(c, m, /*symmetric=*/clip_value);
  }
  for (const int bits : {1, 2, 4, 8, 16, 32}) run_quantize(c, bits);
  run_all_noise(c, {1, {c.layout.numel()}, {1}});
}

// Arguments: the number of threads.
int main(int count, char** arguments) {
  if (count > 1) threads = atoi(arguments[1]);
  printf("simd %s\n", kernels().simd);
  const Layout layouts[] = {{1, 1, 1},   {1, 1, 1003}, {1, 1, 33003}, {1, 24, 333},
                            {3, 5, 77},  {67, 13, 1},  {5001, 7, 1},  {5, 700, 1},
                            {600, 6, 9}, {3, 2, 4500}, {1, 3, 0}};
  for (const DType dtype : kDTypes) {
    int number = 0;
    for (const Layout& layout : layouts) {
      run_case({layout, dtype, Content::plain, number});
      if (layout.numel() < 20000) run_case({layout, dtype, Content::extreme, number});
      ++number;
    }
    run_all_noise({{70, 70, 1}, dtype, Content::plain, 0}, {3, {2, 35, 70}, {2450, 1, 35}});
    run_conversions(dtype);
  }
  run_every_half();
  return 0;
}
