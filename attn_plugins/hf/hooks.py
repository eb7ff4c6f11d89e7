"""Removing forward hooks: torch's own handles are lost where a module is copied or saved."""

from torch import nn


def remove_hooks(module: nn.Module, *hooks: object) -> None:
    """Remove these functions from the forward pre-hooks and forward hooks of a module."""
    for registered, options in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in registered.items() if hook in hooks]:
            del registered[key]
            for table in options:
                table.pop(key, None)
