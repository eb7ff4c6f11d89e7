// Registers the kernels as operators of torch, and chooses those of the instruction set that this machine has.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

namespace attn_plugins {

#if defined(__x86_64__)
extern const Kernels avx512_kernels, avx2_kernels;
#endif
extern const Kernels generic_kernels;

namespace {

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    found.push_back(&avx512_kernels);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2_kernels);
#endif
  found.push_back(&generic_kernels);
  return found;
}

const Kernels*& chosen() {
  static const Kernels* kernels = available().front();
  return kernels;
}

// Names of the instruction sets that this machine has kernels for, the one that is used first.
std::string instruction_sets() {
  std::string names = chosen()->name;
  for (const Kernels* one : available())
    if (one != chosen()) names += std::string(",") + one->name;
  return names;
}

void use_instruction_set(std::string name) {
  for (const Kernels* one : available())
    if (name == one->name) {
      chosen() = one;
      return;
    }
  TORCH_CHECK(false, "no kernels for '", name, "' on this machine; allowed: ", instruction_sets());
}

// The product of two matrices, computed so many times by one thread, as the tiles of all kernels are multiplied: to be
// held to torch's own, and to be timed.
at::Tensor tile_product(const at::Tensor& a, const at::Tensor& b, int64_t times) {
  TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && b.size(1) % 16 == 0 && a.is_contiguous() &&
                  b.is_contiguous() && a.scalar_type() == at::kFloat && b.scalar_type() == at::kFloat,
              "a product is of two dense float32 matrices, the second's columns a multiple of 16, got ", a.sizes(), " and ",
              b.sizes());
  auto c = at::empty({a.size(0), b.size(1)}, a.options());
  for (int64_t i = 0; i < times; i++)
    chosen()->product(int(a.size(0)), int(b.size(1)), int(a.size(1)), a.const_data_ptr<float>(),
                      b.const_data_ptr<float>(), c.data_ptr<float>());
  return c;
}

#if defined(__SANITIZE_THREAD__)
// Threads whose beginning and end the sanitizer sees, which those of OpenMP hide from it.
void on_threads(int64_t number, int64_t grain, Work work, void* context) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), number / std::max<int64_t>(1, grain)));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < parts; i++)
    threads.emplace_back([=] { work(context, number * i / parts, number * (i + 1) / parts); });
  for (auto& thread : threads) thread.join();
}
#else
void on_threads(int64_t number, int64_t grain, Work work, void* context) {
  at::parallel_for(0, number, grain, [&](int64_t low, int64_t high) { work(context, low, high); });
}
#endif

View view(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && x.device().is_cpu() && (x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0),
              name, " must be a float32 tensor (batch, heads, tokens, size) on the CPU with a dense last dimension, got ",
              x.sizes(), " of ", x.scalar_type(), " with strides ", x.strides());
  TORCH_CHECK(x.size(3) % 16 == 0, name, " must have a size that is a multiple of 16, got ", x.size(3));
  return {const_cast<float*>(x.const_data_ptr<float>()), x.stride(0), x.stride(1), x.stride(2)};
}

// Memory in the order (batch, tokens, heads, size), as projections make and take it.
at::Tensor by_token(const at::Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t size, bool zeros) {
  auto made = zeros ? at::zeros({batch, tokens, heads, size}, like.options())
                    : at::empty({batch, tokens, heads, size}, like.options());
  return made.transpose(1, 2);
}

template <class T>
const T* table(const at::Tensor& x, at::ScalarType type, int64_t width, const char* name) {
  TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() % width == 0, name, " is not such a table");
  return reinterpret_cast<const T*>(x.const_data_ptr());
}

Softmax softmax(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& tiles,
                const at::Tensor& blocks, const at::Tensor& index, const at::Tensor& masks, const at::Tensor& ranges,
                bool merged, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks,
                double scale, double softcap, double dropout, int64_t seed) {
  Softmax c{};
  c.batch = q.size(0), c.heads = q.size(1), c.queries = q.size(2), c.size = q.size(3);
  c.groups = k.size(1), c.keys = k.size(2), c.value_size = v.size(3);
  c.q = view(q, "q"), c.k = view(k, "k"), c.v = view(v, "v");
  TORCH_CHECK(k.size(0) == c.batch && v.size(0) == c.batch && v.size(1) == c.groups && v.size(2) == c.keys &&
                  k.size(3) == c.size && c.groups > 0 && c.heads % c.groups == 0,
              "queries ", q.sizes(), ", keys ", k.sizes(), " and values ", v.sizes(), " do not fit each other");
  c.tiles.tiles = table<Tile>(tiles, at::kInt, sizeof(Tile) / 4, "tiles");
  c.tiles.blocks = table<Block>(blocks, at::kInt, sizeof(Block) / 4, "blocks");
  c.tiles.index = table<int32_t>(index, at::kInt, 1, "index");
  c.tiles.masks = table<uint8_t>(masks, at::kByte, TILE * TILE, "masks");
  c.tiles.ranges = table<uint8_t>(ranges, at::kByte, RANGES, "ranges");
  c.tiles.number = tiles.numel() / int64_t(sizeof(Tile) / 4);
  c.tiles.merged = merged;
  if (bias.has_value()) {
    TORCH_CHECK(bias->scalar_type() == at::kFloat, "a bias must be float32, got ", bias->scalar_type());
    auto every = bias->expand({c.batch, c.heads, c.queries, c.keys});
    c.bias = bias->const_data_ptr<float>();
    c.bias_batch = every.stride(0), c.bias_head = every.stride(1);
    c.bias_query = every.stride(2), c.bias_key = every.stride(3);
  }
  if (sinks.has_value()) {
    TORCH_CHECK(sinks->numel() == c.heads && sinks->is_contiguous() && sinks->scalar_type() == at::kFloat,
                "sinks must be float32, one a head, got ", sinks->sizes());
    c.sinks = sinks->const_data_ptr<float>();
  }
  c.scale = scale, c.softcap = softcap, c.dropout = dropout, c.seed = seed;
  return c;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> softmax_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& tiles, const at::Tensor& blocks,
    const at::Tensor& index, const at::Tensor& masks, const at::Tensor& ranges, bool merged,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks, double scale, double softcap,
    double dropout, int64_t seed) {
  Softmax c = softmax(q, k, v, tiles, blocks, index, masks, ranges, merged, bias, sinks, scale, softcap, dropout, seed);
  auto out = by_token(q, c.batch, c.heads, c.queries, c.value_size, false);
  auto lse = at::empty({c.batch, c.heads, c.queries}, q.options());
  auto top = at::empty({c.batch, c.heads, c.queries}, q.options());
  c.out = view(out, "out"), c.lse = lse.data_ptr<float>(), c.top = top.data_ptr<float>();
  chosen()->softmax_forward(c, on_threads);
  return {out, lse, top};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> softmax_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_lse, const std::optional<at::Tensor>& grad_top,
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& top, const at::Tensor& tiles, const at::Tensor& blocks, const at::Tensor& index, const at::Tensor& masks, const at::Tensor& ranges, bool merged,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& sinks, int64_t bias_rows, double scale,
    double softcap, double dropout, int64_t seed) {
  SoftmaxBackward d{};
  Softmax& c = d.forward;
  c = softmax(q, k, v, tiles, blocks, index, masks, ranges, merged, bias, sinks, scale, softcap, dropout, seed);
  c.out = view(out, "out"), c.lse = const_cast<float*>(lse.const_data_ptr<float>());
  c.top = const_cast<float*>(top.const_data_ptr<float>());
  d.grad = view(grad, "grad");
  at::Tensor d_bias = at::zeros({bias_rows, c.heads, bias_rows ? c.queries : 0, c.keys}, q.options());
  if (bias_rows) d.d_bias = d_bias.data_ptr<float>(), d.d_bias_batch = bias_rows > 1 ? c.heads * c.queries * c.keys : 0;
  // Few heads leave threads without work: they share tiles then, each with gradients of its own, which are summed up.
  bool alone = merged || (bias_rows == 1 && c.batch > 1);
  d.parts = alone ? 1 : std::max<int64_t>(1, std::min(c.tiles.number / 4, at::get_num_threads() / std::max<int64_t>(1, c.batch * c.groups)));
  auto dq = by_token(q, c.batch, c.heads, c.queries, c.size, true);
  auto dk = at::zeros({d.parts, c.batch, c.keys, c.groups, c.size}, q.options());
  auto dv = at::zeros({d.parts, c.batch, c.keys, c.groups, c.value_size}, q.options());
  d.dq = view(dq, "dq"), d.dk = view(dk[0].transpose(1, 2), "dk"), d.dv = view(dv[0].transpose(1, 2), "dv");
  d.parts_k = dk.stride(0), d.parts_v = dv.stride(0);
  at::Tensor dense_lse, dense_top;
  if (grad_lse.has_value()) d.grad_lse = (dense_lse = grad_lse->contiguous()).const_data_ptr<float>();
  if (grad_top.has_value()) {
    dense_top = at::empty({c.batch, c.heads, c.queries}, q.options());
    dense_top.copy_(*grad_top);
    d.grad_top = dense_top.data_ptr<float>();
  }
  chosen()->softmax_backward(d, on_threads);
  auto total = [&](const at::Tensor& x) { return (d.parts == 1 ? x[0] : x.sum(0)).transpose(1, 2); };
  return {dq, total(dk), total(dv), d_bias};
}

Chosen chosen_blocks(const Softmax& c, const at::Tensor& chosen, const at::Tensor& first, const at::Tensor& keys,
                     const std::optional<at::Tensor>& padding, bool causal, int64_t before) {
  Chosen x{};
  TORCH_CHECK(chosen.dim() == 4 && chosen.size(0) == c.batch && chosen.size(1) > 0 && c.heads % chosen.size(1) == 0 &&
                  chosen.size(2) == c.queries,
              "chosen must be (batch, heads, queries, width), got ", chosen.sizes());
  x.heads = chosen.size(1);
  TORCH_CHECK(first.dim() == 2 && first.size(0) == c.batch && first.sizes() == keys.sizes(), "first and keys must be (batch, blocks)");
  x.chosen = table<int64_t>(chosen, at::kLong, 1, "chosen"), x.width = chosen.size(3), x.number = first.size(1);
  x.first = table<int32_t>(first, at::kInt, 1, "first"), x.keys = table<int32_t>(keys, at::kInt, 1, "keys");
  for (int64_t i = 0; i < first.numel(); i++)
    TORCH_CHECK(x.first[i] >= 0 && x.keys[i] >= 0 && x.first[i] + x.keys[i] <= c.keys, "block ", i, " is not of these keys");
  for (int64_t i = 0; i < chosen.numel(); i++)
    TORCH_CHECK(x.chosen[i] < x.number, "there is no block ", x.chosen[i], ", only ", x.number);
  if (padding.has_value()) {
    TORCH_CHECK(padding->element_size() == 1 && padding->is_contiguous() && padding->numel() == c.batch * c.keys,
                "padding must be (batch, keys) bytes, got ", padding->sizes());
    x.padding = reinterpret_cast<const uint8_t*>(padding->const_data_ptr());
  }
  x.causal = causal, x.before = before;
  return x;
}

Softmax over_chosen(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale, double dropout,
                    int64_t seed) {
  auto none = at::empty({0}, at::kInt), nothing = at::empty({0}, at::kByte);
  return softmax(q, k, v, none, none, none, nothing, nothing, true, {}, {}, scale, 0, dropout, seed);
}

std::tuple<at::Tensor, at::Tensor> chosen_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& chosen_BHQT, const at::Tensor& first,
    const at::Tensor& keys, const std::optional<at::Tensor>& padding, bool causal, int64_t before, double scale,
    double dropout, int64_t seed) {
  Softmax c = over_chosen(q, k, v, scale, dropout, seed);
  Chosen x = chosen_blocks(c, chosen_BHQT, first, keys, padding, causal, before);
  auto out = by_token(q, c.batch, c.heads, c.queries, c.value_size, false);
  auto lse = at::empty({c.batch, c.heads, c.queries}, q.options()), top = at::empty({c.batch, c.heads, c.queries}, q.options());
  c.out = view(out, "out"), c.lse = lse.data_ptr<float>(), c.top = top.data_ptr<float>();
  chosen()->chosen_forward(c, x, on_threads);
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> chosen_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& chosen_BHQT, const at::Tensor& first, const at::Tensor& keys,
    const std::optional<at::Tensor>& padding, bool causal, int64_t before, double scale, double dropout, int64_t seed) {
  SoftmaxBackward d{};
  Softmax& c = d.forward;
  c = over_chosen(q, k, v, scale, dropout, seed);
  Chosen x = chosen_blocks(c, chosen_BHQT, first, keys, padding, causal, before);
  c.out = view(out, "out"), c.lse = const_cast<float*>(lse.const_data_ptr<float>());
  d.grad = view(grad, "grad"), d.parts = 1;
  auto dq = by_token(q, c.batch, c.heads, c.queries, c.size, false);
  auto dk = by_token(q, c.batch, c.groups, c.keys, c.size, true);
  auto dv = by_token(q, c.batch, c.groups, c.keys, c.value_size, true);
  d.dq = view(dq, "dq"), d.dk = view(dk, "dk"), d.dv = view(dv, "dv");
  chosen()->chosen_backward(d, x, on_threads);
  return {dq, dk, dv};
}

Linear linear(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& runs,
              const std::optional<at::Tensor>& padding, int64_t map, bool causal, bool divided, double eps) {
  Linear c{};
  c.batch = q.size(0), c.heads = q.size(1), c.groups = k.size(1), c.tokens = q.size(2), c.size = q.size(3);
  c.value_size = v.size(3), c.map = Map(map), c.causal = causal, c.divided = divided, c.eps = eps;
  TORCH_CHECK(map >= ELU && map <= IDENTITY, "no such feature map: ", map);
  c.features = map == HEDGEHOG ? 2 * c.size : c.size;
  c.q = view(q, "q"), c.k = view(k, "k"), c.v = view(v, "v");
  TORCH_CHECK(k.size(0) == c.batch && v.size(0) == c.batch && v.size(1) == c.groups && k.size(2) == c.tokens &&
                  v.size(2) == c.tokens && k.size(3) == c.size && c.groups > 0 && c.heads % c.groups == 0,
              "queries ", q.sizes(), ", keys ", k.sizes(), " and values ", v.sizes(), " do not fit each other");
  c.runs = table<Run>(runs, at::kInt, sizeof(Run) / 4, "runs");
  c.number = runs.numel() / int64_t(sizeof(Run) / 4);
  for (int64_t i = 0; i < c.number; i++) {
    const Run& r = c.runs[i];
    TORCH_CHECK(r.row >= 0 && r.row < c.batch && r.start >= 0 && r.length >= 0 && r.start + r.length <= c.tokens &&
                    r.first_chunk == c.chunks, "run ", i, " is not one of these tokens");
    c.chunks += (r.length + TILE - 1) / TILE;
  }
  if (padding.has_value()) {
    TORCH_CHECK(padding->element_size() == 1 && padding->is_contiguous() && padding->numel() == c.batch * c.tokens,
                "padding must be (batch, tokens) bytes, got ", padding->sizes());
    c.padding = reinterpret_cast<const uint8_t*>(padding->const_data_ptr());
  }
  return c;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& runs,
    const std::optional<at::Tensor>& padding, int64_t map, bool causal, bool divided, double eps) {
  Linear c = linear(q, k, v, runs, padding, map, causal, divided, eps);
  auto out = by_token(q, c.batch, c.heads, c.tokens, c.value_size, false);
  auto den = at::empty({c.batch, c.heads, c.tokens}, q.options());
  auto states = at::empty({causal ? c.chunks : c.number, c.groups, c.features * (c.value_size + 1)}, q.options());
  c.out = view(out, "out"), c.den = den.data_ptr<float>(), c.states = states.data_ptr<float>();
  chosen()->linear_forward(c, on_threads, at::get_num_threads());
  return {out, den, states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_den, const at::Tensor& q, const at::Tensor& k,
    const at::Tensor& v, const at::Tensor& out, const at::Tensor& den, const at::Tensor& states, const at::Tensor& runs,
    const std::optional<at::Tensor>& padding, int64_t map, bool causal, bool divided, double eps) {
  LinearBackward d{};
  Linear& c = d.forward;
  c = linear(q, k, v, runs, padding, map, causal, divided, eps);
  c.out = view(out, "out"), c.den = const_cast<float*>(den.const_data_ptr<float>());
  c.states = const_cast<float*>(states.const_data_ptr<float>());
  auto dq = by_token(q, c.batch, c.heads, c.tokens, c.size, false);
  auto dk = by_token(q, c.batch, c.groups, c.tokens, c.size, false);
  auto dv = by_token(q, c.batch, c.groups, c.tokens, c.value_size, false);
  d.grad = view(grad, "grad"), d.dq = view(dq, "dq"), d.dk = view(dk, "dk"), d.dv = view(dv, "dv");
  TORCH_CHECK(divided != grad_den.has_value(), "denominators have a gradient where sums are not divided, and nowhere else");
  at::Tensor dense;
  if (grad_den.has_value()) d.grad_den = (dense = grad_den->contiguous()).const_data_ptr<float>();
  chosen()->linear_backward(d, on_threads, at::get_num_threads());
  return {dq, dk, dv};
}

// What blocks of at most TILE x TILE of a visible table (batch or 1, rows, columns; 1 where visible) hold: for each a
// number, -2 where nothing is visible, -1 where all is, else that of its first mask, of which there is one for each row
// of the batch; the masks, key by key; and of each its ranges.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cut_mask(const at::Tensor& visible, at::IntArrayRef rows,
                                                        at::IntArrayRef columns) {
  TORCH_CHECK(visible.dim() == 3 && visible.is_contiguous() && visible.element_size() == 1, "visible must be (B, R, C) bytes");
  int64_t B = visible.size(0), R = visible.size(1), C = visible.size(2);
  auto seen = reinterpret_cast<const uint8_t*>(visible.const_data_ptr());
  std::vector<int32_t> kinds;
  std::vector<std::array<int64_t, 4>> cut;
  for (size_t r = 0; r + 1 < rows.size(); r++)
    for (size_t x = 0; x + 1 < columns.size(); x++) {
      int64_t r0 = rows[r], r1 = rows[r + 1], c0 = columns[x], c1 = columns[x + 1];
      TORCH_CHECK(0 <= r0 && r1 - r0 <= TILE && r1 <= R && 0 <= c0 && c1 - c0 <= TILE && c1 <= C, "no such block");
      bool any = false, every = true;
      for (int64_t b = 0; b < B; b++)
        for (int64_t i = r0; i < r1; i++)
          for (int64_t j = c0; j < c1; j++) {
            bool one = seen[(b * R + i) * C + j];
            any |= one, every &= one;
          }
      kinds.push_back(!any ? -2 : every ? -1 : int32_t(cut.size() * B));
      if (any && !every) cut.push_back({r0, r1, c0, c1});
    }
  auto masks = at::zeros({int64_t(cut.size()) * B, TILE, TILE}, at::kByte);
  auto ranges = at::zeros({int64_t(cut.size()) * B, RANGES}, at::kByte);
  uint8_t *m = masks.data_ptr<uint8_t>(), *r = ranges.data_ptr<uint8_t>();
  for (auto [r0, r1, c0, c1] : cut)
    for (int64_t b = 0; b < B; b++, m += TILE * TILE, r += RANGES) {
      for (int x = 0; x < 2 * GROUPS; x++) r[2 * x] = TILE;  // low above high: nothing
      for (int64_t i = r0; i < r1; i++)
        for (int64_t j = c0; j < c1; j++)
          if (seen[(b * R + i) * C + j]) {
            int query = i - r0, key = j - c0;
            m[key * TILE + query] = 1;
            uint8_t *queries = r + key / 6 * 2, *keys = r + 2 * GROUPS + query / 6 * 2;
            queries[0] = std::min<int>(queries[0], query), queries[1] = std::max<int>(queries[1], query + 1);
            keys[0] = std::min<int>(keys[0], key), keys[1] = std::max<int>(keys[1], key + 1);
          }
    }
  auto found = at::empty({int64_t(kinds.size())}, at::kInt);
  std::memcpy(found.data_ptr<int32_t>(), kinds.data(), kinds.size() * sizeof(int32_t));
  return {found, masks, ranges};
}

}  // namespace
}  // namespace attn_plugins

#include "step_operators.h"

namespace attn_plugins {

TORCH_LIBRARY(attn_plugins_cpp, m) {
  m.def("instruction_sets() -> str", &instruction_sets);
  m.def("use_instruction_set(str name) -> ()", &use_instruction_set);
  m.def("tile_product(Tensor a, Tensor b, int times) -> Tensor", &tile_product);
  m.def("cut_mask(Tensor visible, int[] rows, int[] columns) -> (Tensor, Tensor, Tensor)", &cut_mask);
  m.def(
      "softmax_forward(Tensor q, Tensor k, Tensor v, Tensor tiles, Tensor blocks, Tensor index, Tensor masks, Tensor "
      "ranges, bool merged, Tensor? bias, Tensor? sinks, float scale, float softcap, float dropout, int seed) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "softmax_backward(Tensor grad, Tensor? grad_lse, Tensor? grad_top, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
      "lse, Tensor top, Tensor tiles, Tensor blocks, Tensor index, Tensor masks, Tensor ranges, bool merged, Tensor? bias, Tensor? sinks, int "
      "bias_rows, float scale, float softcap, float dropout, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "chosen_forward(Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor first, Tensor keys, Tensor? padding, bool "
      "causal, int before, float scale, float dropout, int seed) -> (Tensor, Tensor)");
  m.def(
      "chosen_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor chosen, Tensor first, "
      "Tensor keys, Tensor? padding, bool causal, int before, float scale, float dropout, int seed) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "linear_forward(Tensor q, Tensor k, Tensor v, Tensor runs, Tensor? padding, int map, bool causal, bool divided, float "
      "eps) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "linear_backward(Tensor grad, Tensor? grad_den, Tensor q, Tensor k, Tensor v, Tensor out, Tensor den, Tensor states, "
      "Tensor runs, Tensor? padding, int map, bool causal, bool divided, float eps) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attn_plugins_cpp, CPU, m) {
  m.impl("softmax_forward", &softmax_forward);
  m.impl("softmax_backward", &softmax_backward);
  m.impl("chosen_forward", &chosen_forward);
  m.impl("chosen_backward", &chosen_backward);
  m.impl("linear_forward", &linear_forward);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace attn_plugins
