"""Models without weights: a config of transformers, as YAML gives it, whose weights are drawn from a run's seed."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from attn_plugins.config.yaml import parse_yaml, read_yaml_file
from attn_plugins.core.options import did_you_mean, mismatch, shown
from attn_plugins.training.trained_tokenizer import TrainedTokenizer, read_settings, train_tokenizer

FILES = (".yaml", ".yml")
TOKENIZER = "tokenizer"
BYTES = "bytes"
"""The tokenizer whose tokens are the bytes of UTF-8: transformers' ByT5Tokenizer, without sentinels."""

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class NewModel:
    """What a model without weights is made of."""

    config: Any
    given: frozenset[str]
    """Names of the fields that it was told."""
    tokenizer: str | TrainedTokenizer | None
    """``bytes``, a folder, a name on the hub, or how one is trained; None where tasks make tokens themselves."""


def spelled_model(value: Any) -> str:
    """A model as settings name it, as the text that stands for it from then on.

    That is the value itself, unless it is a YAML file or a mapping with the fields of a config: one line of JSON with
    all that was given.

    Raises:
        ValueError: it is neither, or the config is none of transformers'.
    """
    if isinstance(value, str) and not is_new(value):
        return value
    if not isinstance(value, (str, dict)):
        raise ValueError(mismatch(value, str, "model"))
    where = value if isinstance(value, str) and value.endswith(FILES) else "model"
    if where is value:
        value = read_yaml_file(where, "model ")
    try:
        fields = parse_yaml(value) if isinstance(value, str) else value
        if not isinstance(fields, dict):
            raise ValueError(f"{shown(fields)}; allowed: a mapping with model_type and fields of its config")
        _read(fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return json.dumps(fields, sort_keys=True)


def is_new(source: str) -> bool:
    """Whether a model is one without weights: a YAML file, or a mapping."""
    return source.endswith(FILES) or source.startswith("{")


def new_model(source: str) -> NewModel:
    """What :func:`spelled_model` has made a text of; ValueError as there."""
    return _read(json.loads(spelled_model(source)))


def told_model(source: str) -> str:
    """A model for people."""
    if not is_new(source):
        return source
    fields = json.loads(spelled_model(source))
    others = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "model_type")
    return f"a new {fields['model_type']}" + (f" ({others})" if others else "")


def _read(given: dict[str, Any]) -> NewModel:
    fields = dict(given)
    if "model_type" not in fields:
        raise ValueError(f"model_type is missing; got {', '.join(map(str, fields)) or 'nothing'}")
    kind, tokenizer = fields.pop("model_type"), fields.pop(TOKENIZER, None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = did_you_mean(kind, CONFIG_MAPPING)
        raise ValueError(f"model_type={shown(kind)}{near}; allowed: a type of model that transformers knows, as llama")
    if isinstance(tokenizer, dict):
        tokenizer = read_settings(tokenizer)
        fields.setdefault("vocab_size", tokenizer.vocab_size)
    elif tokenizer is not None and not isinstance(tokenizer, str):
        others = f"{BYTES!r} needs no files, {{train: bpe, vocab_size: 4000}} makes one of the rows to train on"
        raise ValueError(f"{mismatch(tokenizer, str, TOKENIZER)}; {others}")
    cls: Any = CONFIG_MAPPING[kind]
    known = cls()
    for name in fields:
        if not isinstance(name, str) or name.startswith("_") or not hasattr(known, name):
            allowed = [one for one in known.to_dict() if not one.startswith("_")]
            raise ValueError(f"{kind} has no field {shown(name)}{did_you_mean(name, allowed)} in its config")
    try:
        config = cls(**copy.deepcopy(fields))
    except Exception as error:  # each family checks what it takes in its own way
        raise ValueError(f"transformers makes no config of {kind}: {' '.join(str(error).split())}") from error
    return NewModel(config=config, given=frozenset(fields), tokenizer=tokenizer)


def made_tokenizer(new: NewModel, load: Any, texts: Iterable[str] | None) -> Any:
    """The tokenizer of a new model, whose number of tokens and ids the config gets where it was told none.

    Args:
        load: (name) -> tokenizer, for one that is read.
        texts: for one that is trained; none at all for one of bytes, where sizes are all that is asked.

    Raises:
        ValueError: it is to be trained, and there are no rows to train on.
    """
    if new.tokenizer is None:
        return None
    if isinstance(new.tokenizer, TrainedTokenizer):
        if texts is None:
            raise ValueError(
                "the tokenizer of this model is trained on the rows of a fine-tune, and there are none here; allowed: "
                f"the folder of a model that was trained, or {TOKENIZER}: {BYTES}"
            )
        made = train_tokenizer(new.tokenizer, texts)
    else:
        made = transformers.ByT5Tokenizer(extra_ids=0) if new.tokenizer == BYTES else load(new.tokenizer)
    found = {"vocab_size": len(made), **{name: getattr(made, name) for name in IDS}}
    for name, value in found.items():
        if name not in new.given:
            setattr(new.config, name, value)
    return made
