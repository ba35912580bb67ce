#define GM_NS gm_avx2
#define GM_TABLE kernels_avx2
#include <ctime>

#include "kernels.inc"
