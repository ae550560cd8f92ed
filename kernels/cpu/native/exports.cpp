// The functions Python calls; which processor's code they run is chosen once, by the engine.
#include "api.h"
#include "pool.h"
#include "processor.h"

#include <new>

using namespace motet;

namespace {

struct Native : Engine {
  Native(int threads, const Kernels &kernels) : Engine(threads), kernels(kernels) {}
  const Kernels &kernels;
};

const Kernels *known(int processor) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (processor == 2 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return &AVX512;
  if (processor == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    return &AVX2;
#endif
  return processor == 0 ? &PLAIN : nullptr;
}

}  // namespace

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

// Of all structs together: whoever fills them in differently must find out.
EXPORTED int64_t motet_layout() {
  return sizeof(Linear) + 100 * sizeof(Layer) + 10000 * sizeof(Model) + 1000000 * sizeof(LowRank) +
         100000000 * sizeof(RowVectors) + 10000000000 * sizeof(Effects) + 1000000000000 * sizeof(Step);
}

// 0 any, 1 AVX2, 2 AVX-512 with bfloat16; whether this machine runs it.
EXPORTED int motet_runs_on(int processor) { return known(processor) != nullptr; }

EXPORTED void *motet_new(int threads, int processor) {
  const Kernels *kernels = known(processor);
  return kernels == nullptr ? nullptr : new (std::nothrow) Native(threads, *kernels);
}

EXPORTED void motet_free(void *engine) { delete static_cast<Native *>(engine); }

// NaN in both types, so that a test sees what was read before it was written.
EXPORTED void motet_poison(void *engine) {
  for (Buffer &buffer : static_cast<Native *>(engine)->buffers) buffer.fill(0xff);
}

EXPORTED void motet_step(void *engine, int bfloat, const Step *step) {
  auto &native = *static_cast<Native *>(engine);
  const std::lock_guard<std::mutex> hold(native.lock);
  native.kernels.step[bfloat](native, *step);
}

EXPORTED void motet_linear(void *engine, int bfloat, const Linear *linear, int64_t rows, const void *x, void *y) {
  auto &native = *static_cast<Native *>(engine);
  const std::lock_guard<std::mutex> hold(native.lock);
  native.kernels.linear[bfloat](native, *linear, rows, x, y);
}

EXPORTED void motet_low_rank(void *engine, int bfloat, const Effects *effects, const Linear *linear, int64_t rows,
                             const void *x, void *y) {
  auto &native = *static_cast<Native *>(engine);
  const std::lock_guard<std::mutex> hold(native.lock);
  native.kernels.low_rank[bfloat](native, *effects, *linear, rows, x, y);
}
}
