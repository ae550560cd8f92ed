// What the adapters of a batch add to the product of a linear: low-rank pairs with gates, scales and biases.
//
// Must not know: attention, layers. Rank rows are read where they lie in the arena, each row of the batch only those
// of its own adapter, at their true rank. The rank-r intermediate stays in float32.
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
      for (int64_t k = 0; k < effects->targets * one.segments; k++) largest = one.rank[k] > largest ? one.rank[k] : largest;
      stride_ += largest;
    }
    for (const RowVectors *one : {effects->scales, effects->biases}) {
      if (one != nullptr) note(table, one->segments, one->row_start, one->row_stop);
      table += rows;
    }
  }

  // Floats of the intermediate of one row and one linear.
  int64_t width() const { return stride_; }

  bool reaches(const Linear &linear) const {
    for (int64_t i = 0; effects_ != nullptr && i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      for (int64_t s = 0; s < one.segments; s++)
        if (one.rank[linear.target * one.segments + s] > 0) return true;
    }
    return false;
  }

  // g ⊙ (A x) of rows start to stop, into shrunk[row · row_stride + …].
  void shrink(const Linear &linear, int64_t start, int64_t stop, const Element *x, float *shrunk,
              int64_t row_stride) const {
    for (int64_t i = 0; i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      each_run(tables_ + i * rows_, one.row_stop, start, stop, [&](int64_t s, int64_t from, int64_t to) {
        const int64_t at = linear.target * one.segments + s, rank = one.rank[at];
        if (rank == 0) return;
        const Element *a = operand(one.a_first[at]);
        int64_t row = from;
        for (; row + 4 <= to; row += 4) dots<4>(a, rank, linear.in, x + row * linear.in, shrunk + row * row_stride + offset_[i], row_stride);
        for (; row < to; row++) dots<1>(a, rank, linear.in, x + row * linear.in, shrunk + row * row_stride + offset_[i], row_stride);
        if (one.gate_of_row == nullptr) return;
        for (row = from; row < to; row++) {
          const float *factor = one.gate_factor + (linear.target * one.gates + one.gate_of_row[row]) * one.gate_width;
          float *values = shrunk + row * row_stride + offset_[i];
          for (int64_t r = 0; r < rank; r++) values[r] *= factor[r];
        }
      });
    }
  }

  // Asks for the parts of B that `finish` will read: short pieces far apart, which no hardware foresees.
  void fetch(const Linear &linear, int64_t start, int64_t stop, int64_t output, int64_t outputs) const {
    for (int64_t i = 0; effects_ != nullptr && i < effects_->n_low_rank; i++) {
      const LowRank &one = effects_->low_rank[i];
      each_run(tables_ + i * rows_, one.row_stop, start, stop, [&](int64_t s, int64_t, int64_t) {
        const int64_t at = linear.target * one.segments + s;
        for (int64_t r = 0; r < one.rank[at]; r++) {
          const Element *piece = operand(one.b_first[at]) + r * linear.out + output;
          __builtin_prefetch(piece);
          __builtin_prefetch(piece + outputs - 1);
        }
      });
    }
  }

  // Turns a tile of W x into k ⊙ (W x + B s) + c + b.
  void finish(const Linear &linear, const float *shrunk, int64_t row_stride, int64_t row, int64_t n, float *tile,
              int64_t output, int64_t outputs) const {
    if (effects_ != nullptr) {
      if (shrunk != nullptr)
        for (int64_t i = 0; i < effects_->n_low_rank; i++) expand(i, linear, shrunk, row_stride, row, n, tile, output, outputs);
      vectors(effects_->scales, 0, linear, row, n, output, outputs, [&](int64_t r, int64_t at, f32v delta) {
        float *y = tile + r * GROUP + at;
        const f32v before = load<f32v>(y);
        store(y, before + before * delta);
      });
    }
    if (linear.bias != nullptr)
      for (int64_t at = 0; at < outputs; at += LANES) {
        const f32v bias = load<f32v>(linear.bias + output + at, least(LANES, outputs - at));
        for (int64_t r = 0; r < n; r++) store(tile + r * GROUP + at, load<f32v>(tile + r * GROUP + at) + bias);
      }
    if (effects_ != nullptr)
      vectors(effects_->biases, 1, linear, row, n, output, outputs, [&](int64_t r, int64_t at, f32v bias) {
        float *y = tile + r * GROUP + at;
        store(y, load<f32v>(y) + bias);
      });
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
  static MOTET_INLINE void each_run(const int32_t *table, const int32_t *row_stop, int64_t start, int64_t stop, Each each) {
    for (int64_t row = start; row < stop;) {
      const int64_t s = table[row], end = s == NOBODY ? row + 1 : least(stop, row_stop[s]);
      if (s != NOBODY) each(s, row, end);
      row = end;
    }
  }

  // out[row][r] = A_r · x_row for ROWS rows and all rank rows, four at a time.
  template <int ROWS>
  static void dots(const Element *a, int64_t rank, int64_t width, const Element *x, float *out, int64_t out_stride) {
    int64_t r = 0;
    for (; r + 4 <= rank; r += 4) some_dots<ROWS, 4>(a + r * width, width, x, out + r, out_stride);
    for (; r < rank; r++) some_dots<ROWS, 1>(a + r * width, width, x, out + r, out_stride);
  }

  template <int ROWS, int RANKS>
  static MOTET_INLINE void some_dots(const Element *a, int64_t width, const Element *x, float *out, int64_t out_stride) {
    constexpr int64_t STEP = LANES * E::PER_UNIT;
    f32v sum[ROWS][RANKS];
    for (int t = 0; t < ROWS; t++)
      for (int r = 0; r < RANKS; r++) sum[t][r] = f32v{};
    for (int64_t i = 0; i < width; i += STEP) {
      const int64_t n = least(LANES, (width - i) / E::PER_UNIT);
      u32v input[ROWS];
      for (int t = 0; t < ROWS; t++) input[t] = load<u32v>(x + t * width + i, n);
      for (int r = 0; r < RANKS; r++) {
        const u32v rank_row = load<u32v>(a + r * width + i, n);
        for (int t = 0; t < ROWS; t++) sum[t][r] = E::dot(sum[t][r], input[t], rank_row);
      }
    }
    for (int t = 0; t < ROWS; t++)
      for (int r = 0; r < RANKS; r++) out[t * out_stride + r] = sum_of(sum[t][r]);
  }

  void expand(int64_t i, const Linear &linear, const float *shrunk, int64_t row_stride, int64_t row, int64_t n,
              float *tile, int64_t output, int64_t outputs) const {
    const LowRank &one = effects_->low_rank[i];
    each_run(tables_ + i * rows_, one.row_stop, row, row + n, [&](int64_t s, int64_t from, int64_t to) {
      const int64_t at = linear.target * one.segments + s, rank = one.rank[at];
      if (rank == 0) return;
      const Element *b = operand(one.b_first[at]) + output;
      int64_t t = from;
      for (; t + 4 <= to; t += 4)
        add_rows<4>(b, rank, linear.out, shrunk + t * row_stride + offset_[i], row_stride, tile + (t - row) * GROUP, outputs);
      for (; t < to; t++)
        add_rows<1>(b, rank, linear.out, shrunk + t * row_stride + offset_[i], row_stride, tile + (t - row) * GROUP, outputs);
    });
  }

  // tile[row] += Σ_r shrunk[row][r] · B_r, B's rows being `stride` elements apart.
  template <int ROWS>
  static void add_rows(const Element *b, int64_t rank, int64_t stride, const float *shrunk, int64_t row_stride,
                       float *tile, int64_t outputs) {
    for (int64_t at = 0; at < outputs; at += LANES) {
      const int64_t n = least(LANES, outputs - at);
      f32v sum[ROWS];
      for (int t = 0; t < ROWS; t++) sum[t] = load<f32v>(tile + t * GROUP + at);
      for (int64_t r = 0; r < rank; r++) {
        const f32v rank_row = E::read(b + r * stride + at, n);
        for (int t = 0; t < ROWS; t++) sum[t] += rank_row * shrunk[t * row_stride + r];
      }
      for (int t = 0; t < ROWS; t++) store(tile + t * GROUP + at, sum[t]);
    }
  }

  template <class Each>
  MOTET_INLINE void vectors(const RowVectors *vectors, int64_t which, const Linear &linear, int64_t row, int64_t n,
                            int64_t output, int64_t outputs, Each each) const {
    if (vectors == nullptr) return;
    each_run(tables_ + (effects_->n_low_rank + which) * rows_, vectors->row_stop, row, row + n,
             [&](int64_t s, int64_t from, int64_t to) {
               const int64_t place = linear.target * vectors->segments + s;
               if (!vectors->present[place]) return;
               const Element *values = operand(vectors->first[place]) + output;
               for (int64_t at = 0; at < outputs; at += LANES) {
                 const f32v some = E::read(values + at, least(LANES, outputs - at));
                 for (int64_t t = from; t < to; t++) each(t - row, at, some);
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
  float *values = nullptr;
  int64_t width = 0, stride = 0;
  const float *of(int64_t position) const { return values == nullptr ? nullptr : values + position * width; }
};

template <class E, int N>
Shrunk<E> shrink_all(Engine &engine, const Adapters<E> &adapters, const Linear *const (&linears)[N], int64_t rows,
                     const typename E::type *x) {
  Shrunk<E> shrunk{nullptr, adapters.width(), N * adapters.width()};
  bool any = false;
  for (const Linear *linear : linears) any = any || adapters.reaches(*linear);
  if (!any) return shrunk;
  shrunk.values = engine.buffer<float>(Use::Shrunk, rows * shrunk.stride);
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
