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

template <class E, int ROWS, int WIDE>
MOTET_INLINE void multiply(const uint32_t *x, int64_t stride, const uint32_t *packed, int64_t units, float *tile) {
  for (int64_t first = 0; first < units; first += CHAIN) {
    const int64_t stop = least(units, first + CHAIN);
    f32v sum[ROWS][WIDE] = {};
    for (int64_t u = first; u < stop; u++) {
      u32v weight[WIDE];
#pragma GCC unroll 3
      for (int w = 0; w < WIDE; w++) {
        weight[w] = load<u32v>(packed + (w * units + u) * LANES);
        __builtin_prefetch(packed + (w * units + u + AHEAD) * LANES);
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

template <class E, int WIDE>
void multiply_rows(int64_t rows, const uint32_t *x, int64_t stride, const uint32_t *packed, int64_t units,
                   float *tile) {
  switch (rows) {
    case 1: return multiply<E, 1, WIDE>(x, stride, packed, units, tile);
    case 2: return multiply<E, 2, WIDE>(x, stride, packed, units, tile);
#if defined(MOTET_WIDE) || defined(MOTET_HALF)
    case 3: return multiply<E, 3, WIDE>(x, stride, packed, units, tile);
    case 4: return multiply<E, 4, WIDE>(x, stride, packed, units, tile);
#endif
#if defined(MOTET_WIDE)
    case 5: return multiply<E, 5, WIDE>(x, stride, packed, units, tile);
    case 6: return multiply<E, 6, WIDE>(x, stride, packed, units, tile);
    case 7: return multiply<E, 7, WIDE>(x, stride, packed, units, tile);
    case 8: return multiply<E, 8, WIDE>(x, stride, packed, units, tile);
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

// Fills the tile in; x are the inputs of all rows.
template <class E>
void product(const Linear &linear, const typename E::type *x, Tile &tile) {
  const int64_t units = linear.in / E::PER_UNIT;
  const int64_t first = tile.output / LANES, blocks = ceil_div(tile.outputs, LANES);
  const void *inputs_at = x + tile.row * linear.in;
  const uint32_t *inputs = static_cast<const uint32_t *>(inputs_at);
  int64_t block = 0;
  for (; block + TOGETHER <= blocks; block += TOGETHER)
    multiply_rows<E, TOGETHER>(tile.rows, inputs, units, linear.packed + (first + block) * units * LANES, units,
                               tile.at(0, block * LANES));
  for (; block < blocks; block++)
    multiply_rows<E, 1>(tile.rows, inputs, units, linear.packed + (first + block) * units * LANES, units,
                        tile.at(0, block * LANES));
}

// Calls each(linear, tile) for all that linears of one input give, in parallel, and before that, once a chunk,
// ahead(linear, first row, one past the last, first output, outputs).
template <class E, int N, class Ahead, class Each>
void columns(Engine &engine, const Linear *const (&linears)[N], int64_t rows, const typename E::type *x, Ahead ahead,
             Each each) {
  if (rows == 0) return;
  int64_t groups = 0;
  for (const Linear *linear : linears) groups += ceil_div(linear->out, GROUP);
  // Few rows are one chunk, so that each weight is read once; many are cut, so that there is work for all threads.
  const int64_t most = rows <= 64 ? rows : least(256, ceil_div(ceil_div(rows, engine.pool.threads()), TILE) * TILE);
  const int64_t cuts = ceil_div(rows, most);
  parallel(engine.pool, groups * cuts, [&](int64_t chunk, int) {
    int64_t group = chunk / cuts, one = 0;
    while (group >= ceil_div(linears[one]->out, GROUP)) group -= ceil_div(linears[one++]->out, GROUP);
    const Linear &linear = *linears[one];
    const int64_t output = group * GROUP, outputs = least(GROUP, linear.out - output);
    const int64_t start = chunk % cuts * most, stop = least(rows, start + most);
    ahead(one, start, stop, output, outputs);
    for (int64_t row = start; row < stop; row += TILE) {
      Tile tile;
      tile.row = row, tile.rows = least(TILE, stop - row), tile.output = output, tile.outputs = outputs;
      product<E>(linear, x, tile);
      each(one, tile);
    }
  });
}

}  // namespace
}  // namespace motet
