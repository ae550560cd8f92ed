// Products of rows with a packed weight.
//
// Must not know: adapters, what a product is for. Each output is one sum over the inputs in ascending order, however
// the rows are tiled: a row's result does not depend on its neighbours, to the bit.
#pragma once
#include "api.h"
#include "pool.h"
#include "vector.h"

namespace motet {
namespace {

constexpr int BLOCKS = 3;                   // of 16 outputs, computed together
constexpr int GROUP = BLOCKS * LANES;       // outputs
#if defined(MOTET_WIDE)
constexpr int TILE = 8;  // rows; 24 sums, 3 weights and an input fill 28 of 32 registers
constexpr int TOGETHER = BLOCKS;
#elif defined(MOTET_HALF)
constexpr int TILE = 4;  // a block is two registers of 16
constexpr int TOGETHER = 1;
#else
constexpr int TILE = 2;
constexpr int TOGETHER = 1;
#endif

// Units in one running sum. Sums of sums lose less than one long sum: rounding grows with the length of the chain.
constexpr int64_t CHAIN = 96;

// Units between the weights in use and those asked for: memory answers in about the time of so many.
constexpr int64_t AHEAD = 32;

template <class Function>
MOTET_INLINE void parallel(Pool &pool, int64_t chunks, Function function) {
  pool.run(
      chunks, [](void *context, int64_t chunk, int thread) { (*static_cast<Function *>(context))(chunk, thread); },
      &function);
}

// Packed weights as they are, and in int8.
struct Wide {
  const uint32_t *from;
  MOTET_INLINE u32v at(int64_t i) const { return load<u32v>(from + i); }
  MOTET_INLINE void fetch(int64_t i) const { __builtin_prefetch(from + i); }
  MOTET_INLINE Wide after(int64_t i) const { return {from + i}; }
};

template <class E>
struct Narrow {
  const int8_t *from;
  MOTET_INLINE u32v at(int64_t i) const { return E::widen(from + i * E::PER_UNIT); }
  MOTET_INLINE void fetch(int64_t i) const { __builtin_prefetch(from + (i + AHEAD * LANES) * E::PER_UNIT); }
  MOTET_INLINE Narrow after(int64_t i) const { return {from + i * E::PER_UNIT}; }
};

// What memory is asked for while a product computes, so that neither waits for the other.
class Errands {
 public:
  MOTET_INLINE void add(const void *line) {
    if (count_ < MOST) lines_[count_++] = line;
  }

  // As many of them as leave an even share for each of the calls that are left, this one included.
  MOTET_INLINE void run(int64_t calls) {
    const int64_t stop = done_ + ceil_div(count_ - done_, calls);
    for (; done_ < stop; done_++) __builtin_prefetch(lines_[done_]);
  }

 private:
  static constexpr int64_t MOST = 768;
  int64_t count_ = 0, done_ = 0;
  const void *lines_[MOST];
};

template <class E, int ROWS, int WIDE, class Source>
MOTET_INLINE void multiply(const uint32_t *x, int64_t stride, Source packed, int64_t units, float *tile,
                           Errands &errands) {
  for (int64_t first = 0; first < units; first += CHAIN) {
    const int64_t stop = least(units, first + CHAIN);
    errands.run(ceil_div(units - first, CHAIN));
    f32v sum[ROWS][WIDE] = {};
    for (int64_t u = first; u < stop; u++) {
      u32v weight[WIDE];
#pragma GCC unroll 3
      for (int w = 0; w < WIDE; w++) {
        weight[w] = packed.at((w * units + u) * LANES);
        packed.fetch((w * units + u + AHEAD) * LANES);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const u32v input = u32v{} + x[r * stride + u];
#pragma GCC unroll 3
        for (int w = 0; w < WIDE; w++) sum[r][w] = E::dot(sum[r][w], input, weight[w]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (int w = 0; w < WIDE; w++) {
        float *total = tile + r * GROUP + w * LANES;
        store(total, first == 0 ? sum[r][w] : load<f32v>(total) + sum[r][w]);
      }
  }
}

template <class E, int WIDE, class Source>
void multiply_rows(int64_t rows, const uint32_t *x, int64_t stride, Source packed, int64_t units, float *tile,
                   Errands &errands) {
  switch (rows) {
    case 1: return multiply<E, 1, WIDE>(x, stride, packed, units, tile, errands);
    case 2: return multiply<E, 2, WIDE>(x, stride, packed, units, tile, errands);
#if defined(MOTET_WIDE) || defined(MOTET_HALF)
    case 3: return multiply<E, 3, WIDE>(x, stride, packed, units, tile, errands);
    case 4: return multiply<E, 4, WIDE>(x, stride, packed, units, tile, errands);
#endif
#if defined(MOTET_WIDE)
    case 5: return multiply<E, 5, WIDE>(x, stride, packed, units, tile, errands);
    case 6: return multiply<E, 6, WIDE>(x, stride, packed, units, tile, errands);
    case 7: return multiply<E, 7, WIDE>(x, stride, packed, units, tile, errands);
    case 8: return multiply<E, 8, WIDE>(x, stride, packed, units, tile, errands);
#endif
  }
}

// What a linear gives for up to TILE rows and GROUP outputs, on its way to where it belongs.
struct Tile {
  int64_t row, rows, output, outputs;
  alignas(64) float sums[TILE * GROUP];
  MOTET_INLINE float *at(int64_t r, int64_t i) { return sums + r * GROUP + i; }
  MOTET_INLINE const float *at(int64_t r, int64_t i) const { return sums + r * GROUP + i; }
};

// Weights of a group of outputs as products read them: the wide ones, or where there are none those in int8.
struct Group {
  const uint32_t *wide;
  const int8_t *narrow;
};

// Where products find weights. Those in int8 are widened once for many rows, and as they are read for few.
template <class E>
class Weights {
 public:
  // Room for every thread to widen one group of any of the linears.
  template <int N>
  Weights(Engine &engine, Use use, const Linear *const (&linears)[N]) {
    for (const Linear *linear : linears)
      if (linear->scale != nullptr && linear->in / E::PER_UNIT * GROUP > room_) room_ = linear->in / E::PER_UNIT * GROUP;
    if (room_ > 0) widened_ = engine.buffer<uint32_t>(use, engine.pool.threads() * room_);
  }

  // Of the group that begins with an output, until the thread asks for another.
  Group of(const Linear &linear, int64_t output, int64_t outputs, int64_t rows, int thread) const {
    const int64_t units = linear.in / E::PER_UNIT, first = output / LANES * units * LANES;
    if (linear.scale == nullptr) return {linear.packed + first, nullptr};
    const void *packed = linear.packed;
    const Narrow<E> narrow{static_cast<const int8_t *>(packed) + first * E::PER_UNIT};
    if (rows <= TILE) return {nullptr, narrow.from};
    uint32_t *wide = widened_ + thread * room_;
    for (int64_t i = 0; i < ceil_div(outputs, LANES) * units * LANES; i += LANES) {
      narrow.fetch(i + 3 * AHEAD * LANES);
      store(wide + i, narrow.at(i));
    }
    return {wide, nullptr};
  }

 private:
  int64_t room_ = 0;
  uint32_t *widened_ = nullptr;
};

template <class E, class Source>
void product_of(const Linear &linear, Source weights, const typename E::type *x, Tile &tile, Errands &errands) {
  const int64_t units = linear.in / E::PER_UNIT, blocks = ceil_div(tile.outputs, LANES);
  const void *inputs_at = x + tile.row * linear.in;
  const uint32_t *inputs = static_cast<const uint32_t *>(inputs_at);
  int64_t block = 0;
  for (; block + TOGETHER <= blocks; block += TOGETHER)
    multiply_rows<E, TOGETHER>(tile.rows, inputs, units, weights.after(block * units * LANES), units,
                               tile.at(0, block * LANES), errands);
  for (; block < blocks; block++)
    multiply_rows<E, 1>(tile.rows, inputs, units, weights.after(block * units * LANES), units,
                        tile.at(0, block * LANES), errands);
}

// Fills the tile in; x are the inputs of all rows, weights those of the tile's outputs.
template <class E>
void product(const Linear &linear, const Group &weights, const typename E::type *x, Tile &tile,
             Errands &errands) {
  if (weights.wide != nullptr)
    product_of<E>(linear, Wide{weights.wide}, x, tile, errands);
  else
    product_of<E>(linear, Narrow<E>{weights.narrow}, x, tile, errands);
  if (linear.scale == nullptr) return;
  for (int64_t i = 0; i < tile.outputs; i += LANES) {
    const f32v scale = load<f32v>(linear.scale + tile.output + i, tile.outputs - i);
    for (int64_t r = 0; r < tile.rows; r++) store(tile.at(r, i), load<f32v>(tile.at(r, i)) * scale);
  }
}

// Calls each(linear, tile, what) for all that linears of one input give, in parallel. `what` is what
// ahead(linear, first row, one past the last, first output, outputs, thread) gave, which is called before, once a chunk.
template <class E, int N, class Ahead, class Wants, class Each>
void columns(Engine &engine, const Linear *const (&linears)[N], int64_t rows, const typename E::type *x, Ahead ahead,
             Wants wants, Each each) {
  if (rows == 0) return;
  const Weights<E> weights(engine, Use::Widened, linears);
  int64_t groups = 0;
  for (const Linear *linear : linears) groups += ceil_div(linear->out, GROUP);
  // Few rows are one chunk, so that each weight is read once; many are cut, so that there is work for all threads.
  const int64_t most = rows <= 64 ? rows : least(256, ceil_div(ceil_div(rows, engine.pool.threads()), TILE) * TILE);
  const int64_t cuts = ceil_div(rows, most);
  parallel(engine.pool, groups * cuts, [&](int64_t chunk, int thread) {
    int64_t group = chunk / cuts, one = 0;
    while (group >= ceil_div(linears[one]->out, GROUP)) group -= ceil_div(linears[one++]->out, GROUP);
    const Linear &linear = *linears[one];
    const int64_t output = group * GROUP, outputs = least(GROUP, linear.out - output);
    const int64_t start = chunk % cuts * most, stop = least(rows, start + most);
    const auto what = ahead(one, start, stop, output, outputs, thread);
    const Group own = weights.of(linear, output, outputs, stop - start, thread);
    for (int64_t row = start; row < stop; row += TILE) {
      Tile tile;
      tile.row = row, tile.rows = least(TILE, stop - row), tile.output = output, tile.outputs = outputs;
      Errands errands;
      wants(one, tile, errands);
      product<E>(linear, own, x, tile, errands);
      each(one, tile, what);
    }
  });
}

}  // namespace
}  // namespace motet
