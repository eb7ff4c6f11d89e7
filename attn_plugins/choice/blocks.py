"""Blocks: the residual stream that enters each, and the layer that projects the heads of an attention in it onto that.

Nothing goes by names of layers. A block is what stands in a list of modules, and has the attention module somewhere
inside: its first argument is the stream. The output projection is the first layer with a matrix that is called after
the attention function, in the block, with as many features as all heads have together; it may be the attention
module's own or that of one around it, quantised, or under LoRA.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Project = Callable[[torch.Tensor], torch.Tensor]
"""A linear map (N, H V) -> (N, E)."""


@dataclass
class _Pending:
    """An attention that waits for its output projection."""

    path: str
    features: int
    use: Callable[[Project], None]


class Blocks:
    """Hooks on the blocks around some attention modules, for as long as it is entered.

    Args:
        model: it is not to be used by others meanwhile.
        paths: of attention modules.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self._block = {path: block_of(path) for path in paths}
        self._modules = {block: model.get_submodule(block) for block in self._block.values()}
        self._stream: dict[str, torch.Tensor] = {}
        self._pending: dict[str, _Pending] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Blocks":
        for block, module in self._modules.items():

            def enter(_: nn.Module, args: Any, kwargs: Any, block: str = block) -> None:
                tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
                self._stream[block] = next(x for x in tensors if x.is_floating_point()).detach()

            def leave(_: nn.Module, args: Any, output: Any, block: str = block) -> None:
                self._refuse(block)

            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(leave))
            for layer in module.modules():
                weight = getattr(layer, "weight", None)
                if isinstance(weight, torch.Tensor) and weight.ndim > 1:

                    def project(layer: nn.Module, args: Any, block: str = block) -> None:
                        self._project(block, layer, args)

                    self._hooks.append(layer.register_forward_pre_hook(project))
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._stream, self._pending = [], {}, {}

    def stream(self, path: str) -> torch.Tensor:
        """What has entered the block around an attention module last."""
        return self._stream[self._block[path]]

    def when_projected(self, path: str, features: int, use: Callable[[Project], None]) -> None:
        """Have ``use`` called with the output projection of an attention module, whose attention was just computed."""
        self._refuse(self._block[path])
        self._pending[self._block[path]] = _Pending(path, features, use)

    def _project(self, block: str, layer: Any, args: tuple[Any, ...]) -> None:
        pending = self._pending.get(block)
        if pending is None or not args or args[0].shape[-1] != pending.features:
            return
        del self._pending[block]
        dtype = args[0].dtype

        def linear(x_NF: torch.Tensor) -> torch.Tensor:
            # The layer's own call, whatever it is made of; what it gives for zeros is its bias.
            with_zeros = torch.cat([x_NF, torch.zeros_like(x_NF[:1])]).to(dtype)
            out_NE = layer.forward(with_zeros)
            return out_NE[:-1].float() - out_NE[-1:].float()

        pending.use(linear)

    def _refuse(self, block: str) -> None:
        if block in self._pending:
            raise ValueError(
                f"no layer projects the outputs of {self._pending[block].path} ({self._pending[block].features} "
                "features) onto the residual stream; choose by another score"
            )


def block_of(path: str) -> str:
    """Path of the block around an attention module: the innermost item of a list, else the module that holds it."""
    names = path.split(".")
    numbered = [place for place, name in enumerate(names[:-1]) if name.isdigit()]
    return ".".join(names[: numbered[-1] + 1] if numbered else names[:-1])
