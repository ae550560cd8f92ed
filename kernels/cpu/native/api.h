// The C ABI: what Python fills in and calls (motet/kernels/cpu/compiled.py mirrors every struct, field by field).
//
// Must not know: adapters, requests, sampling. All fields are eight bytes wide, so that no compiler pads; pointers are
// borrowed for the call. Widths are in elements, rows are rows of the batch, an arena address is a first unit.
//
// Packed weights: blocks of 16 outputs; in a block, for each four bytes of an input row (two bfloat16 or one float32),
// the four bytes of each of the 16 outputs. Outputs beyond the last are zero. Weights in int8 lie in the same order, a
// byte for each element, and are multiplied by their output's scale.
#pragma once
#include <cstdint>

namespace motet {

struct Linear {
  const uint32_t *packed;
  const float *scale;  // [out] of weights in int8, else null
  const float *bias;   // [out] or null
  int64_t in, out;
  int64_t target;  // row of the effects' tables
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float *attention_norm, *ffn_norm;  // [hidden]
  void *keys, *values;                     // [blocks, block_size, kv_heads, head_width]
};

struct Model {
  const Layer *layers;
  int64_t n_layers, hidden, heads, kv_heads, head_width;
  double eps, score_scale;
  const float *final_norm;  // [hidden]
  Linear head;
};

// Segments of rows that share an adapter; tables are [targets, segments].
struct LowRank {
  int64_t segments;
  const int32_t *row_start, *row_stop, *a_first, *b_first, *rank;
  const int32_t *gate_of_row;  // [rows], or null where every factor is 1
  const float *gate_factor;    // [targets, gates, gate_width]
  int64_t gates, gate_width;
};

struct RowVectors {
  int64_t segments;
  const int32_t *row_start, *row_stop, *first;
  const uint8_t *present;
};

struct Effects {
  const void *arena;
  int64_t unit, targets;
  const LowRank *low_rank;  // their changes add up
  int64_t n_low_rank;
  const RowVectors *scales, *biases;  // null where there are none
};

struct Step {
  const Model *model;
  const Effects *effects;  // null where no row has an adapter
  int64_t rows;
  const void *embedded;      // [rows, hidden]
  const float *cos, *sin;    // [rows, head_width]
  const int64_t *positions;  // [rows]
  const int64_t *sequence;   // [rows] which list of blocks
  const int64_t *first_block;  // [sequences] where the list begins in `blocks`
  const int64_t *blocks;
  int64_t block_size;
  const int64_t *begun;  // blocks to clear before they are written
  int64_t n_begun;
  const int64_t *kept;  // [n_kept] rows that go on to the final norm
  int64_t n_kept;
  void *normed;   // [n_kept, hidden]
  float *logits;  // [n_kept, head.out], or null where the head is computed elsewhere
};

}  // namespace motet
