#define GM_NS gm_base
#define GM_TABLE kernels_base
#include <ctime>

#include "kernels.inc"
