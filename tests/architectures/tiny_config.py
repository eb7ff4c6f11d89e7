"""Tiny configs of every model type, shrunk field by field from the type's own defaults.

Which size a field is follows from its name and from what its default looks like. All widths become WIDTH, so that sizes
that have to agree do; what a type needs beyond that is in ``corrections``.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

WIDTH, HEADS, HEAD_DIM, INNER, VOCABULARY, POSITIONS, IMAGE, PATCH = 32, 4, 8, 48, 128, 256, 32, 8
WINDOW = 5
"""Of a model's own sliding window: shorter than the texts, so that it matters."""

SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|_)type_vocab_size$|^vocab_size_or|_codebooks?$", 0),
    (r"vocab_size|vocabulary_size|num_embeddings$|^n_words$|codebook_size", VOCABULARY),
    (r"(q|kv|k|v|o)_lora_rank$", 16),
    (r"v_head_dim$", 12),
    (r"(^|_)expand$", 1),
    (r"d_state$|state_size$|^(mamba_)?chunk_size$|d_head$|head_dim$|^d_kv$|dim_head$", HEAD_DIM),
    (r"attention_head_size$|dim_per_head|head_size$|kv_channels$", HEAD_DIM),
    (r"(^|_)n_groups$", 2),
    (r"rotary_dim$", 4),
    (r"upsample_groups$", WIDTH),
    (r"n(um)?_filters$", 4),
    (r"num_key_value_heads$|num_kv_heads$|n_kv_heads?$|multi_query_group_num", 2),
    (r"(num|n)_.*heads?$|^n_heads?$|attention_heads$|^num_heads$|nhead", HEADS),
    (r"num_.*(layers|blocks|stages)$|(encoder|decoder)_layers$|^n_layers?$|layers?_num|depth$|num_layer$", 2),
    (
        r"experts_per_tok|experts_per_token|moe_k$|moe_topk|num_selected_experts|router_topk|top_k_experts|^topk_group$",
        2,
    ),
    (r"^n_group$|num_expert_group", 2),
    (r"shared_experts", 1),
    (r"num_.*experts$|n_routed_experts|num_local_experts|^num_experts", 4),
    (r"intermediate|ffn_dim|ffn_hidden|^d_ff$|mlp_dim|n_inner|feed_?forward|inner_size|ffn_size", INNER),
    (r"max_.*position|n_positions|context_length|max_seq_len|n_ctx|seq_length$|max_length$", POSITIONS),
    (r"image_size|img_size|input_resolution", IMAGE),
    (r"patch_size$", PATCH),
    (r"num_mel_bins|mel_bins|num_mels?$|feature_size$|input_feat", 16),
    (r"sliding_window|attention_chunk_size", WINDOW),
    (
        r"hidden_size|hidden_dim|d_model|embed_dim|n_embd|embedding_(size|dim)|projection_dim|output_dim|embeds_dim",
        WIDTH,
    ),
    (r"^dim$|_dim$|_size$|channels$|width|_dims$|hidden$|^d_|_d_ssm$|units$|_features$", WIDTH),
)
"""Pattern of a field's name -> its size where the default is larger, first match; 0 leaves it."""

NEEDED = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
}
"""Fields that models need also where they have no default."""

KEPT = re.compile(
    r"kernel|stride|merge|pool_|temporal|chunk_size_feed|num_channels|in_chans|in_channels$|audio_channels|num_labels|group"
    r"_size|downsample|upsampl(?!e_groups)|frame|hop_|sampling|sample_rate|dilation|padding|block_size|window_size|_ratio|grid"
)
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
OWN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def tiny_config(
    cls: type[PreTrainedConfig], given: PreTrainedConfig | None = None, /, **corrections: Any
) -> PreTrainedConfig:
    """A tiny config of a class.

    Args:
        cls: the class.
        given: the instance to shrink, where it is not the class's default.
        corrections: fields that are set to these values; a dict for a part is taken into that part's own, or is all of
            it where it has a ``model_type``.
    """
    values = fields_of(default(cls, corrections) if given is None else given)
    layers = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), None)
    picked = pick_layers(values, layers)
    if 0 < (values.get("num_kv_shared_layers") or 0) < layers:
        values["num_kv_shared_layers"] = len(picked)
        picked = picked * 2  # the second half shares keys and values of the first
    ids = iter(range(VOCABULARY - 30, VOCABULARY))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            own = corrections.pop(name, {})
            whole = isinstance(own, PreTrainedConfig) or "model_type" in own
            changes[name] = own if whole else tiny_config(type(value), value, **own)
        elif re.search(r"token_(id|index)$|(^|_)(pad|bos|eos)_index$", name):
            if isinstance(value, int) and value >= 0:
                changes[name] = OWN_IDS[name] if name in OWN_IDS else next(ids)
            elif isinstance(value, list):
                changes[name] = 2
        elif name in LAYERS and picked:
            changes[name] = len(picked)
        elif isinstance(value, (list, tuple)) and picked and len(value) == layers:
            changes[name] = type(value)(
                value[i] if isinstance(value[i], str) else shrink(name, value[i]) for i in picked
            )
        elif value is None and name in NEEDED:
            changes[name] = NEEDED[name]
        elif name == "rope_parameters" and isinstance(value, dict) and value and "mrope_section" in _modeling(cls):
            changes[name] = with_sections(value)
        else:
            changes[name] = shrink(name, value)
    if "kv_lora_rank" in values and isinstance(changes.get("num_key_value_heads"), int):
        changes["num_key_value_heads"] = changes["num_attention_heads"]  # latent attention gives every head its keys
    if "qk_head_dim" in values:
        changes["qk_head_dim"] = changes["qk_nope_head_dim"] + changes["qk_rope_head_dim"]
    config = cls(**{**changes, **corrections})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = OWN_IDS["decoder_start_token_id"]
    return config


def default(cls: type[PreTrainedConfig], corrections: dict[str, Any]) -> PreTrainedConfig:
    """A class's default config; some are invalid without corrections."""
    try:
        return cls()
    except Exception:
        return cls(**corrections)


def with_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters, or those of each type of layer, with sections for time, rows and columns that fit HEAD_DIM."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: with_sections(value) for kind, value in rope.items()}
    half = int(HEAD_DIM * rope.get("partial_rotary_factor", 1)) // 2
    return {**rope, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def pick_layers(values: dict[str, Any], layers: int | None) -> list[int]:
    """Indices of layers to keep: one at least of each kind that the config's lists tell apart, two at least."""
    if layers is None:
        return []
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == layers and layers > 1]
    kinds: dict[str, int] = {}
    for i in range(layers):
        kinds.setdefault(str([v[i] for v in lists if isinstance(v[i], (str, bool))]), i)
    picked = sorted(kinds.values())
    return picked if len(picked) > 1 else list(range(min(2, layers)))


def _modeling(cls: type) -> str:
    """The source of the models that a config class is for."""
    folder = Path(inspect.getfile(cls)).parent
    return "".join(file.read_text(encoding="utf8") for file in folder.glob("modeling_*.py"))


def shrink(name: str, value: Any) -> Any:
    """A tiny value for a field of this name with this default."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1 or (KEPT.search(name) and "hidden" not in name):
            return value
        size = next((size for pattern, size in SIZES if re.search(pattern, name)), 0)
        return min(value, size) if size else value
    if isinstance(value, (list, tuple)) and value and all(type(x) is int for x in value):
        return type(value)(_shrink_stages(name, list(value)))
    return value


def _shrink_stages(name: str, values: list[int]) -> list[int]:
    """Sizes of stages keep their ratios; numbers of layers become 1."""
    if re.search(r"depths?$|num_.*(layers|blocks)$|^layers$", name):
        return [1] * len(values)
    smallest = min((v for v in values if v > 0), default=1)
    if re.search(r"heads?$", name):
        return [max(1, v // smallest) for v in values]
    if KEPT.search(name) or (max(values) < 2 * WIDTH and not re.search("hidden|dim|channels", name)):
        return values
    if re.search(r"size|dim|channels|width|embed", name) and not re.search("image|patch|position|kernel", name):
        return [16 * v // smallest for v in values]
    return [IMAGE] * len(values) if "image" in name else values


def fields_of(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's own fields, without those that every config has, with their values."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"pad_token_id"}
    found = {}
    for field in dataclasses.fields(config):
        if field.init and field.name not in common:
            try:
                found[field.name] = getattr(config, field.name, None)
            except Exception:  # transformers refuses to give values that differ from layer to layer
                found[field.name] = vars(config).get(field.name, field.default)
    return found
