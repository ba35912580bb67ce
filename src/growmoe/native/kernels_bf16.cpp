#define GM_NS gm_bf16
#define GM_TABLE kernels_bf16
#include <ctime>

#include "kernels.inc"
