"""A model run again from a block on: what comes before gives what it gave the last time, without being computed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attn_plugins.hf.caches.cache_layers import lent_its_keys


class Resumed:
    """Runs of a model on one input, of which the first notes what each block gives.

    The model's own code runs all that is around the blocks (embeddings, positions, masks, the head). Blocks are the
    items of its lists of modules; one that is called several times, or after the one to resume from, is computed.

    Args:
        model: it is not to be used by others meanwhile.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        items = {path: module for path, module in model.named_modules() if _is_block(path)}
        lends = any(lent_its_keys(module) for module in model.modules())
        self._blocks: dict[str, nn.Module] = {} if lends else items  # else blocks are more than what they give

    def first(self, run: Any) -> Any:
        """Run it whole, and note what the blocks give."""
        self._begun: dict[str, int] = {}
        self._given: dict[str, list[Any]] = {}
        order: list[str] = []
        hooks = []
        for path, block in self._blocks.items():

            def enter(_: nn.Module, args: Any, path: str = path) -> None:
                self._begun.setdefault(path, len(order))

            def leave(_: nn.Module, args: Any, output: Any, path: str = path) -> None:
                order.append(path)
                self._given.setdefault(path, []).append(_again(output))

            hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
        try:
            output = run()
        finally:
            for hook in hooks:
                hook.remove()
        self._order = order
        return output

    def from_block(self, path: str, run: Any) -> Any:
        """Run it again, from the block at or around ``path`` on."""
        around = next((block for block in self._blocks if f"{path}.".startswith(f"{block}.")), None)
        before = [] if around is None else self._order[: self._begun.get(around, 0)]
        skipped = [block for block in dict.fromkeys(before) if len(self._given[block]) == 1]
        with contextlib.ExitStack() as stack:
            for block in skipped:
                stack.enter_context(_giving(self._blocks[block], self._given[block][0]))
            return run()


@contextlib.contextmanager
def _giving(module: nn.Module, given: Any) -> Iterator[None]:
    """Have a module give this, whatever it is called with."""
    attributes = vars(module)
    before = {name: attributes[name] for name in ("forward",) if name in attributes}  # one of accelerate's, say
    attributes["forward"] = lambda *args, **kwargs: _again(given)
    try:
        yield
    finally:
        del attributes["forward"]
        attributes.update(before)


def _is_block(path: str) -> bool:
    names = path.split(".")
    return names[-1].isdigit() and not any(name.isdigit() for name in names[:-1])


def _again(given: Any) -> Any:
    """What a block gave, in tensors that may be written to."""
    if isinstance(given, torch.Tensor):
        return given.clone()
    return tuple(map(_again, given)) if type(given) is tuple else given
