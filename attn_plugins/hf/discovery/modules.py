"""Find the attention modules of a model, and what each is: its role, its place, what it needs of an attention."""

import dataclasses
import inspect
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import Share, Target
from attn_plugins.core.attention import warn_of_dropout
from attn_plugins.hf.adapters import adapted, adapter_of
from attn_plugins.hf.discovery import by_code
from attn_plugins.hf.discovery.declared import declares_cross_attention
from attn_plugins.hf.discovery.first_tokens import prefix_tokens
from attn_plugins.hf.discovery.heads import head_numbers


def reached(module: nn.Module) -> str | None:
    """Which way an attention module can be swapped, or None where it can't be (or isn't one).

    "interface": it calls whatever transformers' attention interface holds. "adapter": it computes attention inline, and
    its family has an adapter that calls the interface in its place.
    """
    if adapter_of(type(module)) is not None:
        return "adapter"
    return None if by_code.dispatch_of(type(module)) is None else "interface"


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every swappable attention module, in the order of ``named_modules``."""
    for path, module in model.named_modules():
        if reached(module) is not None:
            yield path, module


def place_of(path: str) -> str:
    """The path that a module would have without what stands around modules.

    PEFT keeps a module to save beside the original one, and FSDP puts one around layers that it computes again.
    """
    return re.sub(r"\.(original_module|modules_to_save\.[^.]+)$|\._checkpoint_wrapped_module(?=\.|$)", "", path)


def owner(model: nn.Module, path: str) -> PreTrainedModel:
    """The innermost PreTrainedModel that holds the module at ``path``: the one that makes its masks."""
    found = _around(model, path)[0]
    assert isinstance(found, PreTrainedModel)
    return found


def outwards(model: nn.Module, path: str) -> Iterator[PreTrainedModel]:
    """The models that hold the module at ``path``, innermost first."""
    while path:
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
        if isinstance(part, PreTrainedModel):
            yield part


def targets(model: PreTrainedModel) -> list[Target]:
    """A :class:`~attn_plugins.core.assignment.Target` for each attention module.

    Layers are numbered in order within their stack: the modules of one role under one list of layers.
    """
    try:
        text = model.config.get_text_config()
    except ValueError:  # an encoder and a decoder of text, each with a config of its own (MusicGen)
        text = model.config
    composite = text is not model.config
    places: dict[str, list[str]] = {}
    found = []
    for path, module in attention_modules(model):
        module = adapted(module)
        place = place_of(path)
        role = role_of(model, place, module)
        stack = stack_of(place)
        numbered = places.setdefault(stack + role, [])
        if place not in numbered:
            numbered.append(place)
        layer = numbered.index(place)
        numbers = head_numbers(module, _config_of(module, model)) or (None, None)
        main = not composite or _config_of(module, model) is text or owner(model, path).config is text
        found.append(
            Target(
                path=path,
                role=role,
                stack=stack,
                layer=layer,
                main=main,
                needs=_needs(module, role, text, main),
                prefix_tokens=prefix_tokens(outwards(model, path)) if role == "encoder" else None,
                own_options=getattr(module, "own_options", {}),
                num_heads=numbers[0],
                num_key_value_heads=numbers[1],
            )
        )
    return [dataclasses.replace(one, layers=len(places[one.stack + one.role])) for one in found]


def role_of(model: nn.Module, path: str, module: nn.Module) -> str:
    """ "cross", "decoder" (causal self-attention) or "encoder" (bidirectional self-attention)."""
    around = _around(model, path)
    if declares_cross_attention(type(around[0]), path, module):
        return "cross"
    # Two levels are read, so that .crossattention.self (BERT) and T5LayerCrossAttention's .EncDecAttention count.
    names = [type(module).__name__, *path.split(".")[-2:]]
    spelled = any(
        re.search(r"cross|enc_?dec_?att|encoder_attn|token_to_image|image_to_token", name, re.IGNORECASE)
        for name in names
    )
    spelled = spelled or type(model.get_submodule(path.rpartition(".")[0])).__name__.endswith(
        ("CrossAttention", "CrossAttentionLayer")
    )
    if getattr(module, "is_cross_attention", spelled):
        return "cross"
    if getattr(module, "compressor", None) is not None:
        return "cross"  # after the keys of its tokens come those of another sequence, summaries of them (DeepSeek V4)
    if (held := getattr(module, "is_cross_in", None)) is not None and held(model, path):
        return "cross"
    if (held := getattr(module, "is_causal_in", None)) is not None:
        return "decoder" if held(model, path) else "encoder"
    masks = by_code.makes_masks(type(part) for part in around)
    if masks == {"bidirectional"}:
        return "encoder"
    flags = [getattr(module, name, None) for name in ("is_causal", "is_decoder")]
    if flags == [None, None]:
        taken = inspect.signature(inspect.unwrap(type(module).forward)).parameters
        # Llama 4's images take a cache too, and have no layer of it.
        cached = hasattr(module, "layer_idx") and any("past" in name or "cache" in name for name in taken)
        return "decoder" if masks == {"causal"} or cached else "encoder"
    if any(flags):
        # Phi-4's encoder of sound calls itself causal, and shows all frames.
        heard = getattr(around[0], "input_modalities", "text") == "audio" and not hasattr(module, "layer_idx")
        return "encoder" if heard and "causal" not in masks else "decoder"
    # CLIP's text model has the attention class of its images, which says is_causal=False, and a causal mask.
    return "decoder" if masks == {"causal"} and not _differ(owner(model, path), "is_causal") else "encoder"


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The innermost PreTrainedModel that holds the module at ``path``, and what is between them."""
    names = path.split(".")
    parts = [model, *(model.get_submodule(".".join(names[: i + 1])) for i in range(len(names) - 1))]
    start = max((i for i, part in enumerate(parts) if isinstance(part, PreTrainedModel)), default=0)
    return parts[start:]


def _differ(part: nn.Module, attribute: str) -> bool:
    """Whether the attention modules of a part have different values of an attribute."""
    return len({getattr(module, attribute, None) for _, module in attention_modules(part)}) > 1


def biased(module: nn.Module) -> bool:
    """Whether a module adds a bias to its scores, which it computes for all keys that a cache returns."""
    return hasattr(module, "has_relative_attention_bias") or getattr(module, "adds_position_bias", False)


def dropout(module: nn.Module) -> float:
    """Probability with which a module drops attention weights in training; 0 where its code does not tell."""
    module = adapted(module)
    cls: Any = type(module)
    found = []
    for name in by_code.dropout_names(cls) - {"training"}:
        try:
            found.append(operator.attrgetter(name)(module))
        except AttributeError:  # of a branch that this module does not take
            continue
    return max((float(p) for p in found if isinstance(p, (int, float))), default=0.0)


def warn_of_lost_dropout(assigned: Mapping[str, list[Share]], modules: Mapping[str, nn.Module]) -> None:
    """Say it where modules drop attention weights in training and the attention chosen for them has no form of that."""
    lost = {(share.rule.attention, dropout(modules[path])) for path, shares in assigned.items() for share in shares}
    for attention, probability in sorted(lost, key=lambda pair: (pair[0].name, pair[1])):
        if probability > 0 and not attention.dropout:
            warn_of_dropout(attention, probability)


def _config_of(module: nn.Module, model: PreTrainedModel) -> Any:
    return getattr(module, "config", model.config)


def stack_of(path: str) -> str:
    """The path up to its first number, such as ``model.layers`` of ``model.layers.0.self_attn``."""
    match = re.match(r"(.*?)\.\d+\.", path + ".")
    return match.group(1) if match else path


def _needs(module: nn.Module, role: str, text_config: Any, main: bool) -> dict[str, str]:
    config = getattr(module, "config", None) or (text_config if main else None)
    needs = {
        {"decoder": "causal", "encoder": "bidirectional", "cross": "cross"}[role]: {
            "decoder": "it is causal",
            "encoder": "it is bidirectional",
            "cross": "it is cross-attention",
        }[role]
    }
    other = inspect.signature(inspect.unwrap(type(module).forward)).parameters.get("encoder_hidden_states")
    if role != "cross" and other is not None and other.default is inspect.Parameter.empty:
        needs["cross"] = "its keys are those of the encoder beside its own (merged attention)"
    if biased(module):
        needs["position_bias"] = "it adds a relative position bias to the scores"
    cls: Any = type(module)
    softcap = getattr(module, "attn_logit_softcapping", None)
    if softcap is not None:
        needs["softcap"] = f"it limits scores with softcap={softcap}"
    if isinstance(getattr(module, "sinks", None), nn.Parameter):
        needs["sinks"] = "it has learned sink logits"
    elif "sinks" in by_code.keyword_arguments(cls):
        needs["sinks"] = "it makes a sink logit for each query"
        needs.setdefault("position_bias", needs["sinks"])
    if role != "cross" and (own := _own_pattern(module, config)):
        needs["any_mask"] = f"it has its own mask ({own})"
    return needs


def _own_pattern(module: nn.Module, config: Any) -> str | None:
    """The model's own local pattern of this layer, if config or module show one."""
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and isinstance(index, int) and index < len(kinds):
        return kinds[index] if kinds[index] in ("sliding_attention", "chunked_attention") else None
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    if isinstance(window, int):
        return f"sliding_window={window}"
    chunk = getattr(config, "attention_chunk_size", None)
    return f"attention_chunk_size={chunk}" if isinstance(chunk, int) else None
