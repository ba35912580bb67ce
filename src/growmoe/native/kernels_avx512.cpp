#define GM_NS gm_avx512
#define GM_TABLE kernels_avx512
#include <ctime>

#include "kernels.inc"
