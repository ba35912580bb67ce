// Packing of weights (panels.h says how they lie), and the choice of instruction set.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "growmoe_native.h"
#include "kernels.h"

#ifndef GM_LEVELS
#define GM_LEVELS 0
#endif
#define GM_NS gm_pack_layout
#include "panels.h"
#include "pool.h"

namespace {

using namespace gm_pack_layout;
using growmoe::Alone;
using growmoe::Job;
using growmoe::Kernels;

struct PackCall {
  int form, n, k;
  const void* source;
  const uint16_t* scales;
  char* packed;
};

void pack_float32(const PackCall& c, int64_t p, char* out) {
  const float* w = static_cast<const float*>(c.source);
  float* to = reinterpret_cast<float*>(out);
  int rows = std::min<int64_t>(PANEL, c.n - p * PANEL);
  for (int o = 0; o < rows; ++o)
    for (int i = 0; i < c.k; ++i) to[int64_t(i) * PANEL + o] = w[(p * PANEL + o) * c.k + i];
}

void pack_bfloat16(const PackCall& c, int64_t p, char* out) {
  const float* w = static_cast<const float*>(c.source);
  uint16_t* to = reinterpret_cast<uint16_t*>(out);
  int rows = std::min<int64_t>(PANEL, c.n - p * PANEL);
  for (int o = 0; o < rows; ++o)
    for (int i = 0; i < c.k; ++i)
      to[(int64_t(i / 2) * PANEL + o) * 2 + i % 2] = narrow(w[(p * PANEL + o) * c.k + i]);
}

void pack_integer(const PackCall& c, int64_t p, char* out) {
  const int8_t* w = static_cast<const int8_t*>(c.source);
  int groups = padded(c.k) / GROUP, rows = std::min<int64_t>(PANEL, c.n - p * PANEL);
  int64_t stride = c.form == GM_INT8 ? kInt8Group : kInt4Group;
  for (int g = 0; g < groups; ++g) {
    char* group = out + g * stride;
    uint16_t* scales = reinterpret_cast<uint16_t*>(group);
    uint8_t* data = reinterpret_cast<uint8_t*>(group) + 2 * PANEL;
    if (c.form == GM_INT4) std::memset(data, 0x88, PANEL * GROUP / 2);
    for (int o = 0; o < rows; ++o) {
      int64_t row = p * PANEL + o;
      scales[o] = c.scales[row * groups + g];
      for (int i = 0; i < GROUP && g * GROUP + i < c.k; ++i) {
        int8_t value = w[row * c.k + g * GROUP + i];
        int pair = i / 2, odd = i % 2;
        if (c.form == GM_INT8) {
          data[pair * 64 + o / 16 * 32 + odd * 16 + o % 16] = static_cast<uint8_t>(value);
        } else {
          int q = pair / 4, bit = odd * 16 + pair % 4 * 4;
          uint8_t* byte = data + (q * PANEL + o) * 4 + bit / 8;
          *byte = static_cast<uint8_t>((*byte & ~(15 << bit % 8)) | ((value + 8) & 15) << bit % 8);
        }
      }
    }
  }
}

void pack_job(Job& job, int) {
  const PackCall& c = *static_cast<const PackCall*>(job.call);
  int64_t begin, end, size = panel_bytes(c.form, c.k);
  while (job.take(0, (c.n + PANEL - 1) / PANEL, 1, begin, end)) {
    char* out = c.packed + begin * size;
    std::memset(out, 0, size);
    if (c.form == GM_FLOAT32)
      pack_float32(c, begin, out);
    else if (c.form == GM_BFLOAT16)
      pack_bfloat16(c, begin, out);
    else
      pack_integer(c, begin, out);
  }
}

const Kernels* const kLevels[] = {&growmoe::kernels_base,
#if GM_LEVELS >= 1
                                  &growmoe::kernels_avx2,
#endif
#if GM_LEVELS >= 2
                                  &growmoe::kernels_avx512,
#endif
#if GM_LEVELS >= 3
                                  &growmoe::kernels_bf16,
#endif
};

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool has[] = {true, avx2, avx512, avx512 && __builtin_cpu_supports("avx512bf16")};
  int best = GM_LEVELS;  // compiled levels above the baseline
  while (!has[best]) --best;
  return best;
#endif
  return 0;
}

std::atomic<int> level{best_level()};
const Kernels& kernels() { return *kLevels[level.load(std::memory_order_relaxed)]; }

}  // namespace

extern "C" {

int32_t gm_version() { return GM_VERSION; }
int32_t gm_best_level() { return best_level(); }
int32_t gm_level() { return level.load(); }
int32_t gm_set_level(int32_t wanted) {
  level.store(std::max(0, std::min(wanted, best_level())));
  return level.load();
}

int64_t gm_packed_bytes(int32_t form, int32_t n, int32_t k) {
  return (int64_t(n) + PANEL - 1) / PANEL * panel_bytes(form, k);
}

void gm_pack(int32_t form, int32_t n, int32_t k, const void* source, const uint16_t* scales,
             void* packed, int32_t threads) {
  Alone alone;
  PackCall call{form, n, k, source, scales, static_cast<char*>(packed)};
  Job job;
  job.run = pack_job;
  job.call = &call;
  job.threads = threads;
  run(job);
}

int32_t gm_linear(const gm_weight* w, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                  int32_t tokens, int32_t add, int32_t threads) {
  Alone alone;
  return kernels().linear(w, x, x_stride, y, y_stride, tokens, add, threads);
}

int32_t gm_rms_norm(const float* x, const float* weight, float* y, int32_t tokens, int32_t size,
                    float eps, int32_t threads) {
  Alone alone;
  return kernels().rms_norm(x, weight, y, tokens, size, eps, threads);
}

int32_t gm_route(const gm_router_call* call, int32_t threads) {
  Alone alone;
  return kernels().route(call, threads);
}

int32_t gm_experts(const gm_experts_call* call, int32_t threads) {
  Alone alone;
  return kernels().experts(call, threads);
}

int32_t gm_combine(const gm_combine_call* call, int32_t threads) {
  Alone alone;
  return kernels().combine(call, threads);
}

int32_t gm_attention(const gm_attention_call* call, int32_t threads) {
  Alone alone;
  return kernels().attention(call, threads);
}

int32_t gm_plain_experts(const gm_plain_call* call, int32_t threads) {
  Alone alone;
  return kernels().plain_experts(call, threads);
}

int32_t gm_layer(const gm_layer_call* call, int32_t threads) {
  Alone alone;
  return kernels().layer(call, threads);
}

double gm_read_bandwidth(const void* memory, int64_t bytes, int32_t threads) {
  Alone alone;
  return kernels().bandwidth(memory, bytes, threads);
}
}
