// For x86-64 with AVX-512 and its products of bfloat16 pairs.
#include "api.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,bmi2,prefer-vector-width=512")
#define MOTET_WIDE
#define MOTET_DOT_BF16
#include "kernels.h"

namespace motet {
const Kernels AVX512 = kernels();
}
#endif
