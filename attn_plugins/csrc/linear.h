// Linear attention, forward and backward: chunks of TILE tokens, and between them a state of sums of phi(k) [v, 1]^T.
//
// The features of a chunk and the weights within it are made again in the backward; states are kept.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace attn_plugins {
namespace ISA {

// Ranges of the lower triangle of TILE x TILE, row by row and column by column.
struct Triangle {
  uint8_t rows[2 * GROUPS], columns[2 * GROUPS];
  Triangle() {
    for (int m = 0; m < GROUPS; m++) {
      rows[2 * m] = 0, rows[2 * m + 1] = std::min(TILE, MR * (m + 1));
      columns[2 * m] = MR * m, columns[2 * m + 1] = TILE;
    }
  }
};

// f = phi(x), for rows of x.
static void features(Map map, int n, int E, const float* x, int64_t x_row, float* f) {
  const int F = map == HEDGEHOG ? 2 * E : E;
  for (int i = 0; i < n; i++) {
    const float* a = x + i * x_row;
    float* o = f + i * F;
    if (map == HEDGEHOG) {
      vf high = load(a), low = high, sum_plus{}, sum_minus{};
      for (int e = VW; e < E; e += VW) high = larger(high, load(a + e)), low = smaller(low, load(a + e));
      vf top = max_in_all(high), bottom = -max_in_all(-low);
      for (int e = 0; e < E; e += VW) {
        vf plus = exp(load(a + e) - top), minus = exp(bottom - load(a + e));
        sum_plus += plus, sum_minus += minus;
        store(o + e, plus), store(o + E + e, minus);
      }
      vf by_plus = all(1 / sum_of(sum_plus)), by_minus = all(1 / sum_of(sum_minus)), least = all(1e-12f);
      for (int e = 0; e < E; e += VW) {
        store(o + e, larger(load(o + e) * by_plus, least));
        store(o + E + e, larger(load(o + E + e) * by_minus, least));
      }
      continue;
    }
    for (int e = 0; e < E; e += VW) {
      vf y = load(a + e), plus = larger(y, vf{});
      store(o + e, map == ELU ? exp(smaller(y, vf{})) + plus : map == RELU ? plus : map == RELU2 ? plus * plus : y);
    }
  }
}

// dx of df, from f alone: every map is told from its value.
static void features_backward(Map map, int n, int E, const float* f, const float* df, float* dx, int64_t dx_row) {
  const int F = map == HEDGEHOG ? 2 * E : E;
  for (int i = 0; i < n; i++) {
    const float *a = f + i * F, *g = df + i * F;
    float* o = dx + i * dx_row;
    if (map == HEDGEHOG) {
      vf plus{}, minus{};
      for (int e = 0; e < E; e += VW) plus += load(a + e) * load(g + e), minus += load(a + E + e) * load(g + E + e);
      vf p = sum_in_all(plus), m = sum_in_all(minus);
      for (int e = 0; e < E; e += VW)
        store(o + e, load(a + e) * (load(g + e) - p) - load(a + E + e) * (load(g + E + e) - m));
      continue;
    }
    for (int e = 0; e < E; e += VW) {
      vf y = load(a + e), d = load(g + e);
      if (map == ELU) d *= smaller(y, all(1.f));
      if (map == RELU) d = y > vf{} ? d : vf{};
      if (map == RELU2) {
        vf root;
        for (int l = 0; l < VW; l++) root[l] = std::sqrt(y[l]);
        d *= all(2.f) * root;
      }
      store(o + e, d);
    }
  }
}

// A run and a key/value head: chunks of it, one at a time.
struct Chunks {
  const Linear& c;
  const Run& r;
  int64_t g, F, V, sums;
  const Triangle triangle;

  Chunks(const Linear& call, int64_t run, int64_t g)
      : c(call), r(call.runs[run]), g(g), F(call.features), V(call.value_size), sums(F * (V + 1)) {}
  int64_t number() const { return (r.length + TILE - 1) / TILE; }
  int64_t token(int64_t x) const { return r.start + x * TILE; }
  int tokens(int64_t x) const { return int(std::min<int64_t>(TILE, r.length - x * TILE)); }
  float* state(int64_t x) const {
    return c.states + ((c.causal ? r.first_chunk + x : &r - c.runs) * c.groups + g) * sums;
  }
  // A chunk's rows of a head are needed soon.
  void soon(Ahead& ahead, const View& rows, int64_t h, int64_t x, int size) const {
    ahead.add(rows.at(r.row, h, token(x)), rows.token, tokens(x), size);
  }
  void keys_soon(Ahead& ahead, int64_t x) const {
    soon(ahead, c.k, g, x, c.size);
    soon(ahead, c.v, g, x, V);
  }
  void state_soon(Ahead& ahead, int64_t x) const { ahead.add(state(x), 16, sums / 16, 16); }
  // phi of a chunk's keys, zeros where they are padding; rows after the last are zeros too.
  void keys(int64_t x, float* f) const {
    int n = tokens(x);
    features(c.map, n, c.size, c.k.at(r.row, g, token(x)), c.k.token, f);
    for (int i = 0; c.padding && i < n; i++)
      if (!c.padding[r.row * c.tokens + token(x) + i]) memset(f + i * F, 0, sizeof(float) * F);
    memset(f + n * F, 0, sizeof(float) * (TILE - n) * F);
  }
  // Adds a chunk's keys to sums (F, V), and F behind them.
  void absorb(int64_t x, const float* f, float* S, Ahead& ahead) const {
    static const std::vector<float> ones(TILE, 1.f);
    product(F, V, tokens(x), f, 1, F, c.v.at(r.row, g, token(x)), c.v.token, S, V, true, {}, {}, &ahead);
    product(1, F, tokens(x), ones.data(), 0, 1, f, F, S + F * V, F, true);
  }
};

// The lower triangle of a chunk's weights, to row i of which more[i] is added: zeros above, as far as a product that has
// the ranges of a triangle looks.
static void keep_lower(float* A, int n, const float* more = nullptr) {
  for (int i = 0; i < n; i++) {
    const vf add = all(more ? more[i] : 0.f);
    for (int j = more ? 0 : i / VW * VW; j < up(std::min(TILE, (i / MR + 1) * MR)); j += VW)
      store(A + i * TILE + j, count(j) <= vi{} + i ? load(A + i * TILE + j) + add : vf{});
  }
}

// How many pieces a run and head are cut into, so that there is work for all threads.
static int64_t pieces(const Linear& c, int threads) {
  return std::max<int64_t>(1, std::min<int64_t>(threads / std::max<int64_t>(1, c.number * c.groups), 16));
}

static void linear_forward(const Linear& c, Parallel parallel, int threads) {
  const int64_t F = c.features, V = c.value_size, shared = c.heads / c.groups;
  // What a piece of a run adds up to, then what comes before it.
  const int64_t P = pieces(c, threads), units = c.number * c.groups, sums = F * (V + 1);
  std::vector<float> before(P * units * sums, 0.f);
  if (P > 1 || !c.causal)
    run(parallel, units * P, 1, [&](int64_t low, int64_t high) {
      float* f = scratch(TILE * F);
      Ahead ahead;
      for (int64_t u = low; u < high; u++) {
        Chunks s(c, u / P / c.groups, u / P % c.groups);
        const int64_t end = s.number() * (u % P + 1) / P;
        for (int64_t x = s.number() * (u % P) / P; x < end; x++) {
          if (x + 1 < end) s.keys_soon(ahead, x + 1);
          s.keys(x, f);
          s.absorb(x, f, before.data() + u * sums, ahead);
          ahead.all();
        }
      }
    });
  for (int64_t u = 0; u < units; u++) {  // sums of a piece -> those of all pieces before it; or of all pieces
    float* own = before.data() + u * P * sums;
    std::vector<float> total(sums, 0.f);
    for (int64_t p = 0; p < P; p++)
      for (int64_t i = 0; i < sums; i++) {
        float one = own[p * sums + i];
        own[p * sums + i] = total[i];
        total[i] += one;
      }
    if (!c.causal) memcpy(Chunks(c, u / c.groups, u % c.groups).state(0), total.data(), sizeof(float) * sums);
  }
  run(parallel, units * P, 1, [&](int64_t low, int64_t high) {
    float *fq = scratch(TILE * F * 3 + TILE * TILE + TILE * V + sums), *fk = fq + TILE * F, *fkT = fk + TILE * F,
          *A = fkT + TILE * F, *num = A + TILE * TILE, *carried = num + TILE * V;
    Ahead ahead;
    for (int64_t u = low; u < high; u++) {
      Chunks s(c, u / P / c.groups, u / P % c.groups);
      memcpy(carried, c.causal ? before.data() + u * sums : s.state(0), sizeof(float) * sums);
      const float* z = carried + F * V;
      const int64_t end = s.number() * (u % P + 1) / P, first = s.g * shared;
      for (int64_t x = s.number() * (u % P) / P; x < end; x++) {
        int n = s.tokens(x);
        if (c.causal) {
          memcpy(s.state(x), carried, sizeof(float) * sums);
          s.keys(x, fk);
          transpose(TILE, F, fk, F, fkT, TILE);
        }
        for (int64_t h = first; h < first + shared; h++) {
          const bool last = h + 1 == first + shared;
          s.soon(ahead, c.out, h, x, V);
          if (!last || x + 1 < end) s.soon(ahead, c.q, last ? first : h + 1, last ? x + 1 : x, c.size);
          if (last && c.causal && x + 1 < end) s.keys_soon(ahead, x + 1), s.state_soon(ahead, x + 1);
          features(c.map, n, c.size, c.q.at(s.r.row, h, s.token(x)), c.q.token, fq);
          product(n, V, F, fq, F, 1, carried, V, num, V, false, {}, {}, &ahead);
          if (c.causal) {
            product(n, TILE, F, fq, F, 1, fkT, TILE, A, TILE, false, {s.triangle.rows}, {}, &ahead);
            keep_lower(A, n);
            product(n, V, n, A, TILE, 1, c.v.at(s.r.row, s.g, s.token(x)), c.v.token, num, V, true, {}, {s.triangle.rows},
                    &ahead);
          }
          for (int i = 0; i < n; i++) {
            vf a{};
            if (c.causal)
              for (int j = 0; j < up(i + 1); j += VW) a += load(A + i * TILE + j);
            for (int e = 0; e < F; e += VW) a += load(fq + i * F + e) * load(z + e);
            float den = sum_of(a);
            c.den[(s.r.row * c.heads + h) * c.tokens + s.token(x) + i] = den;
            vf by = all(c.divided ? 1.f / (den + c.eps) : 1.f);
            float* out = c.out.at(s.r.row, h, s.token(x) + i);
            for (int e = 0; e < V; e += VW) store(out + e, load(num + i * V + e) * by);
          }
        }
        if (c.causal) s.absorb(x, fk, carried, ahead);
        ahead.all();
      }
    }
  });
}

static void linear_backward(const LinearBackward& d, Parallel parallel, int threads) {
  const Linear& c = d.forward;
  const int64_t F = c.features, V = c.value_size, shared = c.heads / c.groups;
  const int64_t P = pieces(c, threads), units = c.number * c.groups, sums = F * (V + 1);
  // Gradients of numerators (n, V) and denominators (n) of a chunk's outputs.
  auto of_outputs = [&](const Chunks& s, int64_t x, int64_t h, float* dnum, float* dden) {
    for (int i = 0; i < s.tokens(x); i++) {
      int64_t t = s.token(x) + i;
      const float *g = d.grad.at(s.r.row, h, t), *o = c.out.at(s.r.row, h, t);
      const int64_t at = (s.r.row * c.heads + h) * c.tokens + t;
      if (!c.divided) {
        memcpy(dnum + i * V, g, sizeof(float) * V);
        dden[i] = d.grad_den[at];
        continue;
      }
      float by = 1.f / (c.den[at] + c.eps);
      vf a{};
      for (int e = 0; e < V; e += VW) {
        a += load(g + e) * load(o + e);
        store(dnum + i * V + e, load(g + e) * all(by));
      }
      dden[i] = -sum_of(a) * by;
    }
  };
  // Adds what a chunk's queries bring to the gradient of the sums that they read.
  auto absorb = [&](int n, const float* fq, const float* dnum, const float* dden, float* dS, Ahead& ahead) {
    product(F, V, n, fq, 1, F, dnum, V, dS, V, true, {}, {}, &ahead);
    product(1, F, n, dden, 0, 1, fq, F, dS + F * V, F, true);
  };
  // A chunk's rows of queries, and what belongs to them.
  auto queries_soon = [&](const Chunks& s, Ahead& ahead, int64_t h, int64_t x) {
    s.soon(ahead, c.q, h, x, c.size);
    s.soon(ahead, d.grad, h, x, V);
    s.soon(ahead, c.out, h, x, V);
  };
  std::vector<float> after(P * units * sums, 0.f);
  if (P > 1 || !c.causal)
    run(parallel, units * P, 1, [&](int64_t low, int64_t high) {
      float *fq = scratch(TILE * (F + V + 1)), *dnum = fq + TILE * F, *dden = dnum + TILE * V;
      Ahead ahead;
      for (int64_t u = low; u < high; u++) {
        Chunks s(c, u / P / c.groups, u / P % c.groups);
        const int64_t end = s.number() * (u % P + 1) / P;
        for (int64_t x = s.number() * (u % P) / P; x < end; x++)
          for (int64_t h = s.g * shared; h < (s.g + 1) * shared; h++) {
            if (x + 1 < end) queries_soon(s, ahead, h, x + 1);
            features(c.map, s.tokens(x), c.size, c.q.at(s.r.row, h, s.token(x)), c.q.token, fq);
            of_outputs(s, x, h, dnum, dden);
            absorb(s.tokens(x), fq, dnum, dden, after.data() + u * sums, ahead);
            ahead.all();
          }
      }
    });
  for (int64_t u = 0; u < units; u++) {  // those of all pieces after it; or of all pieces
    float* own = after.data() + u * P * sums;
    std::vector<float> total(sums, 0.f);
    for (int64_t p = P - 1; p >= 0; p--)
      for (int64_t i = 0; i < sums; i++) {
        float one = own[p * sums + i];
        own[p * sums + i] = total[i];
        total[i] += one;
      }
    for (int64_t p = 0; !c.causal && p < P; p++) memcpy(own + p * sums, total.data(), sizeof(float) * sums);
  }
  run(parallel, units * P, 1, [&](int64_t low, int64_t high) {
    float* s0 = scratch(TILE * (F * 5 + V * 3 + 1) + TILE * TILE * 2 + F * V * 2 + sums);
    float *fq = s0, *fk = fq + TILE * F, *fkT = fk + TILE * F, *dfq = fkT + TILE * F, *dfk = dfq + TILE * F,
          *dnum = dfk + TILE * F, *vT = dnum + TILE * V, *dv = vT + TILE * V, *dden = dv + TILE * V,
          *A = dden + TILE, *dA = A + TILE * TILE, *ST = dA + TILE * TILE, *dST = ST + F * V, *dS = dST + F * V;
    Ahead ahead;
    for (int64_t u = low; u < high; u++) {
      Chunks s(c, u / P / c.groups, u / P % c.groups);
      memcpy(dS, after.data() + u * sums, sizeof(float) * sums);
      const float* dz = dS + F * V;
      const Ranges rows{s.triangle.rows}, columns{s.triangle.columns};
      const int64_t begin = s.number() * (u % P) / P, first = s.g * shared;
      for (int64_t x = s.number() * (u % P + 1) / P - 1; x >= begin; x--) {
        const int n = s.tokens(x);
        const float *S = s.state(x), *z = S + F * V, *v = c.v.at(s.r.row, s.g, s.token(x));
        s.soon(ahead, d.dq, first, x, c.size);
        s.soon(ahead, d.dk, s.g, x, c.size);
        s.soon(ahead, d.dv, s.g, x, V);
        s.keys(x, fk);
        transpose(F, V, S, V, ST, F);
        transpose(F, V, dS, V, dST, F);
        if (c.causal) {
          transpose(TILE, F, fk, F, fkT, TILE);
          if (n == TILE) transpose(TILE, V, v, c.v.token, vT, TILE);
          else {
            memset(vT, 0, sizeof(float) * V * TILE);
            for (int i = 0; i < n; i++)
              for (int e = 0; e < V; e++) vT[e * TILE + i] = v[i * c.v.token + e];
          }
        }
        // Keys and values get what later queries bring, then what this chunk's do.
        for (int i = 0; i < n; i++) memcpy(dfk + i * F, dz, sizeof(float) * F);
        product(n, F, V, v, c.v.token, 1, dST, F, dfk, F, true, {}, {}, &ahead);
        product(n, V, F, fk, F, 1, dS, V, dv, V, false, {}, {}, &ahead);
        for (int64_t h = first; h < first + shared; h++) {
          const bool last = h + 1 == first + shared;
          if (!last) s.soon(ahead, d.dq, h + 1, x, c.size);
          if (!last || x > begin) queries_soon(s, ahead, last ? first : h + 1, last ? x - 1 : x);
          if (last && x > begin) {
            s.keys_soon(ahead, x - 1);
            if (c.causal) s.state_soon(ahead, x - 1);
          }
          features(c.map, n, c.size, c.q.at(s.r.row, h, s.token(x)), c.q.token, fq);
          of_outputs(s, x, h, dnum, dden);
          for (int i = 0; i < n; i++)
            for (int e = 0; e < F; e += VW) store(dfq + i * F + e, all(dden[i]) * load(z + e));
          product(n, F, V, dnum, V, 1, ST, F, dfq, F, true, {}, {}, &ahead);
          if (c.causal) {
            product(n, TILE, F, fq, F, 1, fkT, TILE, A, TILE, false, rows, {}, &ahead);
            product(n, TILE, V, dnum, V, 1, vT, TILE, dA, TILE, false, rows, {}, &ahead);
            keep_lower(A, n);
            keep_lower(dA, n, dden);
            product(n, F, n, dA, TILE, 1, fk, F, dfq, F, true, {}, rows, &ahead);
            product(n, F, n, dA, 1, TILE, fq, F, dfk, F, true, {}, columns, &ahead);
            product(n, V, n, A, 1, TILE, dnum, V, dv, V, true, {}, columns, &ahead);
            absorb(n, fq, dnum, dden, dS, ahead);
          }
          ahead.all();
          features_backward(c.map, n, c.size, fq, dfq, d.dq.at(s.r.row, h, s.token(x)), d.dq.token);
        }
        for (int i = 0; c.padding && i < n; i++)
          if (!c.padding[s.r.row * c.tokens + s.token(x) + i]) memset(dfk + i * F, 0, sizeof(float) * F);
        features_backward(c.map, n, c.size, fk, dfk, d.dk.at(s.r.row, s.g, s.token(x)), d.dk.token);
        for (int i = 0; i < n; i++)
          memcpy(d.dv.at(s.r.row, s.g, s.token(x) + i), dv + i * V, sizeof(float) * V);
      }
    }
  });
}

}  // namespace ISA
}  // namespace attn_plugins
