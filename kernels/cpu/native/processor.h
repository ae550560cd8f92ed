// What one processor's code offers; each of plain.cpp, avx2.cpp and avx512.cpp defines one.
#pragma once
#include "api.h"
#include "pool.h"

namespace motet {

// [0] for float32, [1] for bfloat16.
struct Kernels {
  void (*step[2])(Engine &, const Step &);
  void (*linear[2])(Engine &, const Linear &, int64_t rows, const void *x, void *y);
  void (*low_rank[2])(Engine &, const Effects &, const Linear &, int64_t rows, const void *x, void *y);
};

extern const Kernels PLAIN, AVX2, AVX512;

}  // namespace motet
