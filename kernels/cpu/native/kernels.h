// The table of a processor; included after its target was set.
#pragma once
#include "decoder.h"
#include "processor.h"

namespace motet {
namespace {

template <class E>
void step(Engine &engine, const Step &step) {
  Decoder<E>(engine, step).run();
}

constexpr Kernels kernels() {
  return {{step<Float>, step<Bfloat>}, {linear<Float>, linear<Bfloat>}, {low_rank<Float>, low_rank<Bfloat>}};
}

}  // namespace
}  // namespace motet
