// What the adapters of a batch add to the product of a linear: low-rank pairs with gates, scales and biases.
//
// Must not know: attention, layers. Rank rows are read where they lie in the arena, each row of the batch only those
// of its own adapter, at their true rank. The rank-r intermediate is
// rounded to the element once, after its gate.
#pragma once
#include "product.h"

namespace motet {
namespace {

constexpr int64_t NOBODY = -1;
constexpr int64_t MOST_LAYERED = 8;  // adapters of one row

// The effects of one call, with the segment of each row looked up once.
template <class E>
class Adapters {
 public:
  using Element = typename E::type;

  Adapters(Engine &engine, const Effects *effects, int64_t rows) : effects_(effects), rows_(rows) {
    if (effects == nullptr) return;
    tables_ = engine.buffer<int32_t>(Use::Segments, (effects->n_low_rank + 2) * rows);
    int32_t *table = tables_;
    for (int64_t i = 0; i < effects->n_low_rank; i++, table += rows) {
      const LowRank &one = effects->low_rank[i];
      note(table, one.segments, one.row_start, one.row_stop);
      offset_[i] = stride_;
      int32_t largest = 0;
      for (int64_t k = 0; k < effects->targets * one.segments; k++)
        largest = one.rank[k] > largest ? one.rank[k] : largest;
      stride_ += ceil_div(largest, E::PER_UNIT) * E::PER_UNIT;
    }
    for (const RowVectors *one : {effects->scales, effects->biases}) {
      if (one != nullptr) note(table, one->segments, one->row_start, one->row_stop);
      table += rows;
    }
  }

  // Elements of the intermediate of one row and one linear.
  int64_t width() const { return stride_; }

  bool reaches(const Linear &linear) const {
    for (int64_t i = 0; effects_ != nullptr && i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      for (int64_t s = 0; s < one.segments; s++)
        if (one.rank[linear.target * one.segments + s] > 0) return true;
    }
    return false;
  }

  // g ⊙ (A x) of rows start to stop, into shrunk[row · row_stride + …], zero up to a whole unit.
  void shrink(const Linear &linear, int64_t start, int64_t stop, const Element *x, Element *shrunk,
              int64_t row_stride) const {
    for (int64_t i = 0; i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      each_run(tables_ + i * rows_, one.row_stop, start, stop, [&](int64_t s, int64_t from, int64_t to) {
        const int64_t at = linear.target * one.segments + s, rank = one.rank[at];
        if (rank == 0) return;
        const Element *a = operand(one.a_first[at]);
        const float *factors[4];
        for (int64_t row = from; row < to;) {
          const int64_t together = to - row >= 4 ? 4 : 1;
          for (int64_t t = 0; t < together; t++)
            factors[t] = one.gate_of_row == nullptr ? nullptr
                : one.gate_factor + (linear.target * one.gates + one.gate_of_row[row + t]) * one.gate_width;
          Element *out = shrunk + row * row_stride + offset_[i];
          if (together == 4)
            dots<4>(a, rank, linear.in, x + row * linear.in, factors, out, row_stride);
          else
            dots<1>(a, rank, linear.in, x + row * linear.in, factors, out, row_stride);
          row += together;
        }
      });
    }
  }

  // Lists the parts of B that `finish` will read: short pieces far apart, which no hardware foresees. A segment's are
  // listed for its first rows only, since they stay near for the others.
  void want(const Linear &linear, const Tile &tile, Errands &errands) const {
    for (int64_t i = 0; effects_ != nullptr && i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      each_run(tables_ + i * rows_, one.row_stop, tile.row, tile.row + tile.rows, [&](int64_t s, int64_t from, int64_t) {
        if (from > one.row_start[s]) return;
        const int64_t at = linear.target * one.segments + s;
        const Element *piece = operand(one.b_first[at]) + tile.output;
        for (int64_t r = 0; r < one.rank[at]; r++, piece += linear.out) {
          errands.add(piece);
          errands.add(piece + tile.outputs - 1);
        }
      });
    }
  }

  // Turns a tile of W x into k ⊙ (W x + B s) + c + b.
  void finish(const Linear &linear, const Element *shrunk, int64_t row_stride, Tile &tile) const {
    if (effects_ != nullptr) {
      for (int64_t i = 0; shrunk != nullptr && i < effects_->n_low_rank; i++)
        expand(i, linear, shrunk, row_stride, tile);
      vectors(effects_->scales, 0, linear, tile, [](f32v y, f32v delta) { return y + y * delta; });
    }
    if (linear.bias != nullptr)
      for (int64_t i = 0; i < tile.outputs; i += LANES) {
        const f32v bias = load<f32v>(linear.bias + tile.output + i, tile.outputs - i);
        for (int64_t r = 0; r < tile.rows; r++) store(tile.at(r, i), load<f32v>(tile.at(r, i)) + bias);
      }
    if (effects_ != nullptr) vectors(effects_->biases, 1, linear, tile, [](f32v y, f32v bias) { return y + bias; });
  }

 private:
  void note(int32_t *table, int64_t segments, const int32_t *start, const int32_t *stop) const {
    for (int64_t row = 0; row < rows_; row++) table[row] = NOBODY;
    for (int64_t s = 0; s < segments; s++)
      for (int64_t row = start[s]; row < stop[s]; row++) table[row] = static_cast<int32_t>(s);
  }

  const Element *operand(int64_t first) const {
    return static_cast<const Element *>(effects_->arena) + first * effects_->unit;
  }

  // each(segment, first row, one past the last) for the parts of start…stop that lie in a segment.
  template <class Each>
  static MOTET_INLINE void each_run(const int32_t *table, const int32_t *row_stop, int64_t start, int64_t stop,
                                    Each each) {
    for (int64_t row = start; row < stop;) {
      const int64_t s = table[row], end = s == NOBODY ? row + 1 : least(stop, row_stop[s]);
      if (s != NOBODY) each(s, row, end);
      row = end;
    }
  }

  // out[row][r] = factor_r · A_r · x_row for ROWS rows and all rank rows.
  template <int ROWS>
  static void dots(const Element *a, int64_t rank, int64_t width, const Element *x, const float *const *factors,
                   Element *out, int64_t out_stride) {
    for (int64_t r = 0; r < rank;)
      r += ROWS == 1 && rank - r <= 8 ? dots_of<ROWS, 8>(a, r, rank, width, x, factors, out, out_stride)
                                      : dots_of<ROWS, LANES / ROWS>(a, r, rank, width, x, factors, out, out_stride);
  }

  // Up to RANKS rank rows from the first on, all sums at a time. Where fewer are left, the last is taken again.
  template <int ROWS, int RANKS>
  static int64_t dots_of(const Element *a, int64_t first, int64_t rank, int64_t width, const Element *x,
                         const float *const *factors, Element *out, int64_t out_stride) {
    const int64_t some = least(RANKS, rank - first), whole = ceil_div(some, E::PER_UNIT) * E::PER_UNIT;
    const Element *rank_rows[RANKS];
    for (int k = 0; k < RANKS; k++) rank_rows[k] = a + (first + least(k, some - 1)) * width;
    f32v sum[LANES] = {};
    each_vector<E>(width, [&](int64_t i, int64_t n) MOTET_ALWAYS {
      u32v input[ROWS];
#pragma GCC unroll 4
      for (int t = 0; t < ROWS; t++) input[t] = load<u32v>(x + t * width + i, n);
#pragma GCC unroll 16
      for (int k = 0; k < RANKS; k++) {
        const u32v rank_row = load<u32v>(rank_rows[k] + i, n);
#pragma GCC unroll 4
        for (int t = 0; t < ROWS; t++) sum[t * RANKS + k] = E::dot(sum[t * RANKS + k], input[t], rank_row);
      }
    });
    alignas(64) float values[LANES + LANES];
    store(values, sums_of(sum));
    for (int t = 0; t < ROWS; t++) {
      f32v row_sums = load<f32v>(values + t * RANKS, some);
      if (factors[t] != nullptr) row_sums *= load<f32v>(factors[t] + first, some);
      E::write(out + t * out_stride + first, row_sums, whole);
    }
    return RANKS;
  }

  void expand(int64_t i, const Linear &linear, const Element *shrunk, int64_t row_stride, Tile &tile) const {
    const LowRank &one = effects_->low_rank[i];
    const int32_t *table = tables_ + i * rows_;
    each_run(table, one.row_stop, tile.row, tile.row + tile.rows, [&](int64_t s, int64_t from, int64_t to) {
      const int64_t at = linear.target * one.segments + s, rank = one.rank[at];
      if (rank == 0) return;
      const Element *b = operand(one.b_first[at]) + tile.output;
      for (int64_t t = from; t < to;) {
        const Element *own = shrunk + t * row_stride + offset_[i];
        const int64_t r = t - tile.row, together = to - t >= 4 ? 4 : 1;
        if (tile.outputs < GROUP)
          for (int64_t o = 0; o < tile.outputs; o += LANES)
            for (int64_t k = 0; k < together; k++)
              add_rows<1, 1>(b + o, rank, linear.out, own + k * row_stride, row_stride, tile.at(r + k, o),
                             tile.outputs - o);
        else if (together == 4)
          add_rows<4, BLOCKS>(b, rank, linear.out, own, row_stride, tile.at(r, 0), GROUP);
        else
          add_rows<1, BLOCKS>(b, rank, linear.out, own, row_stride, tile.at(r, 0), GROUP);
        t += together;
      }
    });
  }

  // tile[row] += Σ_r shrunk[row][r] · B_r, B's rows being `stride` elements apart, for up to WIDE · 16 outputs.
  template <int ROWS, int WIDE>
  static void add_rows(const Element *b, int64_t rank, int64_t stride, const Element *shrunk, int64_t row_stride,
                       float *tile, int64_t outputs) {
    f32v sum[ROWS][WIDE];
    for (int t = 0; t < ROWS; t++)
      for (int w = 0; w < WIDE; w++) sum[t][w] = load<f32v>(tile + t * GROUP + w * LANES);
    for (int64_t r = 0; r < rank; r += E::PER_UNIT) {
      u32v rank_rows[WIDE];
      for (int w = 0; w < WIDE; w++)
        rank_rows[w] = E::side_by_side(b + r * stride + w * LANES, r + 1 < rank ? stride : 0,
                                       least(LANES, outputs - w * LANES));
      for (int t = 0; t < ROWS; t++) {
        uint32_t factor;
        std::memcpy(&factor, shrunk + t * row_stride + r, sizeof factor);
        for (int w = 0; w < WIDE; w++) sum[t][w] = E::dot(sum[t][w], u32v{} + factor, rank_rows[w]);
      }
    }
    for (int t = 0; t < ROWS; t++)
      for (int w = 0; w < WIDE; w++) store(tile + t * GROUP + w * LANES, sum[t][w]);
  }

  // y = change(y, the row's own vector) where a row has one.
  template <class Change>
  MOTET_INLINE void vectors(const RowVectors *vectors, int64_t which, const Linear &linear, Tile &tile,
                            Change change) const {
    if (vectors == nullptr) return;
    each_run(tables_ + (effects_->n_low_rank + which) * rows_, vectors->row_stop, tile.row, tile.row + tile.rows,
             [&](int64_t s, int64_t from, int64_t to) {
               const int64_t place = linear.target * vectors->segments + s;
               if (!vectors->present[place]) return;
               const Element *values = operand(vectors->first[place]) + tile.output;
               for (int64_t i = 0; i < tile.outputs; i += LANES) {
                 const f32v some = E::read(values + i, tile.outputs - i);
                 for (int64_t r = from - tile.row; r < to - tile.row; r++)
                   store(tile.at(r, i), change(load<f32v>(tile.at(r, i)), some));
               }
             });
  }

  const Effects *effects_;
  int64_t rows_;
  int32_t *tables_ = nullptr;
  int64_t stride_ = 0;
  int64_t offset_[MOST_LAYERED] = {};
};

// The intermediates of linears that read the same input, side by side: [rows, linears · width].
template <class E>
struct Shrunk {
  typename E::type *values = nullptr;
  int64_t width = 0, stride = 0;
  const typename E::type *of(int64_t position) const { return values == nullptr ? nullptr : values + position * width; }
};

template <class E, int N>
Shrunk<E> shrink_all(Engine &engine, const Adapters<E> &adapters, const Linear *const (&linears)[N], int64_t rows,
                     const typename E::type *x) {
  Shrunk<E> shrunk{nullptr, adapters.width(), N * adapters.width()};
  bool any = false;
  for (const Linear *linear : linears) any = any || adapters.reaches(*linear);
  if (!any) return shrunk;
  shrunk.values = engine.buffer<typename E::type>(Use::Shrunk, rows * shrunk.stride);
  const int64_t cut = rows < 64 ? ceil_div(rows, 8) : 8;
  parallel(engine.pool, ceil_div(rows, cut) * N, [&](int64_t chunk, int) {
    const int64_t position = chunk % N, start = chunk / N * cut;
    adapters.shrink(*linears[position], start, least(rows, start + cut), x, shrunk.values + position * shrunk.width,
                    shrunk.stride);
  });
  return shrunk;
}

}  // namespace
}  // namespace motet
