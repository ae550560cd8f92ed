// For x86-64 with AVX2 and FMA.
#include "api.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,fma,bmi2")
#define MOTET_HALF
#include "kernels.h"

namespace motet {
const Kernels AVX2 = kernels();
}
#endif
