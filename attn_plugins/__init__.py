"""Put another attention into a Hugging Face model that already exists. Importing this makes the flag known."""

from attn_plugins.attention import Attention, AttentionConfig, HeadShape
from attn_plugins.hf.caches import cache_bytes
from attn_plugins.hf.patches import install as _install
from attn_plugins.hf.swap import describe_attention, restore_attention, swap_attention
from attn_plugins.mask import AttentionMask
from attn_plugins.registry import get_attention, list_attentions, register_attention

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

_install()
