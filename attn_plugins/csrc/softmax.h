// Softmax attention over the visible pairs of tiles, forward and backward: scores of a block stay in registers and cache.
//
// Scores lie key by key, S[key][query], so that the softmax of a query goes down a lane.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace attn_plugins {
namespace ISA {

constexpr float HIDDEN = -1e30f;
constexpr float SEEN = -1e29f;

// A counter-based generator: the same number for a pair in the forward and the backward, whatever thread asks.
struct Dropout {
  uint32_t key, threshold;
  float scale;
  Dropout(const Softmax& c, int64_t row)
      : key(mix(uint32_t(c.seed) ^ mix(uint32_t(c.seed >> 32) + uint32_t(row) * 0x9e3779b9u))),
        threshold(uint32_t(double(c.dropout) * 4294967296.0)),
        scale(1 / (1 - c.dropout)) {}
  static uint32_t mix(uint32_t x) {
    x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; x ^= x >> 16;
    return x;
  }
  // What the weights of these queries (indices in lanes) for a key are multiplied with.
  vf factor(vu query, uint32_t k) const {
    vu x = query * 0x9e3779b1u + (mix(key + k * 0x85ebca77u) - vu{});
    x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; x ^= x >> 16;
    return x >= threshold - vu{} ? all(scale) : vf{};
  }
};

// One row of the batch and one head, and a tile of it at a time.
struct Worker {
  const Softmax& c;
  int64_t b, h, g;
  const Tile* tile = nullptr;
  int n = 0;
  int32_t query[TILE];
  Dropout drop;
  float *qT, *q_copied, *P, *slope, *keys, *values;
  const float* q = nullptr;
  int64_t q_row = 0;
  Ahead ahead;

  Worker(const Softmax& call, int64_t b, int64_t h, float* memory)
      : c(call), b(b), h(h), g(h / (call.heads / call.groups)), drop(call, b * call.heads + h) {
    qT = memory;
    q_copied = qT + c.size * TILE;
    P = q_copied + c.size * TILE;
    slope = P + TILE * TILE;
    keys = slope + TILE * TILE;
    values = keys + TILE * c.size;
  }
  static size_t floats(const Softmax& c) { return 3 * c.size * TILE + c.value_size * TILE + 2 * TILE * TILE; }

  void begin(const Tile& t) {
    tile = &t;
    n = t.rows;
    for (int i = 0; i < n; i++)
      query[i] = t.query_index < 0 ? t.query + i * t.query_step : c.tiles.index[t.query_index + b * t.query_row + i];
    for (int i = n; i < TILE; i++) query[i] = -1;
    q = rows(c.q, c.size, q_copied, q_row);
    transpose(TILE, c.size, q, q_row, qT, TILE);
    if (c.scale != 1.f)
      for (int i = 0; i < c.size * TILE; i += VW) store(qT + i, load(qT + i) * all(c.scale));
  }
  // The tile's rows of queries, or of what is as many: where they are, or copied together, zeros for no query.
  const float* rows(const View& from, int size, float* copied, int64_t& row) const {
    if (n == TILE && tile->query_index < 0 && tile->query_step == 1) {
      row = from.token;
      return from.at(b, h, tile->query);
    }
    row = size;
    for (int i = 0; i < n; i++) {
      if (query[i] < 0) memset(copied + i * size, 0, sizeof(float) * size);
      else memcpy(copied + i * size, from.at(b, h, query[i]), sizeof(float) * size);
    }
    memset(copied + n * size, 0, sizeof(float) * (TILE - n) * size);
    return copied;
  }

  // The rows of a tile are needed soon, where they are a slice.
  void queries_soon(const Tile& t, const View& of, int size) {
    if (t.query_index < 0) ahead.add(of.at(b, h, t.query), t.query_step * of.token, t.rows, size);
  }
  // Those blocks of a tile that this one does not have are needed soon, where they are slices.
  void keys_soon(const Tile& t, const View& of, int size) {
    const Block *here = c.tiles.blocks + tile->first_block, *next = c.tiles.blocks + t.first_block;
    for (const Block* x = next; x < next + t.blocks; x++)
      if (x->key_index < 0 && std::none_of(here, here + tile->blocks, [&](const Block& y) { return y.key == x->key; }))
        ahead.add(of.at(b, g, x->key), x->key_step * of.token, x->keys, size);
  }

  int32_t key_of(const Block& x, int j) const {
    return x.key_index < 0 ? x.key + j * x.key_step : c.tiles.index[x.key_index + b * x.key_row + j];
  }
  // The block's rows of keys or values: where they are, or copied together.
  const float* rows_of(const Block& x, const View& from, int size, float* copied, int64_t& row) const {
    if (x.key_index < 0 && x.key_step == 1) {
      row = from.token;
      return from.at(b, g, x.key);
    }
    row = size;
    for (int j = 0; j < x.keys; j++) memcpy(copied + j * size, from.at(b, g, key_of(x, j)), sizeof(float) * size);
    return copied;
  }
  const uint8_t* mask_of(const Block& x) const {
    return x.mask < 0 ? nullptr : c.tiles.masks + (x.mask + b * x.mask_row) * TILE * TILE;
  }
  Ranges among_queries(const Block& x) const {
    return {x.mask < 0 ? nullptr : c.tiles.ranges + (x.mask + b * x.mask_row) * RANGES};
  }
  Ranges among_keys(const Block& x) const {
    return {x.mask < 0 ? nullptr : c.tiles.ranges + (x.mask + b * x.mask_row) * RANGES + 2 * GROUPS};
  }

  // P[key][query] = scores, within the ranges of a mask; the slope of a softcap into `slope`.
  void scores(const Block& x, const float* k, int64_t k_row) {
    Ranges columns = among_queries(x);
    product(x.keys, TILE, c.size, k, k_row, 1, qT, TILE, P, TILE, false, columns, {}, &ahead);
    if (c.softcap > 0) {
      vf cap = all(c.softcap), inverse = all(1 / c.softcap);
      for (int i = 0; i < TILE; i += VW)
        lanes(x, columns, i, [&](int j) {
          vf t = tanh(load(P + j * TILE + i) * inverse);
          store(slope + j * TILE + i, all(1.f) - t * t);
          store(P + j * TILE + i, t * cap);
        });
    }
    if (c.bias) {
      const float* bias = c.bias + b * c.bias_batch + h * c.bias_head;
      for (int j = 0; j < x.keys; j++)
        for (int i = 0; i < n; i++)
          if (query[i] >= 0) P[j * TILE + i] += bias[query[i] * c.bias_query + key_of(x, j) * c.bias_key];
    }
  }
  // inside(key) for all keys that VW queries from the i-th on may see; what is outside of a mask's ranges is `outside`'s.
  template <class F, class G>
  static void lanes(const Block& x, Ranges columns, int i, F inside, G outside) {
    for (int j = 0; j < x.keys; j += MR) {
      int end = std::min<int>(j + MR, x.keys);
      if (columns.low(j, TILE) < i + VW && columns.high(j, TILE) > i)
        for (int key = j; key < end; key++) inside(key);
      else
        for (int key = j; key < end; key++) outside(key);
    }
  }
  template <class F>
  static void lanes(const Block& x, Ranges columns, int i, F inside) {
    lanes(x, columns, i, inside, [](int) {});
  }
  // Scores of VW queries for a key, HIDDEN where the mask hides them.
  static vf seen(const float* P, const uint8_t* mask, int at) {
    vf s = load(P + at);
    if (!mask) return s;
    vi m = __builtin_convertvector(*(const vbu*)(mask + at), vi);
    return m != 0 ? s : all(HIDDEN);
  }
  // Which key of the block has this score, the same number as when it was the highest; -1 where none has.
  void find(const Block& x, const uint8_t* mask, const float* top, int32_t* key) const {
    for (int i = 0; i < TILE; i += VW) {
      vi found = vi{} - 1;
      vf t = load(top + i);
      lanes(x, among_queries(x), i, [&](int j) { found = seen(P, mask, j * TILE + i) == t ? vi{} + j : found; });
      *(vi*)(key + i) = found;
    }
  }
  // Adds A^T B to the block's rows of `to`, for A[key][query] and rows of queries B. `copied` may be overwritten.
  void add(const Block& x, const View& to, int size, const float* A, const float* B, int64_t b_row, float* copied) const {
    Ranges inner = among_queries(x);
    if (x.key_index < 0 && x.key_step == 1) {
      product(x.keys, size, n, A, TILE, 1, B, b_row, to.at(b, g, x.key), to.token, true, {}, inner);
      return;
    }
    product(x.keys, size, n, A, TILE, 1, B, b_row, copied, size, false, {}, inner);
    for (int j = 0; j < x.keys; j++) {
      float* row = to.at(b, g, key_of(x, j));
      for (int e = 0; e < size; e += VW) store(row + e, load(row + e) + load(copied + j * size + e));
    }
  }
};

// The forward of one call, over tiles that are those of all heads or of one.
struct Forward {
  const Softmax& c;
  const int64_t V;
  explicit Forward(const Softmax& call) : c(call), V(call.value_size) {}
  size_t memory() const { return Worker::floats(c) + TILE * V; }

  // The row of a query whose sums are complete, sinks in its denominator.
  void finish(int64_t b, int64_t h, int64_t q, float top, float total, float* out, const float* sums) const {
    float& lse = c.lse[(b * c.heads + h) * c.queries + q];
    c.top[(b * c.heads + h) * c.queries + q] = top;
    float factor = 1.f;
    if (c.sinks) {
      float after = std::max(top, c.sinks[h]);
      factor = std::exp(top - after);
      total = total * factor + std::exp(c.sinks[h] - after);
      top = after;
    }
    lse = total > 0 ? top + std::log(total) : INFINITY;
    vf f = all(total > 0 ? factor / total : 0.f);
    for (int e = 0; e < V; e += VW) store(out + e, load(sums + e) * f);
  }
  // One tile, and which comes after it; `acc` holds TILE rows of values.
  void attend(Worker& w, const Tile& tile, const Tile* next, float* acc) const {
    alignas(64) float top[TILE], total[TILE], factor[TILE];
    alignas(64) uint32_t number[TILE];
    w.begin(tile);
    w.queries_soon(tile, c.out, V);
    if (next) w.queries_soon(*next, c.q, c.size), w.keys_soon(*next, c.k, c.size), w.keys_soon(*next, c.v, V);
    for (int i = 0; i < TILE; i++) top[i] = HIDDEN, total[i] = 0, number[i] = w.query[i];
    bool first = true;
    for (int x = tile.first_block; x < tile.first_block + tile.blocks; x++) {
      const Block& block = c.tiles.blocks[x];
      int64_t k_row, v_row;
      const float* k = w.rows_of(block, c.k, c.size, w.keys, k_row);
      w.scores(block, k, k_row);
      Ranges columns = w.among_queries(block);
      float* P = w.P;
      const uint8_t* mask = w.mask_of(block);
      for (int i = 0; i < TILE; i += VW) {
        vf before = load(top + i), m = before, a{};
        Worker::lanes(block, columns, i, [&](int j) {
          vf s = Worker::seen(P, mask, j * TILE + i);
          if (mask) store(P + j * TILE + i, s);
          m = larger(m, s);
        });
        auto clear = [&](int j) { store(P + j * TILE + i, vf{}); };
        if (c.dropout > 0)
          Worker::lanes(block, columns, i, [&](int j) {
            vf s = load(P + j * TILE + i), e = exp(s - m);
            e = s > all(SEEN) ? e : vf{};
            a += e;
            store(P + j * TILE + i, e * w.drop.factor(*(const vu*)(number + i), w.key_of(block, j)));
          }, clear);
        else
          Worker::lanes(block, columns, i, [&](int j) {
            vf s = load(P + j * TILE + i), e = exp(s - m);
            e = s > all(SEEN) ? e : vf{};
            a += e;
            store(P + j * TILE + i, e);
          }, clear);
        vf f = exp(before - m);
        store(factor + i, f);
        store(top + i, m);
        store(total + i, load(total + i) * f + a);
      }
      if (!first)
        for (int i = 0; i < w.n; i++)
          if (factor[i] != 1.f) {
            vf f = all(factor[i]);
            for (int e = 0; e < V; e += VW) store(acc + i * V + e, load(acc + i * V + e) * f);
          }
      const float* v = w.rows_of(block, c.v, V, w.values, v_row);
      product(w.n, V, block.keys, P, 1, TILE, v, v_row, acc, V, !first, {}, w.among_keys(block), &w.ahead);
      first = false;
    }
    w.ahead.all();
    const int64_t head = (w.b * c.heads + w.h) * c.queries;
    alignas(64) float before[TILE], old[TILE], now[TILE];
    if (c.tiles.merged) {
      for (int i = 0; i < TILE; i++) before[i] = w.query[i] < 0 ? HIDDEN : c.top[head + w.query[i]];
      for (int i = 0; i < TILE; i += VW) {
        vf after = larger(load(before + i), load(top + i));
        store(old + i, exp(load(before + i) - after));
        store(now + i, exp(load(top + i) - after));
        store(top + i, after);
      }
    }
    for (int i = 0; i < w.n; i++) {
      if (w.query[i] < 0 || !(total[i] > 0)) continue;
      float* out = c.out.at(w.b, w.h, w.query[i]);
      if (!c.tiles.merged) {
        finish(w.b, w.h, w.query[i], top[i], total[i], out, acc + i * V);
        continue;
      }
      const int64_t at = head + w.query[i];
      c.top[at] = top[i];
      c.lse[at] = c.lse[at] * old[i] + total[i] * now[i];  // the sum, until all tiles are there
      for (int e = 0; e < V; e += VW) store(out + e, load(out + e) * all(old[i]) + load(acc + i * V + e) * all(now[i]));
    }
  }
  // Rows of queries that no tile has, or of none yet.
  void begin(int64_t b, int64_t h) const {
    for (int64_t q = 0; q < c.queries; q++) {
      memset(c.out.at(b, h, q), 0, sizeof(float) * V);
      c.lse[(b * c.heads + h) * c.queries + q] = c.tiles.merged ? 0.f : INFINITY;
      c.top[(b * c.heads + h) * c.queries + q] = c.tiles.merged ? HIDDEN : 0.f;
    }
  }
  // A head whose queries see keys in several tiles, which are merged by their highest scores: sums in `out`, results,
  // which may be the same rows, in `to`.
  void merged(int64_t b, int64_t h, float* s, const View& to) const {
    begin(b, h);
    Worker w(c, b, h, s + TILE * V);
    const Tile *tile = c.tiles.tiles, *end = tile + c.tiles.number;
    for (; tile < end; tile++) attend(w, *tile, tile + 1 < end ? tile + 1 : nullptr, s);
    for (int64_t q = 0; q < c.queries; q++) {
      int64_t at = (b * c.heads + h) * c.queries + q;
      const float* sums = c.out.at(b, h, q);
      float* out = to.at(b, h, q);
      if (c.lse[at] > 0) finish(b, h, q, c.top[at], c.lse[at], out, sums);
      else c.lse[at] = INFINITY, c.top[at] = 0.f, memset(out, 0, sizeof(float) * V);
    }
  }
};

static void softmax_forward(const Softmax& c, Parallel parallel) {
  const Forward f(c);
  const int64_t N = c.tiles.number, V = c.value_size;
  if (c.tiles.merged) {
    run(parallel, c.batch * c.heads, 1, [&](int64_t low, int64_t high) {
      float* s = scratch(f.memory());
      for (int64_t x = low; x < high; x++) f.merged(x / c.heads, x % c.heads, s, c.out);
    });
    return;
  }
  // A query may be in several tiles, and sees keys in one of them at most: only that one writes its row.
  run(parallel, c.batch * c.heads, 1, [&](int64_t low, int64_t high) {
    for (int64_t x = low; x < high; x++) f.begin(x / c.heads, x % c.heads);
  });
  run(parallel, c.batch * c.heads * N, std::max<int64_t>(1, N / 4), [&](int64_t low, int64_t high) {
    float* s = scratch(f.memory());
    for (int64_t x = low; x < high;) {
      int64_t row = x / N, end = std::min(high, (row + 1) * N);
      Worker w(c, row / c.heads, row % c.heads, s + TILE * V);
      for (; x < end; x++) f.attend(w, c.tiles.tiles[x % N], x + 1 < end ? &c.tiles.tiles[x % N + 1] : nullptr, s);
    }
  });
}

static size_t memory_of_backward(const Softmax& c) {
  return Worker::floats(c) + c.value_size * TILE * 2 + TILE * TILE + TILE * c.size;
}

// The gradient of a query's output, times its output.
static float product_of_rows(const float* g, const float* o, int64_t V) {
  vf a{};
  for (int e = 0; e < V; e += VW) a += load(g + e) * load(o + e);
  return sum_of(a);
}

// Tiles begin..end of one head; `part` says which gradients of keys and values are added to. `products` are those of the
// head's queries, where they are there.
static void backward_of_head(const SoftmaxBackward& d, const Softmax& c, int64_t b, int64_t h, int64_t part, int64_t begin,
                             int64_t end, float* s, const float* products = nullptr) {
  const int64_t V = c.value_size, D = c.size;
  float *gT = s, *g_copied = gT + V * TILE, *dP = g_copied + V * TILE, *acc = dP + TILE * TILE;
  Worker w(c, b, h, acc + TILE * D);
  View dk = d.dk, dv = d.dv;
  dk.data += part * d.parts_k;
  dv.data += part * d.parts_v;
  for (int64_t t = begin; t < end; t++) {
    const Tile& tile = c.tiles.tiles[t];
    alignas(64) float lse[TILE], delta[TILE], seen[TILE], top[TILE], grad_top[TILE];
    alignas(64) uint32_t number[TILE];
    alignas(64) int32_t at_top[TILE];
    w.begin(tile);
    w.queries_soon(tile, d.dq, D);
    if (t + 1 < end) {
      const Tile& next = c.tiles.tiles[t + 1];
      w.queries_soon(next, c.q, D), w.queries_soon(next, d.grad, V), w.queries_soon(next, c.out, V);
      w.keys_soon(next, c.k, D), w.keys_soon(next, c.v, V), w.keys_soon(next, dk, D), w.keys_soon(next, dv, V);
    }
    int64_t g_row;
    const float* gradient = w.rows(d.grad, V, g_copied, g_row);
    transpose(TILE, V, gradient, g_row, gT, TILE);
    for (int i = 0; i < TILE; i++) lse[i] = -HIDDEN, delta[i] = 0, seen[i] = 0, number[i] = w.query[i], top[i] = -HIDDEN, grad_top[i] = 0;
    for (int i = 0; i < w.n; i++) {
      if (w.query[i] < 0) continue;
      int64_t at = (b * c.heads + h) * c.queries + w.query[i];
      delta[i] = products ? products[w.query[i]] : product_of_rows(gradient + i * g_row, c.out.at(b, h, w.query[i]), V);
      delta[i] -= (d.grad_lse ? d.grad_lse[at] : 0.f);
      lse[i] = std::min(c.lse[at], -HIDDEN);
      if (d.grad_top && c.lse[at] < -HIDDEN) top[i] = c.top[at], grad_top[i] = d.grad_top[at];
    }
    bool first = true;
    for (int x = tile.first_block; x < tile.first_block + tile.blocks; x++) {
      const Block& block = c.tiles.blocks[x];
      Ranges columns = w.among_queries(block), among_keys = w.among_keys(block);
      int64_t k_row, v_row;
      const float* k = w.rows_of(block, c.k, D, w.keys, k_row);
      const float* v = w.rows_of(block, c.v, V, w.values, v_row);
      w.scores(block, k, k_row);
      float* P = w.P;
      product(block.keys, TILE, V, v, v_row, 1, gT, TILE, dP, TILE, false, columns, {}, &w.ahead);
      const uint8_t* mask = w.mask_of(block);
      if (d.grad_top) w.find(block, mask, top, at_top);
      auto gradients = [&](int i, auto keep) {
        vf l = load(lse + i), dl = load(delta + i), any{};
        Worker::lanes(block, columns, i, [&](int j) {
          vf s = Worker::seen(P, mask, j * TILE + i), y = s - l, e = exp(y);
          e = y > all(-87.f) ? e : vf{};
          if (mask) e = s > all(SEEN) ? e : vf{};
          any += e;
          vf kept = keep(j), dp = load(dP + j * TILE + i) * kept;
          store(P + j * TILE + i, e * kept);
          store(dP + j * TILE + i, e != vf{} ? e * (dp - dl) : vf{});
        }, [&](int j) {
          store(P + j * TILE + i, vf{});
          store(dP + j * TILE + i, vf{});
        });
        store(seen + i, load(seen + i) + any);
      };
      for (int i = 0; i < TILE; i += VW) {
        if (c.dropout > 0)
          gradients(i, [&](int j) { return w.drop.factor(*(const vu*)(number + i), w.key_of(block, j)); });
        else
          gradients(i, [](int) { return all(1.f); });
      }
      for (int i = 0; d.grad_top && i < w.n; i++)
        if (at_top[i] >= 0) {  // of equal scores one has it
          dP[at_top[i] * TILE + i] += grad_top[i];
          grad_top[i] = 0;
          // Only where other tiles see keys of this query too, which are the same thread's.
          if (c.tiles.merged) d.grad_top[(b * c.heads + h) * c.queries + w.query[i]] = 0;
        }
      if (d.d_bias) {
        float* to = d.d_bias + b * d.d_bias_batch + h * c.queries * c.keys;
        for (int j = 0; j < block.keys; j++)
          for (int i = 0; i < w.n; i++)
            // A pair that is hidden here may be another tile's, and that another thread's.
            if (w.query[i] >= 0 && dP[j * TILE + i] != 0) to[w.query[i] * c.keys + w.key_of(block, j)] += dP[j * TILE + i];
      }
      for (int i = 0; i < block.keys * TILE; i += VW) {
        vf ds = load(dP + i);
        if (c.softcap > 0) ds = ds != vf{} ? ds * load(w.slope + i) : ds;  // outside of ranges there is no slope
        store(dP + i, ds * all(c.scale));
      }
      product(w.n, D, block.keys, dP, 1, TILE, k, k_row, acc, D, !first, {}, among_keys, &w.ahead);
      w.add(block, dv, V, P, gradient, g_row, w.values);
      w.add(block, dk, D, dP, w.q, w.q_row, w.keys);
      first = false;
    }
    w.ahead.all();
    for (int i = 0; i < w.n; i++) {
      if (w.query[i] < 0 || !(seen[i] > 0)) continue;
      float* dq = d.dq.at(b, h, w.query[i]);
      for (int e = 0; e < D; e += VW) {
        vf now = load(acc + i * D + e);
        store(dq + e, c.tiles.merged ? load(dq + e) + now : now);
      }
    }
  }
}

static void softmax_backward(const SoftmaxBackward& d, Parallel parallel) {
  const Softmax& c = d.forward;
  const int64_t N = c.tiles.number, shared = c.heads / c.groups;
  const bool rows_together = d.d_bias && d.d_bias_batch == 0;
  int64_t batch = rows_together ? 1 : c.batch;
  run(parallel, batch * c.groups * d.parts, 1, [&](int64_t low, int64_t high) {
    float* s = scratch(memory_of_backward(c));
    for (int64_t x = low; x < high; x++) {
      int64_t part = x % d.parts, g = x / d.parts % c.groups, row = x / d.parts / c.groups;
      for (int64_t b = row; b < (rows_together ? c.batch : row + 1); b++)
        for (int64_t r = 0; r < shared; r++) backward_of_head(d, c, b, g * shared + r, part, N * part / d.parts, N * (part + 1) / d.parts, s);
    }
  });
}

}  // namespace ISA
}  // namespace attn_plugins
