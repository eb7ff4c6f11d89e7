"""Put another attention into a Hugging Face model that already exists. Importing this makes the flag known."""

from importlib import metadata as _metadata

from attn_plugins.core.attention import Attention, AttentionConfig, HeadShape
from attn_plugins.core.former_names import install as _install_former_names
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention, list_attentions, register_attention
from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.hf.patches import install as _install
from attn_plugins.hf.swap import describe_attention, restore_attention, swap_attention

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionMask",
    "HeadShape",
    "cache_bytes",
    "describe_attention",
    "get_attention",
    "list_attentions",
    "register_attention",
    "restore_attention",
    "swap_attention",
]

try:
    __version__ = _metadata.version("attn-plugins")
except _metadata.PackageNotFoundError:  # run from its sources
    __version__ = "0+unknown"

_install_former_names()
_install()
