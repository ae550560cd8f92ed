// One step of a decoder of Llama's shape, and single products for all other bases.
//
// Must not know: which model it is, text, how logits become tokens. The residual stream stays in float32; what a
// product reads is rounded to the element once.
#pragma once
#include "adapters.h"
#include "attention.h"

namespace motet {
namespace {

constexpr auto nothing = [](int64_t, int64_t, int64_t, int64_t, int64_t, int) { return 0; };
constexpr auto no_errands = [](int64_t, const Tile &, Errands &) {};

// x · rsqrt(mean(x²) + eps) ⊙ weight
template <class E>
void normalise(const float *x, const float *weight, int64_t width, double eps, typename E::type *out) {
  f32v squares{};
  for (int64_t i = 0; i < width; i += LANES) {
    const f32v some = load<f32v>(x + i, width - i);
    squares += some * some;
  }
  const float mean = sum_of(squares) / static_cast<float>(width) + static_cast<float>(eps);
  const float factor = 1.f / __builtin_sqrtf(mean);
  for (int64_t i = 0; i < width; i += LANES)
    E::write(out + i, load<f32v>(x + i, width - i) * factor * load<f32v>(weight + i, width - i), width - i);
}

// Writes a tile to its place in [rows, width].
template <class E>
MOTET_INLINE void write_tile(typename E::type *y, int64_t width, const Tile &tile) {
  for (int64_t r = 0; r < tile.rows; r++)
    for (int64_t i = 0; i < tile.outputs; i += LANES)
      E::write(y + (tile.row + r) * width + tile.output + i, load<f32v>(tile.at(r, i)), tile.outputs - i);
}

template <class E>
class Decoder {
 public:
  using Element = typename E::type;

  Decoder(Engine &engine, const Step &step)
      : engine_(engine), step_(step), model_(*step.model), rows_(step.rows), adapters_(engine, step.effects, step.rows),
        attention_(engine, model_, step) {
    const Layer &layer = model_.layers[0];
    query_ = engine.buffer<Element>(Use::Query, rows_ * layer.q.out);
    attended_ = engine.buffer<Element>(Use::Attended, rows_ * layer.q.out);
    activated_ = engine.buffer<Element>(Use::Activated, rows_ * layer.gate.out);
    projected_ = engine.buffer<float>(Use::Projected, rows_ * (layer.q.out + layer.k.out + layer.v.out));
    normed_ = engine.buffer<Element>(Use::Normed, rows_ * model_.hidden);
    hidden_ = engine.buffer<float>(Use::Hidden, rows_ * model_.hidden);
  }

  void run() {
    const Element *embedded = static_cast<const Element *>(step_.embedded);
    const int64_t count = rows_ * model_.hidden;
    for (int64_t i = 0; i < count; i += LANES) store(hidden_ + i, E::read(embedded + i, count - i), count - i);
    for (int64_t i = 0; i < model_.n_layers; i++) {
      attend(model_.layers[i]);
      feed_forward(model_.layers[i]);
    }
    Element *normed = static_cast<Element *>(step_.normed);
    for (int64_t i = 0; i < step_.n_kept; i++)
      normalise<E>(hidden_ + step_.kept[i] * model_.hidden, model_.final_norm, model_.hidden, model_.eps,
                   normed + i * model_.hidden);
    if (step_.logits == nullptr) return;
    const Linear *const head[] = {&model_.head};
    columns<E>(engine_, head, step_.n_kept, normed, nothing, no_errands,
               [&](int64_t, const Tile &tile, int) { write_tile<Float>(step_.logits, model_.head.out, tile); });
  }

 private:
  void attend(const Layer &layer) {
    norm_all(layer.attention_norm);
    const Linear *const linears[] = {&layer.q, &layer.k, &layer.v};
    const auto shrunk = shrink_all<E>(engine_, adapters_, linears, rows_, normed_);
    float *q = projected_, *k = q + rows_ * layer.q.out, *v = k + rows_ * layer.k.out;
    float *const outs[] = {q, k, v};
    apply(linears, normed_, shrunk,
          [&](int64_t i, const Tile &tile) { write_tile<Float>(outs[i], linears[i]->out, tile); });
    attention_.clear_begun(layer);
    by_rows([&](int64_t row) {
      attention_.place(layer, row, q + row * layer.q.out, k + row * layer.k.out, v + row * layer.v.out,
                       query_ + row * layer.q.out);
    });
    attention_.attend(layer, query_, attended_);
    add_to_hidden(layer.o, attended_);
  }

  void feed_forward(const Layer &layer) {
    norm_all(layer.ffn_norm);
    const Linear *const read[] = {&layer.gate, &layer.up}, *const gate[] = {&layer.gate}, *const up[] = {&layer.up};
    const auto shrunk = shrink_all<E>(engine_, adapters_, read, rows_, normed_);
    const Weights<E> weights(engine_, Use::WidenedBeside, up);
    const int64_t width = layer.gate.out;
    columns<E>(
        engine_, gate, rows_, normed_,
        [&](int64_t, int64_t start, int64_t stop, int64_t output, int64_t outputs, int thread) {
          return weights.of(layer.up, output, outputs, stop - start, thread);
        },
        [&](int64_t, const Tile &tile, Errands &errands) { adapters_.want(layer.gate, tile, errands); },
        [&](int64_t, Tile &gate_tile, const Group &up_weights) {
          adapters_.finish(layer.gate, shrunk.of(0), shrunk.stride, gate_tile);
          Tile tile;
          tile.row = gate_tile.row, tile.rows = gate_tile.rows;
          tile.output = gate_tile.output, tile.outputs = gate_tile.outputs;
          Errands errands;
          adapters_.want(layer.up, tile, errands);
          product<E>(layer.up, up_weights, normed_, tile, errands);
          adapters_.finish(layer.up, shrunk.of(1), shrunk.stride, tile);
          for (int64_t r = 0; r < tile.rows; r++)
            for (int64_t i = 0; i < tile.outputs; i += LANES) {
              const f32v x = load<f32v>(gate_tile.at(r, i)), y = load<f32v>(tile.at(r, i));
              E::write(activated_ + (tile.row + r) * width + tile.output + i, x / (1.f + exp_of(-x)) * y,
                       tile.outputs - i);
            }
        });
    add_to_hidden(layer.down, activated_);
  }

  // each(…) of the linears' output with what the adapters add.
  template <int N, class Each>
  void apply(const Linear *const (&linears)[N], const Element *x, const Shrunk<E> &shrunk, Each each) {
    columns<E>(
        engine_, linears, rows_, x, nothing,
        [&](int64_t i, const Tile &tile, Errands &errands) { adapters_.want(*linears[i], tile, errands); },
        [&](int64_t i, Tile &tile, int) {
          adapters_.finish(*linears[i], shrunk.of(i), shrunk.stride, tile);
          each(i, tile);
        });
  }

  void add_to_hidden(const Linear &linear, const Element *x) {
    const Linear *const linears[] = {&linear};
    const auto shrunk = shrink_all<E>(engine_, adapters_, linears, rows_, x);
    apply(linears, x, shrunk, [&](int64_t, const Tile &tile) {
      for (int64_t r = 0; r < tile.rows; r++)
        for (int64_t i = 0; i < tile.outputs; i += LANES) {
          float *h = hidden_ + (tile.row + r) * model_.hidden + tile.output + i;
          store(h, load<f32v>(h, tile.outputs - i) + load<f32v>(tile.at(r, i)), tile.outputs - i);
        }
    });
  }

  void norm_all(const float *weight) {
    by_rows([&](int64_t row) {
      normalise<E>(hidden_ + row * model_.hidden, weight, model_.hidden, model_.eps, normed_ + row * model_.hidden);
    });
  }

  // A few rows take less time than telling another thread of them.
  template <class Each>
  void by_rows(Each each) {
    const int64_t cut = 8;
    parallel(engine_.pool, ceil_div(rows_, cut), [&](int64_t chunk, int) {
      for (int64_t row = chunk * cut; row < least(rows_, (chunk + 1) * cut); row++) each(row);
    });
  }

  Engine &engine_;
  const Step &step_;
  const Model &model_;
  int64_t rows_;
  Adapters<E> adapters_;
  Attention<E> attention_;
  Element *query_, *attended_, *activated_, *normed_;
  float *projected_, *hidden_;
};

// y = W x + c
template <class E>
void linear(Engine &engine, const Linear &linear, int64_t rows, const void *x, void *y) {
  const Adapters<E> nobody(engine, nullptr, rows);
  const Linear *const linears[] = {&linear};
  columns<E>(engine, linears, rows, static_cast<const typename E::type *>(x), nothing, no_errands,
             [&](int64_t, Tile &tile, int) {
               nobody.finish(linear, nullptr, 0, tile);
               write_tile<E>(static_cast<typename E::type *>(y), linear.out, tile);
             });
}

// y += B (g ⊙ (A x)); the linear's weight is not read.
template <class E>
void low_rank(Engine &engine, const Effects &effects, const Linear &linear, int64_t rows, const void *x, void *y) {
  using Element = typename E::type;
  const Adapters<E> adapters(engine, &effects, rows);
  const Linear *const linears[] = {&linear};
  const auto shrunk = shrink_all<E>(engine, adapters, linears, rows, static_cast<const Element *>(x));
  if (shrunk.values == nullptr) return;
  Element *out = static_cast<Element *>(y);
  parallel(engine.pool, ceil_div(linear.out, GROUP), [&](int64_t group, int) {
    Tile tile;
    tile.output = group * GROUP, tile.outputs = least(GROUP, linear.out - tile.output);
    for (tile.row = 0; tile.row < rows; tile.row += TILE) {
      tile.rows = least(TILE, rows - tile.row);
      for (int64_t r = 0; r < tile.rows; r++)
        for (int64_t i = 0; i < tile.outputs; i += LANES)
          store(tile.at(r, i), E::read(out + (tile.row + r) * linear.out + tile.output + i, tile.outputs - i));
      adapters.finish(linear, shrunk.of(0), shrunk.stride, tile);
      write_tile<E>(out, linear.out, tile);
    }
  });
}

}  // namespace
}  // namespace motet
