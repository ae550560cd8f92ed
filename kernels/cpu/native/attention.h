// Rotation of queries and keys, and causal attention over keys and values in blocks.
//
// Must not know: adapters, weights. Every row attends alone to the positions of its own sequence up to its own, so it
// reads nothing that was not written and its result does not depend on its neighbours.
#pragma once
#include "product.h"

namespace motet {
namespace {

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
    scores_ = engine.buffer<float>(Use::Scores, engine.pool.threads() * heads_ * scores_stride_);
    sums_ = engine.buffer<float>(Use::Sums, engine.pool.threads() * heads_ * width_);
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
    // A row at a time reads its keys and values from end to end; few rows are cut by head, for work for all threads.
    const int64_t together = step_.rows >= 4 * pool_.threads() ? kv_heads_ : 1, share = heads_ / kv_heads_;
    const int64_t cuts = kv_heads_ / together;
    parallel(pool_, step_.rows * cuts, [&](int64_t chunk, int thread) {
      const int64_t row = chunk / cuts, first = chunk % cuts * together;
      float *scores = scores_ + thread * heads_ * scores_stride_;
      float *sums = sums_ + thread * heads_ * width_;
      const Element *own_query = query + (row * heads_ + first * share) * width_;
      Element *own_out = out + (row * heads_ + first * share) * width_;
      one_row(layer, row, first, together, own_query, own_out, scores, sums);
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

  // `count` key-value heads of one row from the first on, and the query heads that share them.
  void one_row(const Layer &layer, int64_t row, int64_t first, int64_t count, const Element *query, Element *out,
               float *scores, float *sums) const {
    const int64_t length = step_.positions[row] + 1, share = heads_ / kv_heads_;
    each_run(layer.keys, row, first, count, length, [&](int64_t position, int64_t n, const Element *keys) {
      for (int64_t h = 0; h < count * share; h++)
        score(query + h * width_, keys + h / share * width_, n, scores + h * scores_stride_ + position);
    });
    fetch(layer.values, row, first, count, 0, length);
    for (int64_t h = 0; h < count * share; h++) weigh(scores + h * scores_stride_, length);
    std::memset(sums, 0, static_cast<size_t>(count * share * width_) * sizeof(float));
    each_run(layer.values, row, first, count, length, [&](int64_t position, int64_t n, const Element *values) {
      for (int64_t h = 0; h < count * share;) {
        const Element *own = values + h / share * width_;
        float *weights = scores + h * scores_stride_ + position, *sum = sums + h * width_;
        const int64_t left = share - h % share;
        h += left >= 4 ? gather<4>(weights, n, own, sum) : left == 3 ? gather<3>(weights, n, own, sum)
           : left == 2 ? gather<2>(weights, n, own, sum) : gather<1>(weights, n, own, sum);
      }
    });
    for (int64_t h = 0; h < count * share; h++)
      each_vector<E>(width_, [&](int64_t i, int64_t n) {
        f32v parts[E::PER_UNIT];
        for (int p = 0; p < E::PER_UNIT; p++) parts[p] = load<f32v>(sums + h * width_ + i + p * n, n);
        store(out + h * width_ + i, E::join(parts), n);
      });
  }

  // scores[i] = scale · query · key i, for n ≤ 16 neighbouring positions.
  void score(const Element *query, const Element *keys, int64_t n, float *scores) const {
    n == LANES ? score_of<true>(query, keys, n, scores) : score_of<false>(query, keys, n, scores);
  }

  template <bool WHOLE>
  void score_of(const Element *query, const Element *keys, int64_t n, float *scores) const {
    const int64_t stride = kv_heads_ * width_;
    f32v sum[LANES] = {};
    each_vector<E>(width_, [&](int64_t at, int64_t some) MOTET_ALWAYS {
      const u32v q = load<u32v>(query + at, some);
      const Element *key = keys + at;
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; i++) {
        sum[i] = E::dot(sum[i], q, load<u32v>(key, some));
        if (WHOLE || i + 1 < n) key += stride;  // beyond the last, the last again
      }
    });
    store(scores, sums_of(sum) * scale_, n);
  }

  // sums += Σ_i weight i · value i for HEADS query heads of one key-value head. A head's sums lie as `split` gives
  // them.
  template <int HEADS>
  int64_t gather(const float *weights, int64_t n, const Element *values, float *sums) const {
    each_vector<E>(width_, [&](int64_t at, int64_t some) MOTET_ALWAYS {
      f32v sum[HEADS][E::PER_UNIT];
      for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < E::PER_UNIT; p++) sum[h][p] = load<f32v>(sums + h * width_ + at + p * some, some);
      for (int64_t i = 0; i < n; i++) {
        f32v parts[E::PER_UNIT];
        E::split(load<u32v>(values + i * kv_heads_ * width_ + at, some), parts);
        for (int h = 0; h < HEADS; h++)
          for (int p = 0; p < E::PER_UNIT; p++) sum[h][p] += parts[p] * weights[h * scores_stride_ + i];
      }
      for (int h = 0; h < HEADS; h++)
        for (int p = 0; p < E::PER_UNIT; p++) store(sums + h * width_ + at + p * some, sum[h][p], some);
    });
    return HEADS;
  }

  // each(position, positions ≤ 16, their vectors from a head on) for all below `length` of the row's sequence.
  template <class Each>
  MOTET_INLINE void each_run(void *cache, int64_t row, int64_t head, int64_t count, int64_t length, Each each) const {
    for (int64_t position = 0; position < length;) {
      const int64_t n = run_length(position, length);
      fetch(cache, row, head, count, position + n, length);
      each(position, n, at(cache, row, position) + head * width_);
      position += n;
    }
  }

  int64_t run_length(int64_t position, int64_t length) const {
    return least(least(LANES, step_.block_size - position % step_.block_size), length - position);
  }

  // Asks for what a run from this position on reads, while there is other work.
  MOTET_INLINE void fetch(void *cache, int64_t row, int64_t head, int64_t count, int64_t position,
                          int64_t length) const {
    // Rows of one prompt follow each other and read the same.
    if (position >= length || (row + 1 < step_.rows && step_.sequence[row] == step_.sequence[row + 1])) return;
    const Element *vectors = at(cache, row, position) + head * width_;
    const int64_t n = run_length(position, length), bytes = count * width_ * static_cast<int64_t>(sizeof(Element));
    for (int64_t i = 0; i < n; i++, vectors += kv_heads_ * width_)
      for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(reinterpret_cast<const char *>(vectors) + byte);
  }

  // Softmax in place.
  static void weigh(float *x, int64_t length) {
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
    const float factor = 1.f / sum_of(total);
    for (int64_t i = 0; i < length; i += LANES) store(x + i, load<f32v>(x + i) * factor);
  }

  const Step &step_;
  int64_t heads_, kv_heads_, width_;
  float scale_;
  Pool &pool_;
  int64_t scores_stride_;
  float *scores_, *sums_;
};

}  // namespace
}  // namespace motet
