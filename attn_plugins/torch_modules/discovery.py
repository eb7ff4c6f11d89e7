"""Find the attention modules of a model that is none of transformers', and what each is."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import Target
from attn_plugins.core.attention import HeadShape
from attn_plugins.hf.discovery.first_tokens import IN_WEIGHTS
from attn_plugins.hf.discovery.heads import grid_size
from attn_plugins.hf.discovery.modules import place_of, stack_of
from attn_plugins.hf.names import SLOT
from attn_plugins.torch_modules.adapters import adapted, adapter_of

CROSS = re.compile(r"cross|enc_?dec|encoder_attn|pool|class_?att", re.IGNORECASE)
"""Names of modules whose queries and keys are of different sequences, or whose queries are a few learned ones."""

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Layers of torch that give the module ``self_attn`` one sequence, in three arguments."""


def attention_modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every module that can have a slot, in order. Parts that are of transformers are left alone."""
    if adapter_of(type(model)) is not None:
        yield path, model
    for name, child in model.named_children():
        if name != SLOT and not isinstance(child, PreTrainedModel):
            yield from attention_modules(child, f"{path}.{name}" if path else name)


def of_transformers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, part) of the outermost models of transformers inside a model."""
    found: list[tuple[str, nn.Module]] = []
    for path, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and not any(path.startswith(f"{outer}.") for outer, _ in found):
            found.append((path, part))
    return found


def targets(model: nn.Module) -> list[Target]:
    """A :class:`~attn_plugins.core.assignment.Target` for each attention module, numbered within its stack."""
    places: dict[str, list[str]] = {}
    found = []
    for path, module in attention_modules(model):
        role, place = role_of(model, path), place_of(path)
        stack = stack_of(f".{place}").lstrip(".")  # a bare nn.Sequential is a stack too
        numbered = places.setdefault(stack + role, [])
        numbered.append(place)
        sizes = head_shape(module)
        heads = sizes if isinstance(sizes, HeadShape) else None
        found.append(
            Target(
                path=path,
                role=role,
                stack=stack,
                layer=len(numbered) - 1,
                needs={"cross": "it is cross-attention"}
                if role == "cross"
                else getattr(adapter_of(type(module)), "needs", {}),
                prefix_tokens=prefix_tokens(model, path) if role == "encoder" else None,
                num_heads=None if heads is None else heads.num_heads,
                num_key_value_heads=None if heads is None else heads.num_key_value_heads,
            )
        )
    return found


def head_shape(module: nn.Module) -> HeadShape | ValueError:
    """Sizes of a module's heads, or why they are not known."""
    try:
        return adapted(module).head_shape()
    except ValueError as error:
        return error


def role_of(model: nn.Module, path: str) -> str:
    """ "cross", "decoder" or "encoder"; what queries see is for each call to say.

    A decoder is what torch calls so: nn.TransformerDecoderLayer. Of others a module alone shows no more than its name.
    """
    outer, _, name = path.rpartition(".")
    around = model.get_submodule(outer) if path else None
    if isinstance(around, nn.TransformerDecoderLayer):
        return "decoder" if name == "self_attn" else "cross"
    names = [type(model.get_submodule(path)).__name__, *path.split(".")[-2:]]
    return "cross" if any(CROSS.search(one) for one in names) else "encoder"


def one_sequence(model: nn.Module, path: str) -> bool:
    """Whether the layer around a module gives it one sequence, in three arguments, whatever comes between."""
    outer, _, name = path.rpartition(".")
    return bool(path) and name == "self_attn" and isinstance(model.get_submodule(outer), LAYERS)


def prefix_tokens(model: nn.Module, path: str) -> int | None:
    """Tokens such as [CLS] and registers before patches: by parameters of the parts around a module, outside of it.

    None where nothing shows that the input is an image.
    """
    for part in _outwards(model, path):
        learned = [p for name, p in part.named_parameters() if _first_token(name)]
        if learned:
            return sum(p.shape[-2] if p.ndim > 1 else 1 for p in learned)
        if any(isinstance(m, nn.Embedding) for m in part.modules()):
            return None
        if any(isinstance(m, (nn.Conv2d, nn.Conv3d)) for m in part.modules()):
            return 0
    return None


def of_model(shape: HeadShape, model: nn.Module, target: Target) -> HeadShape:
    """Sizes of a module's heads with what the model around it tells, and with the grid of a module's own windows."""
    window = getattr(model.get_submodule(target.path), "window_size", None)
    grid = window if isinstance(window, (list, tuple)) and len(window) == 2 else None
    for part in _outwards(model, target.path):
        if grid is not None:
            break
        cut: Any = getattr(part, "patch_embed", None)
        grid = getattr(cut, "grid_size", None) or grid_size(part)
    layer = target.layer if target.path else None
    grid = None if grid is None else (int(grid[0]), int(grid[1]))
    return dataclasses.replace(shape, layer=layer, prefix_tokens=target.prefix_tokens, grid_size=grid)


def _outwards(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around the one at ``path``, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield model.get_submodule(path)


def _first_token(name: str) -> bool:
    """By the names that transformers, timm and torchvision give such parameters."""
    return (
        IN_WEIGHTS.fullmatch(name) is not None
        or re.fullmatch(r"([a-z_]+\.)*(class_token|reg_token|dist_token)", name) is not None
    )
