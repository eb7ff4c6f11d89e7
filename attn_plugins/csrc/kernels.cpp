// The kernels for one instruction set, which -DISA=name names; compiled once for each.
#include "chosen.h"
#include "kernels.h"
#include "linear.h"
#include "softmax.h"
#include "step.h"

#define NAME_OF(isa) NAME(isa)
#define NAME(isa) isa##_kernels
#define WORD_OF(isa) WORD(isa)
#define WORD(isa) #isa

namespace attn_plugins {
namespace ISA {
static void plain_product(int M, int N, int K, const float* A, const float* B, float* C) {
  product(M, N, K, A, K, 1, B, N, C, N, false);
}
}  // namespace ISA

extern const Kernels NAME_OF(ISA);
const Kernels NAME_OF(ISA) = {WORD_OF(ISA),           &ISA::plain_product,    &ISA::softmax_forward, &ISA::softmax_backward,
                              &ISA::chosen_forward,   &ISA::chosen_backward,  &ISA::linear_forward,  &ISA::linear_backward,
                              &ISA::linear_step,      &ISA::window_step,      &ISA::recurrent_step};
}  // namespace attn_plugins
