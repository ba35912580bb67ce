// The C interface of growmoe's CPU kernels. Everything is float32 outside; weights are packed
// once (pack.cpp) in float32, bfloat16, int8 or int4.
//
// A row of any result is computed in one order that depends on nothing but the shapes of the
// weights, so it has the same bits alone and in any batch.
//
// Letters: T tokens, N outputs, K inputs, H query heads, G key/value heads, C head dim, E experts.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

enum gm_form { GM_FLOAT32 = 0, GM_BFLOAT16 = 1, GM_INT8 = 2, GM_INT4 = 3 };

// y = x W^T + bias; W [n,k] packed in panels of 32 outputs.
struct gm_weight {
  int32_t form, n, k, reserved;
  const void* data;
  const float* bias;  // [n] or null
};

enum gm_activation { GM_SWIGLU = 0, GM_GELU = 1 };

// One feed-forward expert. SwiGLU: `up` holds 16 gate rows, then their 16 up rows, per panel.
struct gm_expert {
  gm_weight up, down;
};

struct gm_experts_call {
  const float* x;         // [tokens, x_stride]
  int64_t x_stride;
  float* y;               // [tokens, hidden]
  const int32_t* chosen;  // [tokens, top_k], indices into experts
  const float* shares;    // [tokens, top_k]
  const gm_expert* const* experts;  // [count]
  int32_t tokens, top_k, count, activation;
  int32_t add, reserved;  // whether y is added to
};

// How a fixed expert (a residual or shared one, the last of the layer) shares with the routed ones.
enum gm_mix { GM_NO_FIXED = 0, GM_SUM = 1, GM_SIGMOID_GATE = 2, GM_SOFTMAX2 = 3 };

// What gm_experts does last, for rows that were computed in several calls.
struct gm_combine_call {
  const float* rows;    // [tokens, top_k, hidden]
  const float* shares;  // [tokens, top_k]
  float* y;             // [tokens, hidden]
  int32_t tokens, top_k, hidden, reserved;
};

// Experts in ordinary row-major weights: SwiGLU without biases, for few rows per expert.
struct gm_plain_call {
  const void* x;     // [tokens, hidden]; x, up and down all float32 or all bfloat16
  const void* up;    // [count, 2 width, hidden], gate rows first
  const void* down;  // [count, hidden, width]
  float* y;          // [tokens, hidden]
  const int32_t* chosen;  // [tokens, top_k]
  const float* shares;
  int32_t tokens, top_k, count, hidden, width, bfloat16;
};

struct gm_router_call {
  const float* x;  // [tokens, hidden]
  const gm_weight* router;  // float32 [E, hidden]
  const float* bias;        // [E] added to scores for the selection, or null
  float* logits;            // [tokens, E]
  float* scores;            // [tokens, E]
  const gm_weight* mix;     // float32 [1 or 2, hidden] for the last two kinds of gm_mix, else null
  int32_t* chosen;          // [tokens, top_k, and one more for a fixed expert, which is number E]
  float* shares;            // the same shape
  int32_t tokens, top_k, sigmoid, renormalize, mixing, groups, top_groups, reserved;
};

struct gm_attention_call {
  const float* qkv;      // [tokens, (H + 2G) C]
  const float* q_norm;   // [C] or null: RMS norm over each head
  const float* k_norm;
  const float* cosines;  // [tokens, C], or null: no rotary positions
  const float* sines;
  void* keys;            // [blocks, G, C, 16] float32 or bfloat16
  void* values;          // [blocks, G, 16, C]
  float* y;              // [tokens, H C]
  const int32_t* starts;  // [spans] position of the first new token
  const int32_t* counts;  // [spans] new tokens
  const int32_t* rows;    // [spans + 1] first row of each span
  const int32_t* tables;  // [spans, table_stride] block ids
  int32_t spans, table_stride, heads, kv_heads, head_dim, bfloat16_cache, window, reserved;
  float norm_eps;
};

// A whole layer: x + attention(norm(x)), then x + experts(norm(x)). The calls inside hold what does
// not change; their x, y, qkv, tokens, chosen and shares are set here.
struct gm_layer_call {
  const float* x;  // [tokens, hidden]
  float* y;
  const float *attn_norm, *mlp_norm;  // [hidden]
  const gm_weight *qkv, *o;
  gm_attention_call attention;
  gm_router_call router;  // no router: every token has expert 0
  gm_experts_call experts;
  int32_t tokens, hidden;
  float norm_eps;
  int32_t reserved;
};

// Changes with anything in this file, so that a library of an older checkout is not used.
enum { GM_VERSION = 2 };
int32_t gm_version();

// 0 baseline, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16
int32_t gm_best_level();
int32_t gm_level();
int32_t gm_set_level(int32_t level);  // returns the level in use

// Calls return 0, or 1 when there was no memory for their scratch. Head dims go up to 512.
int64_t gm_packed_bytes(int32_t form, int32_t n, int32_t k);
// `source`: float32 [n,k] (forms float32, bfloat16) or int8 [n,k] with bfloat16 scales [n, k/32]
void gm_pack(int32_t form, int32_t n, int32_t k, const void* source, const uint16_t* scales,
             void* packed, int32_t threads);

// float32 [n,k] to int8 [n,k] of 8 or 4 bits and bfloat16 [n, k/32]; 1: not all finite.
int32_t gm_quantize(const float* w, int32_t n, int32_t k, int32_t bits, int8_t* values,
                    uint16_t* scales, int32_t threads);

int32_t gm_linear(const gm_weight* w, const float* x, int64_t x_stride, float* y, int64_t y_stride,
               int32_t tokens, int32_t add, int32_t threads);
int32_t gm_rms_norm(const float* x, const float* weight, float* y, int32_t tokens, int32_t size,
                 float eps, int32_t threads);
int32_t gm_route(const gm_router_call* call, int32_t threads);
int32_t gm_experts(const gm_experts_call* call, int32_t threads);
int32_t gm_combine(const gm_combine_call* call, int32_t threads);
int32_t gm_attention(const gm_attention_call* call, int32_t threads);
int32_t gm_plain_experts(const gm_plain_call* call, int32_t threads);
int32_t gm_layer(const gm_layer_call* call, int32_t threads);

double gm_read_bandwidth(const void* memory, int64_t bytes, int32_t threads);  // bytes per second
}
#pragma GCC visibility pop
