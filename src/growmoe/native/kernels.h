// What every instruction set implements (kernels.inc, compiled once per level).
#pragma once
#include "growmoe_native.h"

namespace growmoe {

struct Kernels {
  int (*linear)(const gm_weight*, const float*, int64_t, float*, int64_t, int, int, int);
  int (*rms_norm)(const float*, const float*, float*, int, int, float, int);
  int (*route)(const gm_router_call*, int);
  int (*experts)(const gm_experts_call*, int);
  int (*combine)(const gm_combine_call*, int);
  int (*attention)(const gm_attention_call*, int);
  int (*layer)(const gm_layer_call*, int);
  int (*plain_experts)(const gm_plain_call*, int);
  double (*bandwidth)(const void*, int64_t, int);
};

extern const Kernels kernels_base, kernels_avx2, kernels_avx512, kernels_bf16;

}  // namespace growmoe
