// Vectors of the instruction set that the including file is compiled for.
//
// GCC and Clang vector types, so that one source serves every level; intrinsics only where there is
// no other way to say it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace GM_NS {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int PANEL = 32;          // outputs per panel of packed weights
constexpr int V = PANEL / W;       // vectors per panel
constexpr int GROUP = 32;          // inputs that share a scale

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb __attribute__((vector_size(W)));

template <typename T>
static inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  return v;
}
template <typename T>
static inline void store(void* p, T v) {
  std::memcpy(p, &v, sizeof(T));
}
static inline vf all(float x) { return x - vf{}; }
static inline vf largest(vf a, vf b) { return a > b ? a : b; }

// bfloat16 is the upper half of a float32
static inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }
static inline float widen(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// round to nearest, ties to even; NaN stays NaN
static inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline vh narrow(vf x) {
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  vu nan = bits >> 16 | 0x40;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, vh);
}

static inline vf from_bytes(const char* p) {
#if defined(__AVX512F__)  // the compiler makes a detour of convertvector
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<vb>(p), vi), vf);
#endif
}

static inline float sum(vf v) {  // a fixed tree
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
static inline float highest(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < W; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// exp to about 2 units in the last place; 0 below -87, at most exp(88)
static inline vf exponential(vf x) {
  vf clipped = x < -87.0f ? all(-87.0f) : (x > 88.0f ? all(88.0f) : x);
  vf shifted = clipped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 leaves the nearest integer
  vi n = (vi)shifted - 0x4b400000;
  vf whole = shifted - 12582912.0f;
  vf r = clipped - whole * 0.693359375f + whole * 2.12194440e-4f;
  vf p = all(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vf scaled = p * (vf)((n + 127) << 23);
  vf found = x < -87.0f ? vf{} : scaled;
  return x != x ? x : found;
}

// Two neighbouring inputs of W outputs, as bfloat16 pairs where the processor multiplies those.
#if defined(__AVX512BF16__)
typedef __m512i Pair;
static inline vf dot(vf sum, Pair w, const uint32_t* x) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*x));
}
static inline Pair pair_of(vu bits) { return (Pair)bits; }
static inline Pair pair_of(vf even, vf odd) {  // exact for integers below 257
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
}
#else
struct Pair {
  vf even, odd;
};
static inline vf dot(vf sum, Pair w, const uint32_t* x) {
  float even, odd;
  uint32_t low = *x << 16, high = *x & 0xffff0000;
  std::memcpy(&even, &low, 4);
  std::memcpy(&odd, &high, 4);
  sum += w.even * even;
  return sum + w.odd * odd;
}
static inline Pair pair_of(vu bits) { return {(vf)(bits << 16), (vf)(bits & 0xffff0000)}; }
static inline Pair pair_of(vf even, vf odd) { return {even, odd}; }
#endif

}  // namespace GM_NS
