// One new token: taken into the state of each key/value head, which its queries then read, in one pass over the state.
//
// A state is rows of V sums of values and, as last column, what they are sums over. Any V and any number of rows.
#pragma once

#include "kernels.h"
#include "linear.h"
#include "simd.h"

namespace attn_plugins {
namespace ISA {

constexpr int READERS = 4;  // queries whose sums stay in registers

// after = gate before + key values^T for NV vectors of columns, and sums = queries after of R queries. Without WRITE
// what is read is `before` as it is.
template <int R, int NV, bool WRITE>
static inline void columns(int F, const float* gate, const float* key, const float* queries, const float* values,
                           const float* before, float* after, int64_t row, float* sums, int64_t sums_row) {
  vf total[R][NV] = {}, v[NV];
#pragma GCC unroll 4
  for (int n = 0; n < NV; n++) v[n] = WRITE ? load(values + n * VW) : vf{};
  for (int f = 0; f < F; f++) {
    vf s[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {
      s[n] = load(before + f * row + n * VW);
      if constexpr (WRITE) {
        s[n] = all(gate[f]) * s[n] + all(key[f]) * v[n];
        store(after + f * row + n * VW, s[n]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) total[r][n] += all(queries[r * F + f]) * s[n];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) store(sums + r * sums_row + n * VW, total[r][n]);
}

template <int R, bool WRITE>
static void every_column(int F, int V, const float* gate, const float* key, const float* queries, const float* values,
                         const float* before, float* after, float* sums) {
  const int64_t row = V + 1;
  int c = 0;
  for (; c + NB * VW <= V; c += NB * VW)
    columns<R, NB, WRITE>(F, gate, key, queries, values + c, before + c, after + c, row, sums + c, V);
  for (; c + VW <= V; c += VW)
    columns<R, 1, WRITE>(F, gate, key, queries, values + c, before + c, after + c, row, sums + c, V);
  for (; c < V; c++) {
    float total[R] = {};
    for (int f = 0; f < F; f++) {
      float s = before[f * row + c];
      if (WRITE) after[f * row + c] = s = gate[f] * s + key[f] * values[c];
      for (int r = 0; r < R; r++) total[r] += queries[r * F + f] * s;
    }
    for (int r = 0; r < R; r++) sums[r * V + c] = total[r];
  }
}

template <bool WRITE>
static void some_queries(int R, int F, int V, const float* gate, const float* key, const float* queries,
                         const float* values, const float* before, float* after, float* sums) {
  switch (R) {
    case 1: return every_column<1, WRITE>(F, V, gate, key, queries, values, before, after, sums);
    case 2: return every_column<2, WRITE>(F, V, gate, key, queries, values, before, after, sums);
    case 3: return every_column<3, WRITE>(F, V, gate, key, queries, values, before, after, sums);
    default: return every_column<READERS, WRITE>(F, V, gate, key, queries, values, before, after, sums);
  }
}

// after (F, V + 1), all but its last column, and sums (R, V) of what the queries (R, F) read there.
static void take(int R, int F, int V, const float* gate, const float* key, const float* queries, const float* values,
                 const float* before, float* after, float* sums) {
  some_queries<true>(std::min(R, READERS), F, V, gate, key, queries, values, before, after, sums);
  for (int r = READERS; r < R; r += READERS)
    some_queries<false>(std::min(R - r, READERS), F, V, nullptr, nullptr, queries + r * F, nullptr, after, nullptr,
                        sums + r * V);
}

// Products of x with VW rows of size E, row(i) being the i-th.
template <class Row>
static inline vf dots(int E, const float* x, Row row) {
  float held[VW * VW], turned[VW * VW];
  vf sum[VW] = {}, total{};
  const float* from[VW];
  for (int i = 0; i < VW; i++) from[i] = row(i);
  for (int e = 0; e < E; e += VW) {
    vf a = load(x + e);
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++) sum[i] += load(from[i] + e) * a;
  }
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) store(held + i * VW, sum[i]);
  transpose(VW, VW, held, VW, turned, VW);
#pragma GCC unroll 16
  for (int i = 0; i < VW; i++) total += load(turned + i * VW);
  return total;
}

// y = x + W x + b, for W (E, E).
static void moved(int E, const float* W, const float* b, const float* x, float* y) {
  for (int e = 0; e < E; e += VW) {
    vf total = load(x + e) + dots(E, x, [&](int i) { return W + (e + i) * E; });
    store(y + e, b ? total + load(b + e) : total);
  }
}

// Heads that a thread has at least: a state of as many numbers is read in less time than a thread takes to begin.
static int64_t heads_a_thread(const Step& c) { return std::max<int64_t>(1, (1 << 16) / (c.rows * (c.value_size + 1))); }

// Memory of a thread for the sums of one head.
struct Reading {
  int64_t E, F, V, R;
  float *key, *gate, *queries, *x, *sums, *den, *rest;
  Reading(const Step& c, int64_t more)
      : E(c.size), F(c.rows), V(c.value_size), R(c.heads / c.groups), key(scratch(F * (R + 2) + E + R * (V + 1) + more)),
        gate(key + F), queries(gate + F), x(queries + R * F), sums(x + E), den(sums + R * V), rest(den + R) {
    std::fill(gate, gate + F, 1.f);
  }

  // Takes a key and a value into the sums of a head, if the key enters, and reads these by its queries: sums, den.
  void take_in(const LinearStep& d, int64_t u, const float* k, const float* v) {
    const Step& c = d.step;
    const int64_t b = u / c.groups, g = u % c.groups;
    const float* before = c.before + u * F * (V + 1);
    float* after = c.after + u * F * (V + 1);
    if (d.key_weight) moved(E, d.key_weight + g * E * E, d.key_bias ? d.key_bias + g * E : nullptr, k, x), k = x;
    features(d.map, 1, E, k, 0, key);
    if (c.seen && !c.seen[b * c.seen_row]) std::fill(key, key + F, 0.f);
    for (int64_t r = 0; r < R; r++) {
      const int64_t h = g * R + r;
      const float* q = c.q.at(b, h, 0);
      if (d.query_weight) moved(E, d.query_weight + h * E * E, d.query_bias ? d.query_bias + h * E : nullptr, q, x), q = x;
      features(d.map, 1, E, q, 0, queries + r * F);
      den[r] = 0;
    }
    for (int64_t f = 0; f < F; f++) {
      float z = before[f * (V + 1) + V] + key[f];
      after[f * (V + 1) + V] = z;
      for (int64_t r = 0; r < R; r++) den[r] += queries[r * F + f] * z;
    }
    take(R, F, V, gate, key, queries, v, before, after, sums);
  }

  void divide(float* out) const {
    for (int64_t r = 0; r < R; r++)
      for (int64_t e = 0; e < V; e++) out[r * V + e] = sums[r * V + e] / den[r];
  }
};

static void linear_step(const LinearStep& d, Parallel parallel) {
  const Step& c = d.step;
  run(parallel, c.batch * c.groups, heads_a_thread(c), [&](int64_t low, int64_t high) {
    Reading of(c, 0);
    for (int64_t u = low; u < high; u++) {
      of.take_in(d, u, c.k.at(u / c.groups, u % c.groups, 0), c.v.at(u / c.groups, u % c.groups, 0));
      for (int64_t r = 0; r < of.R; r++) of.den[r] += d.eps;
      of.divide(c.out + u * of.R * of.V);
    }
  });
}

// The token that leaves the window enters the sums; the new one is seen in its place, where it is not written yet.
static void window_step(const WindowStep& w, Parallel parallel) {
  const LinearStep& d = w.linear;
  const Step& c = d.step;
  const int64_t slots = up(w.slots);
  run(parallel, c.batch * c.groups, heads_a_thread(c), [&](int64_t low, int64_t high) {
    Reading of(c, slots * (c.heads / c.groups));
    const int64_t E = of.E, V = of.V, R = of.R;
    for (int64_t u = low; u < high; u++) {
      const int64_t b = u / c.groups, g = u % c.groups;
      const uint8_t* visible = w.visible + b * w.visible_row;
      of.take_in(d, u, w.keys.at(b, g, w.place), w.values.at(b, g, w.place));
      for (int64_t r = 0; r < R; r++) {
        const float factor = !w.reads_sums ? 0 : w.reads_window ? std::exp(w.log_factor[g * R + r]) : 1;
        for (int64_t e = 0; e < V; e++) of.sums[r * V + e] = factor == 0 ? 0 : of.sums[r * V + e] * factor;
        of.den[r] = factor == 0 ? 0 : of.den[r] * factor;
      }
      if (w.reads_window) {
        float* weights = of.rest;
        for (int64_t r = 0; r < R; r++) {
          const float* q = c.q.at(b, g * R + r, 0);
          float *own = weights + r * slots, top = -1e30f, total = 0;
          for (int64_t s = 0; s < slots; s += VW)
            store(own + s, all(w.scale) * dots(E, q, [&](int i) {
                    int64_t slot = std::min<int64_t>(s + i, w.slots - 1);
                    return slot == w.place ? c.k.at(b, g, 0) : w.keys.at(b, g, slot);
                  }));
          for (int64_t s = 0; s < w.slots; s++)
            if (visible[s]) top = std::max(top, own[s]);
          for (int64_t s = 0; s < slots; s += VW) store(own + s, exp(load(own + s) - all(top)));
          for (int64_t s = 0; s < slots; s++) total += own[s] = s < w.slots && visible[s] ? own[s] : 0;
          of.den[r] += total;
          const float mine = own[w.place], *v = c.v.at(b, g, 0);
          own[w.place] = 0;
          for (int64_t e = 0; e < V; e++) of.sums[r * V + e] += mine * v[e];
        }
        product(R, V, w.slots, weights, slots, 1, w.values.at(b, g, 0), w.values.token, of.sums, V, true);
      }
      for (int64_t r = 0; r < R; r++) {
        if (!w.reads_window) of.den[r] += d.eps;
        else if (of.den[r] == 0) of.den[r] = 1;
      }
      of.divide(c.out + u * R * V);
    }
  });
}

// e^g of each row, or of all where there is one for all of them; 1 where there is none.
static void gates_of(const RecurrentStep& d, int64_t b, int64_t g, int64_t rows, float* gate) {
  if (!d.gates.data) return std::fill(gate, gate + rows, 1.f);
  const int64_t n = d.gates.token ? rows : 1;
  for (int64_t f = 0; f < n; f++) gate[f] = *d.gates.at(b, g, f);
  for (int64_t f = n; f < up(n); f++) gate[f] = 0;
  for (int64_t f = 0; f < n; f += VW) store(gate + f, exp(load(gate + f)));
  for (int64_t f = n; f < rows; f++) gate[f] = gate[0];
}

static void recurrent_step(const RecurrentStep& d, Parallel parallel) {
  const Step& c = d.step;
  const int64_t F = c.size, rows = c.rows, V = c.value_size, R = c.heads / c.groups;
  run(parallel, c.batch * c.groups, heads_a_thread(c), [&](int64_t low, int64_t high) {
    float *gate = scratch(rows + VW + F * (R + 1) + (R + 1) * V), *key = gate + rows + VW, *queries = key + F,
          *values = queries + R * F, *sums = values + V;
    for (int64_t u = low; u < high; u++) {
      const int64_t b = u / c.groups, g = u % c.groups;
      const float *before = c.before + u * rows * (V + 1), *k = c.k.at(b, g, 0), *v = c.v.at(b, g, 0);
      float *after = c.after + u * rows * (V + 1), *out = c.out + u * R * V;
      const float counts = !c.seen || c.seen[b * c.seen_row] ? 1.f : 0.f;
      gates_of(d, b, g, rows, gate);
      for (int64_t r = 0; r < R; r++) memcpy(queries + r * F, c.q.at(b, g * R + r, 0), sizeof(float) * F);
      if (!d.beta.data) {
        for (int64_t f = 0; f < F; f++) {
          float n = gate[f] * before[f * (V + 1) + V] + counts;
          after[f * (V + 1) + V] = n;
          for (int64_t r = 0; r < R; r++) queries[r * F + f] /= std::max(n, 1.f);
        }
        take(R, F, V, gate, k, queries, v, before, after, out);
        continue;
      }
      // What is recalled for the key comes first: the state is written with what is wrong about it.
      const float beta = *d.beta.at(b, g, 0);
      for (int64_t f = 0; f < F; f++) key[f] = gate[f] * k[f];
      some_queries<false>(1, F, V, nullptr, nullptr, key, nullptr, before, nullptr, values);
      for (int64_t e = 0; e < V; e++) values[e] = v[e] - values[e];
      for (int64_t f = 0; f < F; f++) key[f] = beta * k[f], after[f * (V + 1) + V] = 0;
      take(R, F, V, gate, key, queries, values, before, after, sums);
      const float *total = before + F * (V + 1), last = gate[F];
      float *totals = after + F * (V + 1), number = last * total[V] + counts, by = 1.f / std::max(number, 1.f);
      totals[V] = number;
      for (int64_t e = 0; e < V; e++) totals[e] = last * total[e] + counts * v[e];
      for (int64_t r = 0; r < R; r++)
        for (int64_t e = 0; e < V; e++) out[r * V + e] = sums[r * V + e] + d.average_weight[g * R + r] * by * totals[e];
    }
  });
}

}  // namespace ISA
}  // namespace attn_plugins
