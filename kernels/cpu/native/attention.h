// Rotation of queries and keys, and causal attention over keys and values in blocks.
//
// Must not know: adapters, weights. Every row attends alone to the positions of its own sequence up to its own, so it
// reads nothing that was not written and its result does not depend on its neighbours.
#pragma once
#include "product.h"

namespace motet {
namespace {

constexpr int TOGETHER_HEADS = 4;  // query heads that share a read of a key

template <class E>
class Attention {
 public:
  using Element = typename E::type;

  Attention(Engine &engine, const Model &model, const Step &step)
      : step_(step), heads_(model.heads), kv_heads_(model.kv_heads), width_(model.head_width),
        scale_(static_cast<float>(model.score_scale)), pool_(engine.pool) {
    int64_t longest = 0;
    for (int64_t row = 0; row < step.rows; row++)
      if (step.positions[row] >= longest) longest = step.positions[row] + 1;
    scores_stride_ = ceil_div(longest, LANES) * LANES;
    scores_ = engine.buffer<float>(Use::Scores, engine.pool.threads() * TOGETHER_HEADS * scores_stride_);
  }

  // Rotates one row's query heads into `query` [heads, width] and writes its key and value to the cache.
  void place(const Layer &layer, int64_t row, const float *q, const float *k, const float *v, Element *query) const {
    const float *cos = step_.cos + row * width_, *sin = step_.sin + row * width_;
    for (int64_t h = 0; h < heads_; h++) rotate(q + h * width_, cos, sin, query + h * width_);
    Element *key = at(layer.keys, row, step_.positions[row]), *value = at(layer.values, row, step_.positions[row]);
    for (int64_t h = 0; h < kv_heads_; h++) rotate(k + h * width_, cos, sin, key + h * width_);
    for (int64_t i = 0; i < kv_heads_ * width_; i += LANES) {
      const int64_t n = least(LANES, kv_heads_ * width_ - i);
      E::write(value + i, load<f32v>(v + i, n), n);
    }
  }

  // All rows; query and out are [rows, heads, width].
  void attend(const Layer &layer, const Element *query, Element *out) const {
    const int64_t cut = step_.rows <= 64 ? 1 : 4, row_cuts = ceil_div(step_.rows, cut);
    parallel(pool_, row_cuts * kv_heads_, [&](int64_t chunk, int thread) {
      const int64_t head = chunk % kv_heads_, start = chunk / kv_heads_ * cut;
      for (int64_t row = start; row < least(step_.rows, start + cut); row++) head_group(layer, row, head, thread, query, out);
    });
  }

  // Clears blocks that are written for the first time: others may read beyond what is written.
  void clear_begun(const Layer &layer) const {
    const size_t bytes = static_cast<size_t>(step_.block_size * kv_heads_ * width_) * sizeof(Element);
    for (int64_t i = 0; i < step_.n_begun; i++)
      for (void *cache : {layer.keys, layer.values})
        std::memset(static_cast<char *>(cache) + static_cast<size_t>(step_.begun[i]) * bytes, 0, bytes);
  }

 private:
  Element *at(void *cache, int64_t row, int64_t position) const {
    const int64_t *blocks = step_.blocks + step_.first_block[step_.sequence[row]];
    const int64_t place = blocks[position / step_.block_size] * step_.block_size + position % step_.block_size;
    return static_cast<Element *>(cache) + place * kv_heads_ * width_;
  }

  void rotate(const float *x, const float *cos, const float *sin, Element *out) const {
    const int64_t half = width_ / 2;
    for (int64_t i = 0; i < half; i += LANES) {
      const int64_t n = least(LANES, half - i);
      const f32v a = load<f32v>(x + i, n), b = load<f32v>(x + half + i, n);
      E::write(out + i, a * load<f32v>(cos + i, n) - b * load<f32v>(sin + i, n), n);
      E::write(out + half + i, b * load<f32v>(cos + half + i, n) + a * load<f32v>(sin + half + i, n), n);
    }
  }

  // The query heads of one row that share a key-value head.
  void head_group(const Layer &layer, int64_t row, int64_t kv_head, int thread, const Element *query, Element *out) const {
    const int64_t share = heads_ / kv_heads_;
    float *scores = scores_ + thread * TOGETHER_HEADS * scores_stride_;
    for (int64_t g = 0; g < share;) {
      const int64_t first = (row * heads_ + kv_head * share + g) * width_;
      switch (least(TOGETHER_HEADS, share - g)) {
        case 1: some_heads<1>(layer, row, kv_head, query + first, out + first, scores); g += 1; break;
        case 2: some_heads<2>(layer, row, kv_head, query + first, out + first, scores); g += 2; break;
        case 3: some_heads<3>(layer, row, kv_head, query + first, out + first, scores); g += 3; break;
        default: some_heads<4>(layer, row, kv_head, query + first, out + first, scores); g += 4;
      }
    }
  }

  template <int HEADS>
  void some_heads(const Layer &layer, int64_t row, int64_t kv_head, const Element *query, Element *out, float *scores) const {
    const int64_t length = step_.positions[row] + 1, units = width_ / E::PER_UNIT;
    each_place(layer.keys, row, kv_head, length, [&](int64_t position, const Element *key) {
      f32v sum[HEADS] = {};
      for (int64_t u = 0; u < units; u += LANES) {
        const int64_t n = least(LANES, units - u);
        const u32v some = load<u32v>(key + u * E::PER_UNIT, n);
        for (int h = 0; h < HEADS; h++) sum[h] = E::dot(sum[h], load<u32v>(query + h * width_ + u * E::PER_UNIT, n), some);
      }
      for (int h = 0; h < HEADS; h++) scores[h * scores_stride_ + position] = sum_of(sum[h]) * scale_;
    });
    float total[HEADS];
    for (int h = 0; h < HEADS; h++) total[h] = exponentials(scores + h * scores_stride_, length);
    for (int64_t u = 0; u < units; u += LANES) {
      const int64_t n = least(LANES, units - u);
      f32v sum[HEADS][E::PER_UNIT] = {};
      each_place(layer.values, row, kv_head, length, [&](int64_t position, const Element *value) {
        f32v parts[E::PER_UNIT];
        E::split(load<u32v>(value + u * E::PER_UNIT, n), parts);
        for (int h = 0; h < HEADS; h++)
          for (int p = 0; p < E::PER_UNIT; p++) sum[h][p] += parts[p] * scores[h * scores_stride_ + position];
      });
      for (int h = 0; h < HEADS; h++) {
        for (int p = 0; p < E::PER_UNIT; p++) sum[h][p] /= total[h];
        store(out + h * width_ + u * E::PER_UNIT, E::join(sum[h]), n);
      }
    }
  }

  // each(position, its vector of this head) for the first `length` positions of the row's sequence.
  template <class Each>
  MOTET_INLINE void each_place(void *cache, int64_t row, int64_t kv_head, int64_t length, Each each) const {
    const int64_t stride = kv_heads_ * width_;
    for (int64_t position = 0; position < length;) {
      const Element *place = at(cache, row, position) + kv_head * width_;
      const int64_t stop = least(length, position + step_.block_size);
      for (; position < stop; position++, place += stride) each(position, place);
    }
  }

  // e^(x - largest) in place; returns their sum.
  static float exponentials(float *x, int64_t length) {
    f32v largest = broadcast(-__builtin_inff()), total{};
    for (int64_t i = length; i < ceil_div(length, LANES) * LANES; i++) x[i] = -__builtin_inff();
    for (int64_t i = 0; i < length; i += LANES) {
      const f32v some = load<f32v>(x + i);
      largest = some > largest ? some : largest;
    }
    const f32v top = broadcast(largest_of(largest));
    for (int64_t i = 0; i < length; i += LANES) {
      const f32v some = exp_of(load<f32v>(x + i) - top);
      store(x + i, some);
      total += length - i >= LANES ? some : load<f32v>(&some, length - i);
    }
    return sum_of(total);
  }

  const Step &step_;
  int64_t heads_, kv_heads_, width_;
  float scale_;
  Pool &pool_;
  int64_t scores_stride_;
  float *scores_;
};

}  // namespace
}  // namespace motet
