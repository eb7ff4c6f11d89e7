"""What counts where weights deceive: gradient times weights, and attention rollout. Neither is a proof of a cause.

A weight says how much of a value a head takes, not whether anything comes of it: values may be next to zero (sinks),
and later layers may not read what a head writes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from attn_plugins.hf.names import SLOT
from attn_plugins.hf.observe import Observed, own_attention, swapped_attention
from attn_plugins.hf.swap import unwrap
from attn_plugins.inspection.inspect import (
    Numbers,
    Through,
    at_least_float32,
    chosen_modules,
    evaluating,
    numbers_in,
    ordinary,
    own_weighing,
    positions_in,
    slots_at,
    weighing_of,
)
from attn_plugins.ops.reference import expand_heads
from attn_plugins.transfer.body import run_body

Target = int | Callable[[Any], torch.Tensor] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Relevance:
    """Gradient times weights of one call of a module. Tensors are on the CPU, in float32 at least."""

    path: str
    layer: int
    role: str
    heads: list[int]
    queries: list[int] | None
    """None where ``of_keys`` is all there is."""
    of_keys_BhK: torch.Tensor = field(repr=False)
    """``sum_q w_qk dy/dw_qk`` over all queries, padding too where that has a gradient."""
    of_pairs_BhqK: torch.Tensor | None = field(repr=False)
    """``w_qk dy/dw_qk`` of the chosen queries."""


@torch.inference_mode(False)
def gradient_times_weights(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    target: Target = None,
    layers: Numbers = "all",
    heads: Numbers = "all",
    queries: int | Sequence[int] | None = None,
    roles: Sequence[str] = ("encoder", "decoder", "cross"),
) -> list[Relevance]:
    """Weights times the gradient of one output of a swapped model with respect to them, in the swapped model.

    As an output is a sum of values, ``dy/dw_qk = dy/dout_q . v_k``, so nothing of Q x K is needed for it: one forward
    and backward of the model, and a backward of a chosen layer for each head. Over keys they add up to
    ``dy/dout_q . out_q``: to first order, what y would lose if the query's output in this head were gone. Gates made of
    values are held.

    Args:
        target: the number of a class or token, whose logit y is summed over the batch, where logits have positions at
            the last one that is no padding; None for the largest logit of each row; or a function of the model's
            output.
        layers, heads, roles: as in :func:`~attn_plugins.inspect_attention`.
        queries: positions to tell apart; None for the sums over all of them alone.

    Raises:
        ValueError: an attention's output is no sum of values (``linear_in_values``), or the output has no logits.
    """
    inner, inputs = unwrap(model), ordinary(inputs)
    chosen = chosen_modules(inner, layers, roles)
    _check_linear(inner, chosen)
    targets = {inner.get_submodule(path): one for path, one in chosen.items()}
    seen: list[Observed] = []
    leaves: list[torch.Tensor] = []

    def see(one: Observed) -> None:
        if one.module in targets:
            seen.append(one)

    def add_leaf(slot: nn.Module, args: Any, attended: Any) -> Any:
        leaves.append(torch.zeros_like(attended[0], requires_grad=True))
        return attended[0] + leaves[-1], attended[1]

    hooks = [module._modules[SLOT].register_forward_hook(add_leaf) for module in targets]  # type: ignore[union-attr]
    cached = {"use_cache": False} if inner.can_generate() else {}
    try:
        with evaluating(inner), swapped_attention(inner, see), torch.enable_grad():
            y = _target_of(inner(**{**inputs, **cached}), target, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(y, leaves, allow_unused=True)
    found = []
    for one, of_out in zip(seen, gradients, strict=True):
        told, call = targets[one.module], at_least_float32(one)
        weighing, num_heads = weighing_of(call), call.query_BHQD.shape[1]
        numbers = numbers_in(heads, num_heads, "heads", told.path)
        g_BQHV = torch.zeros_like(weighing.out_BQHV) if of_out is None else of_out.to(weighing.out_BQHV.dtype)
        value_BhKV = expand_heads(call.value_BGKV, num_heads)[:, numbers]
        places = None if queries is None else positions_in(queries, g_BQHV.shape[1], told.path)
        pairs = None
        if places is not None:
            g_BhqV = g_BQHV[:, places][:, :, numbers].transpose(1, 2)
            pairs = (weighing.rows(places, numbers) * (g_BhqV @ value_BhKV.mT)).cpu()
        of_keys = [
            (weighing.pulled(_of_head(g_BQHV, head))[:, head * call.value_BGKV.shape[1] // num_heads] * value).sum(-1)
            for head, value in zip(numbers, value_BhKV.unbind(1), strict=True)
        ]
        found.append(
            Relevance(
                path=told.path,
                layer=told.layer,
                role=told.role,
                heads=numbers,
                queries=places,
                of_keys_BhK=torch.stack(of_keys, dim=1).cpu(),
                of_pairs_BhqK=pairs,
            )
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """Attention rollout of chosen queries through a stack of layers."""

    queries: list[int]
    weights_BqK: torch.Tensor = field(repr=False)
    """By the slots."""
    own_BqK: torch.Tensor = field(repr=False)
    """By the model's own attention on the same queries and keys."""


@torch.inference_mode(False)
def attention_rollout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    queries: int | Sequence[int] | None = None,
    role: str = "decoder",
    modules: str = "*",
    through: Through = "swapped",
) -> Rollout:
    """Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928, section 3.3) from the last layer to the input.

    ``A_L ... A_1`` with ``A_l = (W_l + I) / 2`` and W_l the mean of a layer's heads: how much of the input at each
    position arrives at a query, were all values alike and nothing but attention and residuals between layers. Rows go
    down the stack one layer at a time, each as one backward for as many queries as a value has dimensions: nothing of
    N x N is made. Weights below 0 count as they are, where the paper's are shares.

    Args:
        queries: as in :func:`~attn_plugins.inspect_attention`.
        role: "decoder" for causal self-attention, "encoder" for bidirectional.
        modules: glob on paths, where a model has several stacks of a role.

    Raises:
        ValueError: not every layer of one stack has a slot, or an output is no sum of values (``linear_in_values``).
    """
    inner, inputs = unwrap(model), ordinary(inputs)
    if role not in ("encoder", "decoder"):
        raise ValueError(f"role={role!r}; allowed: 'encoder', 'decoder'")
    chosen = chosen_modules(inner, "all", [role], modules)
    _check_linear(inner, chosen)
    stacks = {target.stack for target in chosen.values()}
    if len(stacks) > 1:
        raise ValueError(
            f"rollout goes through one stack, and {role}s are in {', '.join(sorted(stacks))}; give modules"
        )
    every = chosen_modules(inner, "all", [role], modules, swapped=False)
    missing = [path for path in every if path not in chosen]
    if missing:
        raise ValueError(f"rollout goes through all layers, and {', '.join(missing)} have no slot: put 'softmax' there")
    targets = {inner.get_submodule(path) for path in chosen}
    seen: list[Observed] = []
    watch = swapped_attention if through == "swapped" else own_attention
    with evaluating(inner), watch(inner, lambda one: seen.append(one) if one.module in targets else None):
        run_body(inner, slots_at(inner, chosen), inputs)
    lengths = {one.query_BHQD.shape[2] for one in seen} | {one.key_BGKD.shape[2] for one in seen}
    if len(lengths) != 1:
        raise ValueError(f"rollout goes through layers of one length, got tokens {sorted(lengths)}")
    (length,) = lengths
    places = positions_in(queries, length, next(iter(chosen)))
    rolled = []
    for weigh in (weighing_of, own_weighing):
        row_BqK = torch.eye(length)[places].expand(len(seen[0].query_BHQD), -1, -1)
        for one in reversed(seen):
            weighing = weigh(at_least_float32(one))
            row_BqK = row_BqK.to(weighing.value_BGKV)
            heads = weighing.out_BQHV.shape[2]
            mix_BQHR = (row_BqK / heads).transpose(1, 2).unsqueeze(2).expand(-1, -1, heads, -1)
            row_BqK = (row_BqK + weighing.mixed(mix_BQHR).sum(1)) / 2
        rolled.append(row_BqK.cpu())
    return Rollout(queries=places, weights_BqK=rolled[0], own_BqK=rolled[1])


def _of_head(x_BQHV: torch.Tensor, head: int) -> torch.Tensor:
    alone = torch.zeros_like(x_BQHV)
    alone[:, :, head] = x_BQHV[:, :, head]
    return alone


def _target_of(output: Any, target: Target, inputs: Mapping[str, Any]) -> torch.Tensor:
    """The number whose gradient is asked for."""
    if callable(target):
        return target(output)
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(f"{type(output).__name__} has no logits; give target as a function of it")
    logits_BC = logits[range(len(logits)), _last_real(logits, inputs)] if logits.ndim == 3 else logits
    if target is None:
        return logits_BC.amax(-1).sum()
    if not -logits_BC.shape[-1] <= target < logits_BC.shape[-1]:
        raise ValueError(f"target={target}; allowed: 0 to {logits_BC.shape[-1] - 1}")
    return logits_BC[:, target].sum()


def _last_real(logits_BNC: torch.Tensor, inputs: Mapping[str, Any]) -> Any:
    """The last position of each row that is no padding, as the mask of what the logits are of tells."""
    given = inputs.get("decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask")
    if not isinstance(given, torch.Tensor) or given.shape != logits_BNC.shape[:2]:
        return -1
    return (given != 0).to(logits_BNC.device).cumsum(1).argmax(1)


def _check_linear(model: nn.Module, chosen: Mapping[str, Any]) -> None:
    for path, slot in slots_at(model, chosen).items():
        if not slot.linear_in_values:
            raise ValueError(
                f"the output of {slot.name}({slot.extra_repr()}) at {path} is no sum of values, so that its weights "
                "alone say nothing of it; allowed: attentions with linear_in_values"
            )
