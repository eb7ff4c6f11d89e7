"""A model under examination: what it makes of its inputs, and what reaches its attention modules."""

import collections
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tiny_model
import torch
from torch import nn
from transformers import Cache, PreTrainedModel

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.discovery import modules as discovery

TOLERANCE = 1e-4
ROLES = ("encoder", "decoder", "cross")


@dataclass
class Modules:
    """Attention modules of one kind in a model."""

    role: str
    kind: str
    """vision, text, audio or other: what the part of the model that holds them reads."""
    reached: str
    count: int
    called: int
    """How many of them were called in the forward pass."""
    heads: list[tuple[int, int, int, int]]
    """(query heads, key/value heads, head dimension, value dimension) that were seen."""


class Subject:
    """A model under examination, its inputs, and what it makes of them by itself."""

    def __init__(self, model_type: str, model: PreTrainedModel, given: dict[str, Any]):
        self.model_type, self.model, self.given = model_type, model, given
        self.own = self.outputs()
        self.targets = discovery.targets(model)
        self.called: set[str] = set()
        self.seen: dict[str, tuple[int, int, int, int]] = {}
        self.found: dict[str, HeadShape | Exception] = {}
        self.masks: dict[str, list[tuple[Any, int, int]]] = collections.defaultdict(list)
        self.telling: set[str] = set()
        """Paths of the modules whose values differ from key to key: in others it is all the same what is attended."""

    def renew(self) -> None:
        self.model = tiny_model.build(self.model_type)

    def outputs(self, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """The floating outputs of a forward pass by name, at tokens that are not padding."""
        return named_tensors(tiny_model.forward(self.model if model is None else model, self.given), self.given)

    def swap(self, name: str, paths: list[str] | None = None, **options: Any) -> PreTrainedModel:
        """Put an attention into all modules, or into those at ``paths``."""
        paths = [target.path for target in self.targets] if paths is None else paths
        return ap.swap_attention(self.model, {"type": name, **options, "roles": list(ROLES), "modules": paths})

    def served_by(self, name: str) -> list[str]:
        """Paths of the modules that were called and of which the attention has all that they need."""
        attention = ap.get_attention(name)
        return [
            t.path for t in self.targets if t.path in self.called and all(getattr(attention, need) for need in t.needs)
        ]

    def observe(self) -> list[Modules]:
        """Note what reaches every slot in a forward pass, and sum it up by role and kind."""
        self.swap("softmax")
        rows = {row.path: row for row in ap.describe_attention(self.model)}
        for target in self.targets:
            module = self.model.get_submodule(target.path)
            config = getattr(module, "config", self.model.config)
            try:
                self.found[target.path] = head_sizes.head_shape(module, config)
            except ValueError as error:
                self.found[target.path] = error
            module.attn_plugin.register_forward_pre_hook(functools.partial(self._note, target.path), with_kwargs=True)
        self.outputs()
        groups: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
        for target in self.targets:
            kind = kind_of(discovery.owner(self.model, target.path))
            groups[target.role, kind, getattr(rows[target.path], "reached", "interface")].append(target.path)
        ap.restore_attention(self.model)
        return [
            Modules(*group, len(paths), len(self.called & set(paths)), sorted({*map(self.seen.get, paths)} - {None}))
            for group, paths in groups.items()
        ]

    def _note(self, path: str, slot: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = args
        self.called.add(path)
        self.seen[path] = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if (value - value[:, :, :1]).abs().max() > 1e-6:
            self.telling.add(path)
        self.masks[path].append((kwargs["mask"], query.shape[2], key.shape[2]))


def kind_of(owner: PreTrainedModel) -> str:
    """What the part of a model reads."""
    name, main = type(owner.config).__name__.lower() + type(owner).__name__.lower(), str(owner.main_input_name)
    for kind, words in (
        ("vision", "vision pixel image video vit detr"),
        ("audio", "audio speech input_features input_values codec"),
        ("text", "text input_ids"),
    ):
        if any(word in name or word in main for word in words.split()):
            return kind
    return "other"


def inline_attention(model: nn.Module) -> list[str]:
    """Classes of modules that attend by themselves: named so, with weights, and not reached, nor inside or around one
    that is."""
    reached = [path for path, _ in discovery.attention_modules(model)]
    found = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if not ("Attention" in name or "Attn" in name) or next(module.parameters(), None) is None:
            continue
        related = any(f"{r}.".startswith(f"{path}.") or f"{path}.".startswith(f"{r}.") for r in reached)
        inner = any("Attention" in type(m).__name__ for m in module.modules() if m is not module)
        if not related and not inner:
            found[name] = True
    return list(found)


def named_tensors(made: Any, given: dict[str, Any], name: str = "") -> dict[str, torch.Tensor]:
    """Floating tensors inside an output by name; rows of padding are left out."""
    if isinstance(made, torch.Tensor):
        if not made.is_floating_point():
            return {}
        mask = real_rows(made, given)
        if mask is not None:
            made = made[mask.bool()]
        return {name: made}
    if isinstance(made, Cache) or made is None:
        return {}
    items: Iterator[tuple[Any, Any]]
    if hasattr(made, "items"):
        # Attention maps are no outputs of a swapped model: some models put them out whenever they are there.
        items = ((key, value) for key, value in made.items() if not re.search("past|cache|attentions", str(key)))
    elif isinstance(made, (list, tuple)):
        items = ((str(i), value) for i, value in enumerate(made))
    else:
        return {}
    found = {}
    for key, value in items:
        found.update(named_tensors(value, given, f"{name}.{key}" if name else str(key)))
    return found


def real_rows(made: torch.Tensor, given: dict[str, Any]) -> torch.Tensor | None:
    """Which rows (B, N) of an output are no padding, where it has a row for each token, or for some tokens of sound."""
    mask = given.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or made.ndim < 3 or len(made) != len(mask):
        return None
    if made.shape[1] == mask.shape[1]:
        return mask
    decoder = given.get("decoder_input_ids", mask[:, :0])
    sound = "input_features" in given or "input_values" in given
    if not sound or made.shape[1] > mask.shape[1] or made.shape[1] == decoder.shape[1]:
        return None
    frames = mask.sum(dim=1, keepdim=True) * made.shape[1] // mask.shape[1]
    return torch.arange(made.shape[1]) < frames


def compare(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    """Raise unless all tensors are equal up to ``tolerance`` of the largest element, or of 1."""
    assert got.keys() == wanted.keys(), f"outputs are {sorted(got)}, not {sorted(wanted)}"
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape, (
            f"{name} is of shape {tuple(got[name].shape)}, not {tuple(tensor.shape)}"
        )
        finite = torch.isfinite(tensor)
        assert torch.equal(finite, torch.isfinite(got[name])), f"{name} is not finite elsewhere"
        if finite.any():
            scale = max(1.0, tensor[finite].abs().max().item())
            away = (got[name][finite] - tensor[finite]).abs().max().item() / scale
            assert away <= tolerance, f"{name} is {away:.2g} away"


def distance(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference; without end where speech has become of another length, or other objects are seen."""
    if got.keys() != wanted.keys() or any(got[name].shape != tensor.shape for name, tensor in wanted.items()):
        return float("inf")
    return max((float((got[name] - tensor).nan_to_num().abs().max()) for name, tensor in wanted.items()), default=0.0)
