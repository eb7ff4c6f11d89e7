import contextlib
import inspect
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_plugins.benchmark.contenders import Contender, ContenderConfig, LeftOutError, register_contender


@register_contender("kvpress")
class KVPress(Contender):
    """A press of NVIDIA's kvpress: what a prompt has left in the cache is cut after it was read, and decoding goes on.

    All that a call reads first through a cache is the prompt, which sees all of itself; what comes afterwards sees what
    is left of it. So one pass over a row, in which a press does nothing, is left out, and so are more than one piece of
    text after the prompt, which nothing compresses. In a prompt that ends with a question the press sees that too.

    Three things are set right around the package: transformers 5 no longer tells attention modules ``cache_position``,
    by which a press knows a prompt; positions after the prompt are counted in tokens read, not in keys left; and what
    the package does to transformers' attention functions when it is imported holds for this model alone.
    """

    package, distribution = "kvpress", "kvpress"
    install = "pip install --no-deps kvpress && pip install 'cachetools<6' fire"  # it asks for transformers below 5.3
    what = "presses of kvpress, which cut the cache of a prompt"
    measures = ("evaluate",)
    limits = "it cuts the cache of a prompt once that was read, and this reads none"

    @dataclass(frozen=True, kw_only=True)
    class Config(ContenderConfig):
        press: str
        """Name of its class, such as ExpectedAttentionPress."""
        compression_ratio: float = 0.5
        """Share of the prompt's keys and values that is taken out."""
        options: dict[str, Any] = field(default_factory=dict)
        """Other options of the press; one that is a press itself is written ``{press: NAME, ...}``."""

        def __post_init__(self) -> None:
            self.require(0 <= self.compression_ratio < 1, "compression_ratio", "0 to less than 1")

    def ready(self, model):
        kvpress = self._library()
        if not isinstance(model, kvpress.SUPPORTED_MODELS):
            known = ", ".join(cls.__name__ for cls in kvpress.SUPPORTED_MODELS)
            raise LeftOutError(f"kvpress does not support {type(model).__name__}; it supports {known}")
        press = self._press(kvpress)
        base = model.config._attn_implementation
        if base not in ALL_ATTENTION_FUNCTIONS or base not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise LeftOutError(f"kvpress has no form of attn_implementation {base!r}")
        patched = kvpress.attention_patch.attention_patch(ALL_ATTENTION_FUNCTIONS[base])
        AttentionInterface.register(f"kvpress-{base}", patched)
        AttentionMaskInterface.register(f"kvpress-{base}", ALL_MASK_ATTENTION_FUNCTIONS[base])
        model.set_attn_implementation(f"kvpress-{base}")
        pressing = contextlib.ExitStack()
        pressing.enter_context(press(model))
        prompts = _Prompts(press, pressing, turned=isinstance(press, kvpress.KeyRerotationPress))
        model.register_forward_pre_hook(prompts.before, with_kwargs=True)
        model.register_forward_hook(prompts.after, with_kwargs=True)
        return model

    def _library(self) -> Any:
        before = dict(ALL_ATTENTION_FUNCTIONS.items())
        try:
            return self.library()
        finally:
            for name, function in before.items():
                ALL_ATTENTION_FUNCTIONS[name] = function

    def _press(self, kvpress: Any) -> Any:
        """The press that the options ask for.

        Raises:
            LeftOutError: its ratio cannot be set, so that it could not be compared with others at the same.
        """
        name, ratio = self.config.press, self.config.compression_ratio
        press = _made(kvpress, name, self.config.options)
        has = "compression_ratio" in inspect.signature(type(press)).parameters
        try:
            if not has and not isinstance(getattr(type(press), "compression_ratio", None), property):
                raise AttributeError("it has none")
            press.compression_ratio = ratio
            if press.compression_ratio != ratio:
                raise ValueError(f"it stays at {press.compression_ratio}")
        except (AttributeError, AssertionError, ValueError) as error:
            raise LeftOutError(
                f"the compression_ratio of {self.config.press} cannot be set to {ratio}: {error}"
            ) from None
        return press


def _made(kvpress: Any, name: str, options: dict[str, Any]) -> Any:
    """A press with its options.

    Raises:
        ValueError: there is none of that name, or it does not take these options.
    """
    cls = getattr(kvpress, name, None)
    if not (isinstance(cls, type) and issubclass(cls, kvpress.BasePress)):
        raise ValueError(f"press={name!r}; allowed: classes of kvpress that are presses, such as KnormPress")
    inner = {
        key: _made(kvpress, value["press"], {name: one for name, one in value.items() if name != "press"})
        for key, value in options.items()
        if isinstance(value, dict) and "press" in value
    }
    try:
        return cls(**{**options, **inner})
    except (TypeError, AssertionError) as error:
        raise ValueError(f"press={name} with options {options}: {error}") from None


class _Prompts:
    """Around each call of a model: what of a text is its prompt, where its tokens are, and whether any were cut."""

    def __init__(self, press: Any, pressing: contextlib.ExitStack, *, turned: bool):
        self.press, self.pressing, self.turned = press, pressing, turned
        """The press, what holds it in the model, and whether it gives the keys that are left the first positions."""
        self.read: weakref.WeakKeyDictionary[Any, list[int]] = weakref.WeakKeyDictionary()
        """Cache -> lengths of the pieces that have come through it."""

    def before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        cache, mask = given.get("past_key_values"), given.pop("attention_mask", None)
        if cache is None and not (model.config.use_cache if given.get("use_cache") is None else given["use_cache"]):
            raise LeftOutError(
                "kvpress cuts the cache of a prompt once it was read, and this reads rows without a cache, so that "
                "nothing would be cut; allowed: tasks that answer token by token (by: generate), and "
                "streaming_perplexity of two pieces"
            )
        if mask is not None and (mask.ndim != 2 or not mask.all()):
            raise LeftOutError("kvpress would keep padding as keys; allowed: rows of one length, or one at a time")
        if cache is None:
            cache = DynamicCache(config=model.config)
        layers: list[Any] = cache.layers
        tokens = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        pieces = self.read.setdefault(cache, [])
        if tokens.shape[1] > 1 and sum(length > 1 for length in pieces) > 1:
            raise LeftOutError(
                f"kvpress cuts the first piece of a text alone, here of {pieces[0]} tokens, and all after the second "
                "would hide how little that is; allowed: two pieces"
            )
        if pieces and tokens.shape[1] > 1 and len({layer.get_seq_length() for layer in layers}) > 1:
            raise LeftOutError(
                "this press leaves more keys in some layers than in others, and transformers makes one mask for all; "
                "allowed after the prompt: single tokens (by: generate)"
            )
        place = torch.arange(tokens.shape[1], device=tokens.device) + sum(pieces)
        pieces.append(tokens.shape[1])
        at = {"cache_position": place, "position_ids": place.expand(tokens.shape[0], -1)}
        return (), {**given, "past_key_values": cache, "use_cache": True, **at}

    def after(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs["past_key_values"]
        if len(self.read[cache]) > 1 or self.press.compression_ratio == 0:
            return
        masked = [getattr(module, "masked_key_indices", None) is not None for module in model.modules()]
        (length,) = self.read[cache]
        if not any(masked) and all(layer.keys.shape[2] >= length for layer in cache.layers):
            raise LeftOutError(
                f"{type(self.press).__name__} took no key out of a prompt of {length} tokens: it works at another time"
            )
        if self.turned:
            self.read[cache] = [cache.get_seq_length()]
