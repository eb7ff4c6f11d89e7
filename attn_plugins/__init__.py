"""Put another attention into a Hugging Face model that already exists. Importing this makes the flag known.

Nothing else is imported at once, so that the command line answers without torch: the public names bring their modules
when they are asked for, and transformers learns of the flag as soon as anything has imported it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from attn_plugins.config.after_import import once_imported
from attn_plugins.core.former_names import install as _install_former_names

if TYPE_CHECKING:
    from attn_plugins.choice.choose import choose_attention
    from attn_plugins.core.attention import Attention, AttentionConfig
    from attn_plugins.core.backend import Backend, list_backends, register_backend
    from attn_plugins.core.heads import HeadShape
    from attn_plugins.core.mask import AttentionMask
    from attn_plugins.core.registry import get_attention, list_attentions, register_attention
    from attn_plugins.core.structure import Structure
    from attn_plugins.data.structure_collator import StructureCollator
    from attn_plugins.export.native import export_native
    from attn_plugins.hf.caches.cache_layers import cache_bytes
    from attn_plugins.hf.parallel.context import context_parallel
    from attn_plugins.inspection.inspect import inspect_attention
    from attn_plugins.torch_modules.layer import AttentionLayer
    from attn_plugins.torch_modules.swap import describe_attention, restore_attention, swap_attention
    from attn_plugins.training.distillation import distillation_loss
    from attn_plugins.transfer.attention_transfer import transfer_attention

    __version__: str

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionLayer",
    "AttentionMask",
    "Backend",
    "HeadShape",
    "Structure",
    "StructureCollator",
    "cache_bytes",
    "choose_attention",
    "context_parallel",
    "describe_attention",
    "distillation_loss",
    "export_native",
    "get_attention",
    "inspect_attention",
    "list_attentions",
    "list_backends",
    "register_attention",
    "register_backend",
    "restore_attention",
    "swap_attention",
    "transfer_attention",
]

_HOMES = {
    "Attention": "attn_plugins.core.attention",
    "AttentionConfig": "attn_plugins.core.attention",
    "AttentionLayer": "attn_plugins.torch_modules.layer",
    "AttentionMask": "attn_plugins.core.mask",
    "Backend": "attn_plugins.core.backend",
    "HeadShape": "attn_plugins.core.heads",
    "Structure": "attn_plugins.core.structure",
    "StructureCollator": "attn_plugins.data.structure_collator",
    "cache_bytes": "attn_plugins.hf.caches.cache_layers",
    "choose_attention": "attn_plugins.choice.choose",
    "context_parallel": "attn_plugins.hf.parallel.context",
    "describe_attention": "attn_plugins.torch_modules.swap",
    "distillation_loss": "attn_plugins.training.distillation",
    "export_native": "attn_plugins.export.native",
    "get_attention": "attn_plugins.core.registry",
    "inspect_attention": "attn_plugins.inspection.inspect",
    "list_attentions": "attn_plugins.core.registry",
    "list_backends": "attn_plugins.core.backend",
    "register_attention": "attn_plugins.core.registry",
    "register_backend": "attn_plugins.core.backend",
    "restore_attention": "attn_plugins.torch_modules.swap",
    "swap_attention": "attn_plugins.torch_modules.swap",
    "transfer_attention": "attn_plugins.transfer.attention_transfer",
}
"""Where a public name comes from."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("attn-plugins")
    except metadata.PackageNotFoundError:  # run from its sources
        return "0+unknown"


def _install() -> None:
    from attn_plugins.hf.patches import install

    install()


_install_former_names()
once_imported("transformers", _install)
