// Registers the steps of one token as operators: the part of operators.cpp, which includes it, that is about states.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "kernels.h"

namespace attn_plugins {
namespace {

// Queries, keys or values of one token, (batch, heads, 1, size), in float32.
at::Tensor one_token(const at::Tensor& x, int64_t batch, int64_t heads, int64_t size, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 4 && x.size(0) == batch && x.size(1) == heads && x.size(2) == 1 &&
                  x.size(3) == size, name, " must be (", batch, ", ", heads, ", 1, ", size, "), got ", x.sizes());
  at::Tensor y = x.scalar_type() == at::kFloat ? x : x.to(at::kFloat);
  return size == 1 || y.stride(3) == 1 ? y : y.contiguous();
}

View strides_of(const at::Tensor& x) {
  return {const_cast<float*>(x.const_data_ptr<float>()), x.stride(0), x.stride(1), x.stride(2)};
}

// A step of which the tensors are held as long as it is needed.
struct Taken {
  Step step{};
  at::Tensor q, k, v, before, after, out;
  Taken(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& state,
        const std::optional<at::Tensor>& seen) {
    TORCH_CHECK(state.dim() == 4 && state.scalar_type() == at::kFloat && keys.dim() == 4 && queries.dim() == 4,
                "a state must be (batch, groups, rows, columns) of float32, got ", state.sizes());
    Step& c = step;
    c.batch = state.size(0), c.groups = state.size(1), c.rows = state.size(2), c.value_size = state.size(3) - 1;
    c.heads = queries.size(1), c.size = keys.size(3);
    TORCH_CHECK(c.groups > 0 && c.heads % c.groups == 0, c.heads, " query heads do not share ", c.groups, " states");
    q = one_token(queries, c.batch, c.heads, c.size, "q"), k = one_token(keys, c.batch, c.groups, c.size, "k");
    v = one_token(values, c.batch, c.groups, c.value_size, "v");
    before = state.contiguous();
    after = at::empty(before.sizes(), before.options());
    out = at::empty({c.batch, c.heads, 1, c.value_size}, before.options());
    c.q = strides_of(q), c.k = strides_of(k), c.v = strides_of(v);
    c.before = before.const_data_ptr<float>(), c.after = after.data_ptr<float>(), c.out = out.data_ptr<float>();
    if (seen.has_value()) {
      TORCH_CHECK(seen->element_size() == 1 && seen->dim() == 2 && seen->size(0) == c.batch && seen->size(1) == 1,
                  "seen must be (batch, 1) bytes, got ", seen->sizes());
      c.seen = reinterpret_cast<const uint8_t*>(seen->const_data_ptr()), c.seen_row = seen->stride(0);
    }
  }
};

// What features are made by, and the weights before them, held as long as they are needed.
struct Mapped {
  LinearStep step{};
  std::vector<at::Tensor> held;
  Mapped(const Taken& taken, const std::optional<at::Tensor>& query_weight, const std::optional<at::Tensor>& key_weight,
         const std::optional<at::Tensor>& query_bias, const std::optional<at::Tensor>& key_bias, int64_t map, double eps)
      : step{taken.step, Map(map), float(eps)} {
    const Step& c = taken.step;
    TORCH_CHECK(map >= ELU && map <= IDENTITY, "no such feature map: ", map);
    TORCH_CHECK(c.size % 16 == 0 && c.rows == (map == HEDGEHOG ? 2 * c.size : c.size),
                "keys must have a size that is a multiple of 16, and a row of sums for each feature, got ", c.size, " and ", c.rows);
    step.query_weight = numbers(query_weight, c.heads * c.size * c.size), step.query_bias = numbers(query_bias, c.heads * c.size);
    step.key_weight = numbers(key_weight, c.groups * c.size * c.size), step.key_bias = numbers(key_bias, c.groups * c.size);
  }
  const float* numbers(const std::optional<at::Tensor>& x, int64_t number) {
    if (!x.has_value()) return nullptr;
    TORCH_CHECK(x->numel() == number, "a weight must have ", number, " numbers, got ", x->sizes());
    held.push_back(x->to(at::kFloat).contiguous());
    return held.back().const_data_ptr<float>();
  }
};

std::tuple<at::Tensor, at::Tensor> linear_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sums,
    const std::optional<at::Tensor>& seen, const std::optional<at::Tensor>& query_weight,
    const std::optional<at::Tensor>& key_weight, const std::optional<at::Tensor>& query_bias,
    const std::optional<at::Tensor>& key_bias, int64_t map, double eps) {
  Taken taken(q, k, v, sums, seen);
  Mapped mapped(taken, query_weight, key_weight, query_bias, key_bias, map, eps);
  chosen()->linear_step(mapped.step, on_threads);
  return {taken.out.to(v.scalar_type()), taken.after};
}

std::tuple<at::Tensor, at::Tensor> window_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& sums, const at::Tensor& keys,
    const at::Tensor& values, const at::Tensor& place, const at::Tensor& visible, const at::Tensor& leaves,
    const std::optional<at::Tensor>& query_weight, const std::optional<at::Tensor>& key_weight,
    const std::optional<at::Tensor>& query_bias, const std::optional<at::Tensor>& key_bias, int64_t map, double eps,
    const at::Tensor& log_factor, double scale, bool reads_window, bool reads_sums) {
  Taken taken(q, k, v, sums, leaves.expand({sums.size(0), 1}));
  Mapped mapped(taken, query_weight, key_weight, query_bias, key_bias, map, eps);
  WindowStep w{mapped.step};
  const Step& c = taken.step;
  at::Tensor all_keys = keys.to(at::kFloat), all_values = values.to(at::kFloat), seen = visible.expand({c.batch, visible.size(-1)});
  w.slots = keys.size(2), w.place = place.item<int64_t>(), w.scale = scale;
  TORCH_CHECK(c.value_size % 16 == 0, "values must have a size that is a multiple of 16, got ", c.value_size);
  TORCH_CHECK(keys.sizes() == at::IntArrayRef({c.batch, c.groups, w.slots, c.size}) && all_keys.stride(3) == 1 &&
                  values.sizes() == at::IntArrayRef({c.batch, c.groups, w.slots, c.value_size}) && all_values.stride(3) == 1,
              "the window's keys ", keys.sizes(), " and values ", values.sizes(), " do not fit the token's");
  TORCH_CHECK(seen.size(1) == w.slots && seen.element_size() == 1 && (seen.stride(1) == 1 || w.slots == 1) && w.place >= 0 &&
                  w.place < w.slots, "visible must be (batch, ", w.slots, ") bytes and the place one of them, got ",
              visible.sizes(), " and ", w.place);
  w.keys = strides_of(all_keys), w.values = strides_of(all_values), w.reads_window = reads_window, w.reads_sums = reads_sums;
  w.visible = reinterpret_cast<const uint8_t*>(seen.const_data_ptr()), w.visible_row = seen.stride(0);
  w.log_factor = mapped.numbers(log_factor, c.heads);
  chosen()->window_step(w, on_threads);
  return {taken.out.to(v.scalar_type()), taken.after};
}

std::tuple<at::Tensor, at::Tensor> recurrent_step(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& state,
    const std::optional<at::Tensor>& seen, const std::optional<at::Tensor>& log_gate,
    const std::optional<at::Tensor>& beta, const std::optional<at::Tensor>& average_weight) {
  Taken taken(q, k, v, state, seen);
  RecurrentStep d{taken.step};
  const Step& c = taken.step;
  TORCH_CHECK(c.rows == c.size + beta.has_value() && beta.has_value() == average_weight.has_value(),
              "states of ", c.rows, " rows do not fit keys of size ", c.size);
  at::Tensor gates, rates;
  if (log_gate.has_value()) {
    gates = log_gate->to(at::kFloat).transpose(2, 3);
    if (gates.size(2) == 1) gates = gates.expand({c.batch, c.groups, 1, 1}), d.gates = strides_of(gates), d.gates.token = 0;
    else gates = gates.expand({c.batch, c.groups, c.rows, 1}), d.gates = strides_of(gates);
  }
  TORCH_CHECK(log_gate.has_value() || beta.has_value(), "an average needs log gates");
  if (beta.has_value()) {
    rates = beta->to(at::kFloat).expand({c.batch, c.groups, 1, 1});
    TORCH_CHECK(average_weight->numel() == c.heads && average_weight->scalar_type() == at::kFloat &&
                average_weight->is_contiguous(), "average_weight must be float32, one a head, got ", average_weight->sizes());
    d.beta = strides_of(rates), d.average_weight = average_weight->const_data_ptr<float>();
  }
  chosen()->recurrent_step(d, on_threads);
  return {taken.out, taken.after};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(attn_plugins_cpp, m) {
  m.def(
      "linear_step(Tensor q, Tensor k, Tensor v, Tensor sums, Tensor? seen, Tensor? query_weight, Tensor? key_weight, "
      "Tensor? query_bias, Tensor? key_bias, int map, float eps) -> (Tensor, Tensor)");
  m.def(
      "window_step(Tensor q, Tensor k, Tensor v, Tensor sums, Tensor keys, Tensor values, Tensor place, Tensor visible, "
      "Tensor leaves, Tensor? query_weight, Tensor? key_weight, Tensor? query_bias, Tensor? key_bias, int map, float eps, "
      "Tensor log_factor, float scale, bool reads_window, bool reads_sums) -> (Tensor, Tensor)");
  m.def(
      "recurrent_step(Tensor q, Tensor k, Tensor v, Tensor state, Tensor? seen, Tensor? log_gate, Tensor? beta, Tensor? "
      "average_weight) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(attn_plugins_cpp, CPU, m) {
  m.impl("linear_step", &linear_step);
  m.impl("window_step", &window_step);
  m.impl("recurrent_step", &recurrent_step);
}

// Steps are for calls that want no gradients: to look for these would take a part of a step's own time.
TORCH_LIBRARY_IMPL(attn_plugins_cpp, Autograd, m) {
  m.impl("linear_step", torch::CppFunction::makeFallthrough());
  m.impl("window_step", torch::CppFunction::makeFallthrough());
  m.impl("recurrent_step", torch::CppFunction::makeFallthrough());
}

}  // namespace attn_plugins
