"""Quantized base models, by transformers' own configs: all linear layers but what trains whole.

A model that is loaded so has frozen weights of few bits, and LoRA and slots beside them in ordinary numbers (QLoRA:
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).
"""

import inspect
import re
from typing import Any

import torch
from transformers import AutoConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer, AutoQuantizationConfig

from attn_plugins.config.extras import need
from attn_plugins.core.options import check_keys
from attn_plugins.hf.names import SLOT
from attn_plugins.training.heads import beside_attention

LEFT_AS_THEY_ARE = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
"""What the methods call the modules that they do not quantize."""


def quantized(asked: dict[str, Any] | None, adapter: dict[str, Any] | None, cls: Any, base: str) -> dict[str, Any]:
    """What from_pretrained is told of quantization.

    Args:
        asked: what :func:`quantized_by` takes, or None.
        adapter: what is known of the adapter that comes on top, or None.
        cls: auto class that loads the base model.
        base: folder or name of that.

    Raises:
        ValueError: it cannot be had, or what is to be quantized is an adapter, or quantized already.
    """
    config = AutoConfig.from_pretrained(base)
    already = getattr(config, "quantization_config", None) is not None
    if asked is not None and (adapter is not None or already):
        what = "quantized already" if adapter is None else "of an adapter, and comes back as it was"
        raise ValueError(f"the base model {base!r} is {what}; leave quantization out")
    if asked is not None:
        return {"quantization_config": quantized_by(asked, _kept_whole(cls, config))}
    saved = None if adapter is None or already else adapter["quantization"]
    return {} if saved is None else {"quantization_config": _as_saved(saved)}


def quantized_by(options: dict[str, Any], whole: list[str]) -> Any:
    """transformers' config for ``{"method": name, option: value}``.

    Args:
        whole: patterns of modules that are not quantized, beside those that the options name.

    Raises:
        ValueError: there is no such method or option, what it needs is not installed, or adapters cannot be trained on
            what it makes.
    """
    given = dict(options)
    method = given.pop("method", None)
    methods = {name.removesuffix("_4bit").removesuffix("_8bit"): cls for name, cls in _methods().items()}
    if method not in methods:
        raise ValueError(f"quantization.method={method!r}; allowed: {', '.join(sorted(methods))}")
    cls = methods[method]
    known = [name for name in inspect.signature(cls).parameters if name != "kwargs"]
    check_keys(given, known, "quantization")
    if method == "bitsandbytes" and not (given.get("load_in_8bit") or given.get("load_in_4bit")):
        raise ValueError("quantization.method='bitsandbytes' needs load_in_8bit: true, or load_in_4bit: true")
    if method == "torchao":
        given["quant_type"] = _of_torchao(given.get("quant_type", "Int8WeightOnlyConfig"))
    field = next(name for name in LEFT_AS_THEY_ARE if name in known)
    given[field] = [*(given.get(field) or []), *whole]
    try:
        config = cls(**given)
        quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment()
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"quantization: {' '.join(str(error).split())}") from error
    if not quantizer.is_trainable:
        raise ValueError(f"quantization={options}: adapters cannot be trained on what that makes of a model")
    return config


def _as_saved(tree: dict[str, Any]) -> Any:
    """transformers' config of a quantization, from what config.json holds of it; ValueError where it cannot be had."""
    try:
        config = AutoQuantizationConfig.from_dict(tree)
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment()
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        method = tree.get("quant_method")
        raise ValueError(f"its base is quantized by {method}: {' '.join(str(error).split())}") from error
    return config


def quantization_of(model: Any) -> str | None:
    """Name of the method that a model is quantized by, if it is."""
    method = getattr(getattr(model.config, "quantization_config", None), "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _kept_whole(cls: Any, config: Any) -> list[str]:
    """Patterns of the modules of a model that are not quantized: slots, and heads, which say what comes out.

    Args:
        cls: auto class that makes the model.
        config: of the model.
    """
    with torch.device("meta"):
        model = cls.from_config(config)
    output = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is output}
    return [rf".*\.{SLOT}", *(f"^{re.escape(name)}" for name in sorted({*heads, *beside_attention(model)}))]


def _methods() -> dict[str, Any]:
    """Name -> class, of the methods that can leave modules as they are."""
    named: dict[str, Any] = AUTO_QUANTIZATION_CONFIG_MAPPING
    return {name: cls for name, cls in named.items() if set(LEFT_AS_THEY_ARE) & set(inspect.signature(cls).parameters)}


def _of_torchao(asked: Any) -> Any:
    """A config of torchao, from its name or ``{name: options}``."""
    made = need("torchao.quantization", "quantized")
    name, options = next(iter(asked.items())) if isinstance(asked, dict) and len(asked) == 1 else (asked, {})
    cls = getattr(made, name, None) if isinstance(name, str) and name.endswith("Config") else None
    if cls is None:
        raise ValueError(
            f"quantization.quant_type={asked!r}; allowed: a config of torchao, such as Int8WeightOnlyConfig"
        )
    try:
        return cls(**(options or {}))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"quantization.quant_type.{name}: {error}") from error
