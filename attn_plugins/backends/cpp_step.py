"""Compiled steps of one new token from a state, in place of PyTorch's in :mod:`attn_plugins.ops`."""

import functools
from typing import Any

import torch

from attn_plugins.backends.cpp_linear import MAPS
from attn_plugins.backends.cpp_tiles import MULTIPLE
from attn_plugins.ops.linear.attention import project
from attn_plugins.ops.linear.features import FEATURE_MAPS, FeatureMap, Prepared
from attn_plugins.ops.recurrent.chunked import Tokens


@functools.cache
def serves(phi: FeatureMap, size: int) -> bool:
    """Whether there is a step of linear attention with this map, for heads of this size."""
    return size % MULTIPLE == 0 and any(FEATURE_MAPS[name] is phi for name in MAPS)


def linear_step(
    prepared: Prepared, v_BG1V: torch.Tensor, sums_BGFV: torch.Tensor, seen_B1: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :data:`attn_plugins.ops.linear.attention.LinearStep`."""
    q, k, options = prepared
    if "query_projection" in options:
        q, k = project(q, options["query_projection"]), project(k, options["key_projection"])
    moves = options.get("moves", (None, None, None, None))
    how = (*moves, MAPS[options["feature_map"]], options["eps"])
    return torch.ops.attn_plugins_cpp.linear_step.default(q, k, v_BG1V, sums_BGFV, seen_B1, *how)


def window_step(
    prepared: Prepared,
    k_BG1D: torch.Tensor,
    v_BG1V: torch.Tensor,
    held: dict[str, torch.Tensor],
    places: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :data:`attn_plugins.ops.linear.window.WindowStep`."""
    q, _, linear = prepared
    window = held["sums"], held["k"], held["v"], *places
    how = (*linear.get("moves", (None, None, None, None)), MAPS[linear["feature_map"]], linear["eps"])
    branch, log_factor = options["branch"], options["log_factor_H"]
    reads = (log_factor, options["scale"], branch != "linear", branch != "window")
    return torch.ops.attn_plugins_cpp.window_step.default(q, k_BG1D, v_BG1V, *window, *how, *reads)


def recurrent_step(
    tokens: Tokens, seen_B1: torch.Tensor | None, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :data:`attn_plugins.ops.recurrent.step.RecurrentStep`."""
    q, k, v, log_gate, beta, average_weight = tokens
    step = torch.ops.attn_plugins_cpp.recurrent_step.default
    return step(q, k, v, state, seen_B1, log_gate, beta, average_weight)


def register() -> None:
    """As :func:`attn_plugins.backends.cpp_tiles.register`."""

    @torch.library.register_fake("attn_plugins_cpp::linear_step")
    def _(q, k, v, sums, *others):
        return v.new_empty(v.shape[0], q.shape[1], 1, v.shape[3]), torch.empty_like(sums)

    torch.library.register_fake("attn_plugins_cpp::window_step", _)

    @torch.library.register_fake("attn_plugins_cpp::recurrent_step")
    def _(q, k, v, state, *others):
        return state.new_empty(v.shape[0], q.shape[1], 1, v.shape[3]), torch.empty_like(state)
