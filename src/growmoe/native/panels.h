// M rows of activations times one panel of 32 outputs: the loop that everything else is built on.
//
// Every output adds up its inputs in the order of k, whatever M is. Layouts of a panel:
//   float32   [k][32]
//   bfloat16  [k/2][32][2]
//   int8      per group of 32 inputs: bfloat16 scales [32], then [16 pairs][2][even, odd][16]
//   int4      per group: bfloat16 scales [32], then [4][32] words of eight nibbles (value + 8):
//             the low half-word holds the even inputs of four pairs, the high one the odd ones
#pragma once
#include "vectors.h"

namespace GM_NS {

#if defined(__AVX512F__)
constexpr int ROWS = 12, ROWS_INT8 = 6, ROWS_INT4 = 4;  // rows that fit the registers
#elif defined(__AVX2__)
constexpr int ROWS = 3, ROWS_INT8 = 1, ROWS_INT4 = 1;
#else
constexpr int ROWS = 1, ROWS_INT8 = 1, ROWS_INT4 = 1;
#endif
constexpr int most_rows(int form) {
  return form == GM_INT4 ? ROWS_INT4 : form == GM_INT8 ? ROWS_INT8 : ROWS;
}

// Rows at a time when there are `rows` in all: as even as can be.
static inline int even_rows(int form, int rows) {
  int most = most_rows(form), passes = (rows + most - 1) / most;
  return passes ? (rows + passes - 1) / passes : 1;
}

static inline int padded(int k) { return (k + GROUP - 1) / GROUP * GROUP; }

constexpr int64_t kInt8Group = 2 * PANEL + PANEL * GROUP;
constexpr int64_t kInt4Group = 2 * PANEL + PANEL * GROUP / 2;

static inline int64_t panel_bytes(int form, int k) {
  switch (form) {
    case GM_FLOAT32: return 4LL * PANEL * k;
    case GM_BFLOAT16: return 2LL * PANEL * ((k + 1) / 2 * 2);
    case GM_INT8: return padded(k) / GROUP * kInt8Group;
    default: return padded(k) / GROUP * kInt4Group;
  }
}

// Where a step is long (several rows, or integers to unpack) the processor does not run ahead of it
// far enough by itself. Weights of one tensor follow each other: what lies ahead is what comes next.
template <int M, bool INTEGERS = false>
static inline void fetch(const char* w, int bytes) {
  if constexpr (M > 2 || INTEGERS)
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(w + i + 8192);
}

// x[m]: a row, float32 for float32 weights, else bfloat16 in pairs with zeros up to padded(k)
template <int M>
static inline void panel_float32(const char* w, const void* const* x, int k, vf (&acc)[M][V]) {
  const float* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = static_cast<const float*>(x[m]);
#pragma GCC unroll 4
  for (int i = 0; i < k; ++i) {
    vf values[V];
    fetch<M>(w + i * PANEL * 4LL, PANEL * 4);
    for (int v = 0; v < V; ++v) values[v] = load<vf>(w + (i * PANEL + v * W) * 4LL);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] += values[v] * rows[m][i];
  }
}

template <int M>
static inline void panel_bfloat16(const char* w, const void* const* x, int k, vf (&acc)[M][V]) {
  const uint32_t* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = static_cast<const uint32_t*>(x[m]);
  int pairs = (k + 1) / 2;
#pragma GCC unroll 4
  for (int i = 0; i < pairs; ++i) {
    Pair values[V];
    fetch<M>(w + i * PANEL * 4LL, PANEL * 4);
    for (int v = 0; v < V; ++v) values[v] = pair_of(load<vu>(w + (i * PANEL + v * W) * 4LL));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = dot(acc[m][v], values[v], rows[m] + i);
  }
}

// The scales come after the sum over a group, and a group has two sums: products wait for each other
// in short chains only.
template <int M>
static inline void add_group(const char* scales, const vf (&sums)[2][M][V], vf (&acc)[M][V]) {
  for (int v = 0; v < V; ++v) {
    vf scale = widen(load<vh>(scales + 2 * v * W));
    for (int m = 0; m < M; ++m) acc[m][v] += (sums[0][m][v] + sums[1][m][v]) * scale;
  }
}

template <int M>
static inline void panel_int8(const char* w, const void* const* x, int k, vf (&acc)[M][V]) {
  const uint32_t* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = static_cast<const uint32_t*>(x[m]);
  for (int group = 0; group < padded(k) / GROUP; ++group, w += kInt8Group) {
    vf sums[2][M][V] = {};
    fetch<M, true>(w, kInt8Group);
    const char* place = w + 2 * PANEL;
#pragma GCC unroll 2
    for (int i = 0; i < GROUP / 2; i += 2) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j, place += 64) {
        Pair values[V];
        for (int v = 0; v < V; ++v) {
          const char* bytes = place + v * W / 16 * 32 + v * W % 16;
          values[v] = pair_of(from_bytes(bytes), from_bytes(bytes + 16));
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < V; ++v)
            sums[j][m][v] =
                dot(sums[j][m][v], values[v], rows[m] + group * (GROUP / 2) + i + j);
      }
    }
    add_group<M>(w, sums, acc);
  }
}

#if defined(__AVX512BF16__)
// -8..7 as bfloat16, twice, because the lookup takes five bits and the fifth belongs to a neighbour
static inline __m512i nibble_table() {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = narrow(static_cast<float>((i & 15) - 8));
  return _mm512_load_si512(table);
}
#endif

template <int M>
static inline void panel_int4(const char* w, const void* const* x, int k, vf (&acc)[M][V]) {
  const uint32_t* rows[M];
  for (int m = 0; m < M; ++m) rows[m] = static_cast<const uint32_t*>(x[m]);
#if defined(__AVX512BF16__)
  const __m512i table = nibble_table();
#endif
  for (int group = 0; group < padded(k) / GROUP; ++group, w += kInt4Group) {
    vf sums[2][M][V] = {};
    fetch<M, true>(w, kInt4Group);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      vu words[V];
      for (int v = 0; v < V; ++v) words[v] = load<vu>(w + 2 * PANEL + (q * PANEL + v * W) * 4LL);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Pair values[V];
        for (int v = 0; v < V; ++v) {
#if defined(__AVX512BF16__)
          values[v] = _mm512_permutexvar_epi16((__m512i)(words[v] >> (4 * j)), table);
#else
          vf even = __builtin_convertvector((vi)(words[v] >> (4 * j) & 15) - 8, vf);
          vf odd = __builtin_convertvector((vi)(words[v] >> (16 + 4 * j) & 15) - 8, vf);
          values[v] = pair_of(even, odd);
#endif
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < V; ++v)
            sums[j % 2][m][v] =
                dot(sums[j % 2][m][v], values[v], rows[m] + group * (GROUP / 2) + 4 * q + j);
      }
    }
    add_group<M>(w, sums, acc);
  }
}

template <int M>
static inline void panel_of(int form, const char* w, const void* const* x, int k,
                            float (*out)[PANEL]) {
  vf acc[M][V] = {};
  if (form == GM_FLOAT32) panel_float32<M>(w, x, k, acc);
  if (form == GM_BFLOAT16) panel_bfloat16<M>(w, x, k, acc);
  if constexpr (M <= ROWS_INT8)
    if (form == GM_INT8) panel_int8<M>(w, x, k, acc);
  if constexpr (M <= ROWS_INT4)
    if (form == GM_INT4) panel_int4<M>(w, x, k, acc);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(&out[m][v * W], acc[m][v]);
}

// `m` rows, at most most_rows(form)
template <int M = ROWS>
static inline void panel(int form, const char* w, const void* const* x, int m, int k,
                         float (*out)[PANEL]) {
  if (m == M) {
    panel_of<M>(form, w, x, k, out);
  } else if constexpr (M > 1) {
    panel<M - 1>(form, w, x, m, k, out);
  }
}

}  // namespace GM_NS
