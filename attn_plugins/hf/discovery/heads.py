"""Sizes of a module's heads: read off its attributes, the layers that make its queries and keys, then its config."""

import re
from typing import Any

from torch import nn

from attn_plugins.core.attention import HeadShape

HEAD_DIMS = "qk_head_dim head_dim attention_head_size head_size key_value_proj_dim d_kv dim_head"


def head_numbers(module: nn.Module, config: Any) -> tuple[int, int] | None:
    """Numbers of query heads and of key/value heads of an attention module, None where they cannot be found."""
    heads = _find(
        "num_heads num_attention_heads n_heads n_head num_q_heads heads encoder_attention_heads", module, config
    )
    head_dim, made = _find(HEAD_DIMS, module), _features(module)
    groups = getattr(module, "num_key_value_groups", None)
    if heads is None and head_dim and "k" in made:
        heads = made["k"] // head_dim * (groups if isinstance(groups, int) else 1)
    if not heads:
        return None
    shared = heads // groups if isinstance(groups, int) else _find("num_key_value_heads num_kv_heads", module, config)
    return heads, shared or heads


def head_shape(module: nn.Module, config: Any) -> HeadShape:
    """Read the head sizes of an attention module.

    Raises:
        ValueError: they cannot be found.
    """
    head_dim, made, numbers = _find(HEAD_DIMS, module), _features(module), head_numbers(module, config)
    if numbers is None:
        raise ValueError(f"cannot tell the number and size of the heads of {type(module).__name__} from its attributes")
    heads, shared = numbers
    if head_dim is None and made.get("qkv", 1) % (heads + 2 * shared) == 0:
        head_dim = made["qkv"] // (heads + 2 * shared)
    if head_dim is None and "q" in made and made["q"] * shared == made.get("k", 0) * heads:
        head_dim = made["q"] // heads  # SAM's are narrower than its hidden states
    head_dim = head_dim or _find(HEAD_DIMS, config)
    if head_dim is None and (width := _find("embed_dim hidden_size d_model n_embd all_head_size dim", module, config)):
        head_dim = width // heads
    if not head_dim:
        raise ValueError(f"cannot tell the number and size of the heads of {type(module).__name__} from its attributes")
    value_dim = getattr(module, "v_head_dim", None) or head_dim
    if hasattr(module, "q_pos_sine_proj"):
        head_dim *= 2  # Conditional DETR's queries and keys have positions beside the content
    return HeadShape(
        num_heads=heads,
        num_key_value_heads=shared,
        head_dim=head_dim,
        value_dim=value_dim,
        grid_size=grid_size(config),
        hidden_size=_input_size(module) or _find("hidden_size embed_dim d_model n_embd dim", module, config),
    )


def _find(names: str, *holders: Any) -> int | None:
    """The first attribute of these names that is a number above 0."""
    for holder in holders:
        for name in names.split():
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _input_size(module: nn.Module) -> int | None:
    """Size of what a module's own layer of queries takes; None where no child is one by its name and has a size."""
    for name, child in module.named_children():
        size = getattr(child, "in_features", getattr(child, "nx", None))  # the second is transformers' Conv1D's
        if isinstance(size, int) and re.search(r"(^|_)q(_|$|kv)|query|qkv|c_attn|in_proj", name):
            return size
    return None


def _features(module: nn.Module) -> dict[str, int]:
    """Numbers of features of the queries, keys or all three that a module's own linear layers make: q, k, qkv."""
    found = {}
    for name, child in module.named_children():
        match = re.fullmatch(r"(q(?:kv)?|k)(uery|ey)?(_proj|_lin)?", name)
        if match and isinstance(features := getattr(child, "out_features", None), int):
            found[match.group(1)] = features
    return found


def grid_size(config: Any) -> tuple[int, int] | None:
    """Rows and columns of patches by the config of a vision model, or None where it does not tell."""
    pairs = []
    for name in ("image_size", "patch_size"):
        value = getattr(config, name, None)
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
            return None
        pairs.append(pair)
    (height, width), (rows, columns) = pairs
    return height // rows, width // columns
