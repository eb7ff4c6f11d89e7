// Vectors of VW floats, and matrix products of tiles. Compiled once for each instruction set, each in a namespace of its own.
//
// All matrices are row-major with a row stride; what is read and written through `float*` may be unaligned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "vectors are shuffled by __builtin_shufflevector, which GCC has from version 12 on, and Clang: set CXX to one of these"
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__)
#define VW 8
#else
#define VW 4
#endif

namespace attn_plugins {
namespace ISA {

typedef float vf __attribute__((vector_size(VW * 4)));
typedef float vfu __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint8_t vb __attribute__((vector_size(VW)));
typedef uint8_t vbu __attribute__((vector_size(VW), aligned(1), may_alias));

static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf x) { *(vfu*)p = x; }
static inline vf all(float x) { return x - vf{}; }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline vf smaller(vf a, vf b) { return a < b ? a : b; }
static inline int up(int n) { return (n + VW - 1) / VW * VW; }

template <int BY, size_t... I>
static inline vf crossed(vf a, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, a, (I ^ BY)...);
}
// f of all lanes, in every lane: lane by lane it would take as long as some exponentials.
template <class F>
static inline vf folded(vf a, F f) {
  const std::make_index_sequence<VW> lanes;
  if constexpr (VW > 8) a = f(a, crossed<8>(a, lanes));
  if constexpr (VW > 4) a = f(a, crossed<4>(a, lanes));
  a = f(a, crossed<2>(a, lanes));
  return f(a, crossed<1>(a, lanes));
}
static inline vf sum_in_all(vf a) { return folded(a, [](vf x, vf y) { return x + y; }); }
static inline vf max_in_all(vf a) { return folded(a, [](vf x, vf y) { return larger(x, y); }); }
static inline float sum_of(vf a) { return sum_in_all(a)[0]; }

template <size_t... I>
static inline vi counted(int from, std::index_sequence<I...>) {
  return vi{int32_t(I)...} + from;
}
// from, from + 1, ...
static inline vi count(int from) { return counted(from, std::make_index_sequence<VW>()); }

// e^x to about 2 units in the last place: 2^n times a polynomial on |r| <= ln(2) / 2 (the coefficients of Cephes' expf).
static inline vf exp(vf x) {
  x = smaller(larger(x, all(-87.3f)), all(88.3f));
  const vf magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  vf t = x * all(1.44269504f) + magic, n = t - magic;
  vf r = x - n * all(0.693359375f) - n * all(-2.12194440e-4f);
  vf p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.f);
  return p * (vf)(((vi)t - (vi)magic + 127) << 23);
}

// By exp, and by its series where that would cancel.
static inline vf tanh(vf x) {
  vf square = x * x;
  vf series = x + x * square * (all(-0.333333333f) + square * all(0.133333333f));
  vf far = all(1.f) - all(2.f) / (exp(x + x) + all(1.f));
  return square < all(0.01f) ? series : far;
}

template <size_t... I>
static inline vf zip_low(vf a, vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? VW + I / 2 : I / 2)...);
}
template <size_t... I>
static inline vf zip_high(vf a, vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? VW + (VW + I) / 2 : (VW + I) / 2)...);
}

// to[n][m] = from[m][n] for M x N, both multiples of VW.
static inline void transpose(int M, int N, const float* from, int64_t from_row, float* to, int64_t to_row) {
  const std::make_index_sequence<VW> lanes;
  for (int m = 0; m < M; m += VW)
    for (int n = 0; n < N; n += VW) {
      vf a[VW], b[VW];
#pragma GCC unroll 16
      for (int i = 0; i < VW; i++) a[i] = load(from + (m + i) * from_row + n);
#pragma GCC unroll 4
      for (int round = 1; round < VW; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < VW / 2; i++) {
          b[2 * i] = zip_low(a[i], a[i + VW / 2], lanes);
          b[2 * i + 1] = zip_high(a[i], a[i + VW / 2], lanes);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VW; i++) a[i] = b[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < VW; i++) store(to + (n + i) * to_row + m, a[i]);
    }
}

constexpr int MR = 6;                      // rows of a register tile
constexpr int NB = VW == 16 ? 4 : 2;       // its columns, in vectors: 24 accumulators of 32 registers, or 12 of 16

template <int M, int NV>
static inline __attribute__((always_inline)) void register_tile(int K, const float* A, int64_t am, int64_t ak,
                                                                 const float* B, int64_t b_row, float* C,
                                                                 int64_t c_row, bool add) {
  vf sum[M][NV];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) sum[m][n] = add ? load(C + m * c_row + n * VW) : vf{};
  for (int k = 0; k < K; k++) {
    vf b[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) b[n] = load(B + k * b_row + n * VW);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vf a = all(A[m * am + k * ak]);
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) sum[m][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) store(C + m * c_row + n * VW, sum[m][n]);
}

template <int M>
static void row_of_tiles(int N, int K, const float* A, int64_t am, int64_t ak, const float* B, int64_t b_row, float* C,
                         int64_t c_row, bool add) {
  int n = 0;
  for (; n + NB * VW <= N; n += NB * VW) register_tile<M, NB>(K, A, am, ak, B + n, b_row, C + n, c_row, add);
  int rest = (N - n) / VW;
  if constexpr (NB > 3)
    if (rest == 3) register_tile<M, 3>(K, A, am, ak, B + n, b_row, C + n, c_row, add);
  if constexpr (NB > 2)
    if (rest == 2) register_tile<M, 2>(K, A, am, ak, B + n, b_row, C + n, c_row, add);
  if (rest == 1) register_tile<M, 1>(K, A, am, ak, B + n, b_row, C + n, c_row, add);
}

// C (+)= A B for at most MR rows; A[m][k] is A[m * am + k * ak], N is a multiple of VW.
static inline void rows(int M, int N, int K, const float* A, int64_t am, int64_t ak, const float* B, int64_t b_row,
                        float* C, int64_t c_row, bool add) {
  switch (M) {
    case 1: return row_of_tiles<1>(N, K, A, am, ak, B, b_row, C, c_row, add);
    case 2: return row_of_tiles<2>(N, K, A, am, ak, B, b_row, C, c_row, add);
    case 3: return row_of_tiles<3>(N, K, A, am, ak, B, b_row, C, c_row, add);
    case 4: return row_of_tiles<4>(N, K, A, am, ak, B, b_row, C, c_row, add);
    case 5: return row_of_tiles<5>(N, K, A, am, ak, B, b_row, C, c_row, add);
    case 6: return row_of_tiles<6>(N, K, A, am, ak, B, b_row, C, c_row, add);
  }
}

// Of each MR rows, what of the other dimension there is anything in: [low, high), a pair a set of rows.
struct Ranges {
  const uint8_t* pairs = nullptr;
  int low(int m, int all_of) const { return pairs ? pairs[m / MR * 2] : 0; }
  int high(int m, int all_of) const { return pairs ? std::min<int>(pairs[m / MR * 2 + 1], all_of) : all_of; }
};

// Rows of memory that are needed soon. They are fetched a few at a time while products are computed: rows of a head lie
// apart from each other, which no processor foresees, and where all are asked for at once each waits for the others.
class Ahead {
  struct Rows {
    const float* first;
    int64_t step;
    int number, size;
  };
  std::vector<Rows> list;
  size_t at = 0;
  int row = 0;

 public:
  void add(const float* first, int64_t step, int number, int size) {
    if (number > 0) list.push_back({first, step, number, size});
  }
  void some(int rows) {
    for (; rows > 0 && at < list.size(); rows--) {
      const Rows& r = list[at];
      for (int i = 0; i < r.size; i += 16) __builtin_prefetch(r.first + row * r.step + i, 0, 2);
      if (++row == r.number) row = 0, at++;
    }
  }
  void all() {
    while (at < list.size()) some(TILE);
    list.clear(), at = 0;
  }
};

// C (+)= A B. Of C only the columns within `columns` are needed, and of A only those within `inner` are not 0.
static inline void product(int M, int N, int K, const float* A, int64_t am, int64_t ak, const float* B, int64_t b_row,
                           float* C, int64_t c_row, bool add, Ranges columns = {}, Ranges inner = {},
                           Ahead* ahead = nullptr) {
  for (int m = 0; m < M; m += MR) {
    if (ahead) ahead->some(MR);
    int n0 = columns.low(m, N) / VW * VW, n1 = up(columns.high(m, N));
    int k0 = inner.low(m, K), k1 = inner.high(m, K);
    if (n1 <= n0 || (k1 <= k0 && add)) continue;
    k1 = std::max(k0, k1);
    rows(std::min(MR, M - m), n1 - n0, k1 - k0, A + m * am + k0 * ak, am, ak, B + k0 * b_row + n0, b_row,
         C + m * c_row + n0, c_row, add);
  }
}

static inline float* scratch(size_t floats) {
  static thread_local std::vector<float> held;
#if defined(__SANITIZE_ADDRESS__)
  held.clear(), held.shrink_to_fit();  // no larger than asked for, so that what is written behind it is seen
#endif
  if (held.size() < floats + 16) held.resize(floats + 16);
  return (float*)(((uintptr_t)held.data() + 63) / 64 * 64);
}

// f(begin, end) over 0..number, on threads.
template <class F>
static void run(Parallel parallel, int64_t number, int64_t grain, F f) {
  parallel(number, grain, [](void* context, int64_t low, int64_t high) { (*(F*)context)(low, high); }, &f);
}

}  // namespace ISA
}  // namespace attn_plugins
