// What kernels are called with. No header of torch is needed to compile them.
#pragma once

#include <cstdint>

namespace attn_plugins {

// Runs work(context, begin, end) over 0..number in parts of at least `grain`, on threads.
using Work = void (*)(void* context, int64_t begin, int64_t end);
using Parallel = void (*)(int64_t number, int64_t grain, Work work, void* context);

// (batch, heads, tokens, size), in elements; the last dimension is dense.
struct View {
  float* data;
  int64_t batch, head, token;
  float* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

constexpr int TILE = 64;                    // queries of a tile, and keys of a block
constexpr int GROUPS = (TILE + 5) / 6;      // sets of rows that a matrix product does at once
constexpr int RANGES = 4 * GROUPS;          // bytes of a mask's ranges: of keys among queries, then of queries among keys

// Queries and the blocks of keys that they see.
struct Tile {
  int32_t query, query_step, rows;  // a slice of the queries, or
  int32_t query_index, query_row;   // where its indices are, -1 for a slice; and how far those of the batch's next row are
  int32_t first_block, blocks;
};

// At most TILE keys.
struct Block {
  int32_t key, key_step, keys;
  int32_t key_index, key_row;  // as of queries
  int32_t mask, mask_row;      // which mask, -1 where all is visible; 1 where each row of the batch has its own
};

struct Tiles {
  const Tile* tiles;
  const Block* blocks;
  const int32_t* index;
  const uint8_t* masks;   // (number, TILE keys, TILE queries), 1 where visible
  const uint8_t* ranges;  // (number, RANGES)
  int64_t number;
  bool merged;  // a query may see keys in several tiles
};

struct Softmax {
  int64_t batch, heads, groups, queries, keys, size, value_size;  // sizes are multiples of 16
  Tiles tiles;
  View q, k, v, out;
  float* lse;  // (batch, heads, queries), infinite where nothing is seen
  float* top;  // the highest score of a key, 0 where nothing is seen; it gets `grad_top`
  const float* sinks;
  const float* bias;
  int64_t bias_batch, bias_head, bias_query, bias_key;
  float scale, softcap, dropout;
  uint64_t seed;
};

struct SoftmaxBackward {
  Softmax forward;
  View grad, dq, dk, dv;  // dk and dv: a part's own begin `parts_k` and `parts_v` further
  int64_t parts, parts_k, parts_v;
  const float* grad_lse;  // or null
  float* grad_top;        // or null; 0 once the key with the highest score has it
  float* d_bias;          // (batch or 1, heads, queries, keys), or null
  int64_t d_bias_batch;   // 0: rows of the batch share it, and a thread does all of them
};

// Blocks of keys that each query of each head has chosen, its own first; those of a row are numbered.
struct Chosen {
  const int64_t* chosen;  // (batch, heads, queries, width), -1 for none; a choice may be that of several query heads
  int64_t heads, width, number;
  const int32_t *first, *keys;  // (batch, number): where a block begins, and how many keys it has
  const uint8_t* padding;       // (batch, keys), 0 for a key that nobody sees; or null
  bool causal;
  int64_t before;  // keys before the first query
};

enum Map { ELU = 0, RELU = 1, RELU2 = 2, HEDGEHOG = 3, IDENTITY = 4 };

// A sequence of tokens of one row of the batch, which sees nothing of the others.
struct Run {
  int32_t row, start, length, first_chunk;  // the chunk of its first token among those of all runs
};

struct Linear {
  int64_t batch, heads, groups, size, features, value_size;  // features and value_size are multiples of 16
  Map map;
  bool causal;
  bool divided;  // by denominators; else sums are handed out, and denominators get a gradient of their own
  float eps;
  const Run* runs;
  int64_t number, chunks;
  const uint8_t* padding;  // (batch, tokens), 0 for a key that nobody sees; or null
  int64_t tokens;
  View q, k, v, out;
  float* den;     // (batch, heads, tokens)
  float* states;  // (chunks or runs, groups, features (value_size + 1)): what comes before a chunk, or all of a run
};

struct LinearBackward {
  Linear forward;
  View grad, dq, dk, dv;
  const float* grad_den;  // (batch, heads, tokens), where not divided
};

// One new token, and states (batch, groups, rows, value_size + 1) without it and with it.
struct Step {
  int64_t batch, heads, groups, size, rows, value_size;
  View q, k, v;
  const uint8_t* seen;  // 0 where a row's token is padding, or null
  int64_t seen_row;
  const float* before;
  float *after, *out;  // out: (batch, heads, value_size)
};

struct LinearStep {
  Step step;  // size is a multiple of 16
  Map map;
  float eps;
  // (heads or groups, size, size) and (heads or groups, size): x + W x + b comes before the map; or null
  const float *query_weight, *key_weight, *query_bias, *key_bias;
};

// Softmax over slots, some of them sinks and the others a ring, and sums over what has left the ring, under one denominator.
struct WindowStep {
  LinearStep linear;  // seen: whether the token that leaves enters the sums; value_size is a multiple of 16 too
  View keys, values;
  int64_t slots, place;    // place: of the token that leaves, and the new one's
  const uint8_t* visible;  // (batch, slots)
  int64_t visible_row;
  const float* log_factor;  // a head
  float scale;
  bool reads_window, reads_sums;
};

struct RecurrentStep {
  Step step;      // of a delta rule the last row is that of the average: rows is size + 1
  View gates;     // logarithms, a token being a row of the state; null where nothing is forgotten
  View beta;      // of a delta rule; else null
  const float* average_weight;
};

struct Kernels {
  const char* name;
  // C = A B of M x K and K x N, all dense; N is a multiple of 16. What all kernels are made of.
  void (*product)(int M, int N, int K, const float* A, const float* B, float* C);
  void (*softmax_forward)(const Softmax&, Parallel);
  void (*softmax_backward)(const SoftmaxBackward&, Parallel);
  void (*chosen_forward)(const Softmax&, const Chosen&, Parallel);
  void (*chosen_backward)(const SoftmaxBackward&, const Chosen&, Parallel);
  void (*linear_forward)(const Linear&, Parallel, int threads);
  void (*linear_backward)(const LinearBackward&, Parallel, int threads);
  void (*linear_step)(const LinearStep&, Parallel);
  void (*window_step)(const WindowStep&, Parallel);
  void (*recurrent_step)(const RecurrentStep&, Parallel);
};

}  // namespace attn_plugins
