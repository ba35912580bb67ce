// Weights as integers with a bfloat16 scale per 32 inputs: what ops/quantized.py defines, bit for
// bit. Compiled without contraction, because a fused multiply-add rounds once where torch rounds
// twice.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "growmoe_native.h"
#define GM_NS gm_quantize_layout
#include "pool.h"
#include "vectors.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GM_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define GM_CLONES
#endif

namespace {

using gm_quantize_layout::GROUP;
using gm_quantize_layout::narrow;
using gm_quantize_layout::widen;
using growmoe::Job;

constexpr float kSmallest = 1.17549435e-38f;  // bfloat16's normal range begins here
constexpr float kDivisors[] = {8.0f, 8.25f, 8.5f, 8.75f, 9.0f, 7.75f, 7.0f};

struct QuantizeCall {
  const float* w;
  int n, k, bits;
  int8_t* values;
  uint16_t* scales;
  std::atomic<int>* bad;
};

float scale_of(float largest, float divisor) {
  float scale = widen(narrow(largest / divisor));
  return std::fabs(scale) < kSmallest ? 0.0f : scale;
}

// The nearest integers, and the squared error relative to `unit`.
GM_CLONES double nearest(const float* w, float scale, float low, float high, float unit,
                         float* values) {
  float squares[GROUP];
  for (int i = 0; i < GROUP; ++i) {
    float near = scale == 0.0f ? 0.0f : w[i] / scale;
    near = (near + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: to the nearest, ties to even
    near = near < low ? low : near > high ? high : near;
    values[i] = near;
    float error = (near * scale - w[i]) / unit;
    squares[i] = error * error;
  }
  double total = 0;
  for (int i = 0; i < GROUP; ++i) total += squares[i];
  return total;
}

void quantize_group(const float* w, int bits, int8_t* out, int count, uint16_t* scale_out) {
  int place = 0;
  for (int i = 1; i < GROUP; ++i)
    if (std::fabs(w[i]) > std::fabs(w[place])) place = i;
  float largest = std::fabs(w[place]), unit = std::max(largest, kSmallest);
  float best[GROUP], found[GROUP], best_scale;
  if (bits == 8) {
    best_scale = scale_of(largest, 127.0f);
    nearest(w, best_scale, -127.0f, 127.0f, unit, best);
  } else {
    best_scale = scale_of(-w[place], kDivisors[0]);
    double least = nearest(w, best_scale, -8.0f, 7.0f, unit, best);
    for (int d = 1; d < 7; ++d) {
      float scale = scale_of(-w[place], kDivisors[d]);
      double error = nearest(w, scale, -8.0f, 7.0f, unit, found);
      if (error < least) {
        least = error, best_scale = scale;
        std::copy(found, found + GROUP, best);
      }
    }
  }
  for (int i = 0; i < count; ++i) out[i] = static_cast<int8_t>(best[i]);
  *scale_out = narrow(best_scale);
}

void quantize_job(Job& job, int) {
  const QuantizeCall& c = *static_cast<const QuantizeCall*>(job.call);
  int groups = (c.k + GROUP - 1) / GROUP;
  int64_t begin, end;
  while (job.take(0, c.n, 4, begin, end)) {
    for (int64_t row = begin; row < end; ++row) {
      for (int g = 0; g < groups; ++g) {
        float group[GROUP] = {};
        int count = std::min(GROUP, c.k - g * GROUP);
        const float* w = c.w + row * c.k + g * GROUP;
        bool finite = true;
        for (int i = 0; i < count; ++i) {
          group[i] = w[i];
          finite &= std::fabs(w[i]) <= 3.4028235e38f;
        }
        if (!finite) {
          c.bad->store(1);
          return;
        }
        quantize_group(group, c.bits, c.values + row * c.k + g * GROUP, count,
                       c.scales + row * groups + g);
      }
    }
  }
}

}  // namespace

extern "C" int32_t gm_quantize(const float* w, int32_t n, int32_t k, int32_t bits, int8_t* values,
                               uint16_t* scales, int32_t threads) {
  growmoe::Alone alone;
  std::atomic<int> bad{0};
  QuantizeCall call{w, n, k, bits, values, scales, &bad};
  Job job;
  job.run = quantize_job;
  job.call = &call;
  job.threads = threads;
  growmoe::run(job);
  return bad.load();
}
