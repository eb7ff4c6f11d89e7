"""From what a user names (built-in name, folder, model on the hub, PEFT adapter) to a model with its attention."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from attn_plugins.config.extras import need
from attn_plugins.config.yaml import read_json, read_yaml_file
from attn_plugins.core.options import shown
from attn_plugins.core.rules import parse_rules
from attn_plugins.hf.names import SLOT
from attn_plugins.hf.parallel.sharding import take_off_meta
from attn_plugins.tasks.kinds import KINDS, PEFT_TASKS
from attn_plugins.training.new_models import is_new, made_tokenizer, new_model
from attn_plugins.training.quantization import quantized

DEMO = "smollm2-135m-demo"
"""Built-in model name: SmolLM2-135M-Instruct, fetched and converted by attn_plugins.data.demo_model."""

AS_SAVED = "as-saved"
"""The value of ``attention`` that leaves a checkpoint as it is: swapped if it was saved swapped."""

ANY = "any"
"""Instead of a kind of model: whatever the checkpoint was saved from."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to train or measure."""

    model: nn.Module
    processing: Any
    """What makes inputs of raw ones: the tokenizer, or a processor of pictures or sound."""
    source: str
    """What transformers loaded it from: a folder or a name on the hub."""
    auto: str
    """Name of the class that loads it with its head."""
    fresh: list[str]
    """Names of parameters that the checkpoint did not hold, so that they are at their initial values."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; of a processor that has one, its."""
        return getattr(self.processing, "tokenizer", self.processing)


def read_attention(value: Any, *, files: tuple[str, ...] = ()) -> Any:
    """Attention rules as a config or a flag gives them: a name, a rule, a list of rules, null, or a YAML file of these.

    Args:
        files: those that led here, each naming the next.

    Raises:
        ValueError: the file is not there, files name each other in a ring, or the rules are wrong as far as that shows
            without a model.
    """
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        if value in files:
            raise ValueError(f"files of attentions name each other in a ring: {', '.join([*files, value])}")
        read = read_yaml_file(value, "attention ")
        try:
            return read_attention(read, files=(*files, value))
        except ValueError as error:
            raise error if files else ValueError(f"{value}: {error}") from None
    if value is not None and value != AS_SAVED:
        parse_rules(value)
    return value


def refuse_new(source: str) -> None:
    """Raise a ValueError for a model without weights, where they are needed."""
    if is_new(source):
        raise ValueError(
            f"model {shown(source)} is a config without weights; allowed here: a folder, a name on the hub"
        )


def resolve(source: str) -> str:
    """The folder or hub name behind a name.

    Raises:
        ValueError: it names a folder that is not there, the built-in model cannot be had, or the model has no weights.
    """
    refuse_new(source)
    if source == DEMO:
        from attn_plugins.data.demo_model import demo_model

        try:
            return str(demo_model())
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ValueError(f"model {source!r} is a file; allowed: a folder with config.json, or a name on the hub")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source:
        raise ValueError(f"no such model folder: {source!r}")
    return source


def load(
    source: str,
    *,
    attention: Any = AS_SAVED,
    kind: str = "causal-lm",
    labels: list[str] | None = None,
    dtype: Dtype = "auto",
    seed: int = 0,
    trainable: bool = False,
    processing: str | None = None,
    quantization: dict[str, Any] | None = None,
    texts: Iterable[str] | None = None,
) -> Loaded:
    """Load a model, or the base model of a PEFT adapter and the adapter on top, with its tokenizer or processor.

    One without weights (:mod:`attn_plugins.training.new_models`) has all of them drawn from the seed.

    Args:
        attention: rules, ``None`` for the model's own attention, or "as-saved".
        kind: a key of :data:`attn_plugins.tasks.kinds.KINDS`, or "any" for what the checkpoint was saved from; of an
            adapter that is what it says that it was trained for.
        labels: names of the classes of a classifier that is to be trained; None for those of the checkpoint.
        seed: what new weights are drawn from.
        trainable: the weights of an adapter are to train.
        processing: kind of model whose inputs are to be made; None for ``kind``.
        quantization: of a base model, as a fine-tune names it; that of an adapter comes back without.
        texts: what the tokenizer of a model without weights is trained on, where its config asks for that.

    Raises:
        ValueError: there is no such model, or the attention does not fit it.
    """
    if is_new(source):
        transformers.set_seed(seed)
        return _new(source, attention, kind, labels, dtype, texts)
    folder = resolve(source)
    adapter = read_adapter(folder)
    base, attention = (
        (folder, attention) if adapter is None else (resolve(adapter["base"]), _of_adapter(attention, adapter))
    )
    if kind == ANY and adapter is not None:
        with one_line(source):
            kind = _kind_of(adapter, base)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention != AS_SAVED:
        options["attn_plugin"] = read_attention(attention)
    names = labels if labels is not None or adapter is None else adapter["labels"]
    if names is not None and kind in KINDS and KINDS[kind].classes:
        options["id2label"] = dict(enumerate(names))
        options["label2id"] = {name: number for number, name in enumerate(names)}
        options["ignore_mismatched_sizes"] = True  # of a head with other classes, as _mismatched makes sure
    if os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.set_verbosity_error()  # of several processes, one tells which weights are new
    transformers.set_seed(seed)
    with one_line(source):
        if kind in KINDS and KINDS[kind].library == "sentence_transformers":
            return _sentences(folder, base, adapter is not None and trainable, options)
        cls = _class_of(kind, base)
        options |= quantized(quantization, adapter, cls, base)
        model, info = cls.from_pretrained(base, output_loading_info=True, **options)
        take_off_meta(model)  # the new head of a classifier
        inputs = processing or kind
        made_by = read_processing(inputs, folder, base)
    if inputs in KINDS and KINDS[inputs].pads:
        _pad(model, getattr(made_by, "tokenizer", made_by))
    fresh = sorted([*info["missing_keys"], *_mismatched(source, info["mismatched_keys"], len(names or []))])
    if adapter is not None:
        peft = need("peft", "train")
        with linear_of_both_kinds():
            model, fresh = peft.PeftModel.from_pretrained(model, folder, is_trainable=trainable), []
    return Loaded(model=model, processing=made_by, source=base, auto=cls.__name__, fresh=fresh)


def _new(
    source: str,
    attention: Any,
    kind: str,
    labels: list[str] | None,
    dtype: Dtype,
    texts: Iterable[str] | None = (),
) -> Loaded:
    """A model without weights, at its initial values.

    Raises:
        ValueError: transformers makes no such model, it lacks a tokenizer, or the attention does not fit it.
    """
    new = new_model(source)
    processing = made_tokenizer(new, lambda name: read_processing("causal-lm", resolve(name), resolve(name)), texts)
    wanted = KINDS[kind] if kind in KINDS else KINDS["causal-tokens"]
    if wanted.processing == "AutoTokenizer" and processing is None:
        raise ValueError(
            f"model {shown(source)} names no tokenizer, and a {kind} model needs one; allowed: tokenizer: bytes, a "
            "folder, a name on the hub, or {train: bpe}"
        )
    if wanted.processing not in (None, "AutoTokenizer") or wanted.library != "transformers":
        raise ValueError(f"model {shown(source)} has no weights, and a {kind} model needs more than a config")
    config = new.config
    cls = transformers.AutoModel if kind == ANY else _class_for(kind, config, source)
    _name_classes(config, kind, labels)
    if attention != AS_SAVED:
        config.attn_plugin = read_attention(attention)
    try:
        model = cls.from_config(config, **({} if dtype == "auto" else {"dtype": getattr(torch, dtype)}))
    except ValueError:
        raise
    except Exception as error:  # each family finds what does not go together in its own way
        raise ValueError(f"transformers makes no model of {shown(source)}: {' '.join(str(error).split())}") from error
    if wanted.pads:
        _pad(model, processing)
    fresh = sorted(name for name, _ in model.named_parameters())
    return Loaded(model=model, processing=processing, source=source, auto=cls.__name__, fresh=fresh)


def _name_classes(config: Any, kind: str, labels: list[str] | None) -> None:
    if labels is not None and kind in KINDS and KINDS[kind].classes:
        config.id2label, config.label2id = dict(enumerate(labels)), {name: at for at, name in enumerate(labels)}


@contextlib.contextmanager
def linear_of_both_kinds() -> Iterator[None]:
    """While PEFT puts adapters into Linear and Conv1D: it sets ``fan_in_fan_out`` right for each, and warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        yield


def _mismatched(source: str, mismatched: set[tuple[str, Any, Any]], classes: int) -> list[str]:
    """Names of a head's weights that have one row a class, where the checkpoint's had other classes.

    Args:
        mismatched: (name, shape in the checkpoint, shape in the model) of all weights that were left at their start.

    Raises:
        ValueError: one of them is no such head's.
    """
    for name, saved, made in mismatched:
        if tuple(saved[1:]) != tuple(made[1:]) or made[0] != classes:
            raise ValueError(f"model {source!r} holds {name} as {tuple(saved)}, and its config asks for {tuple(made)}")
    return [name for name, _, _ in mismatched]


def _sentences(folder: str, base: str, train_adapter: bool, options: dict[str, Any]) -> Loaded:
    """A SentenceTransformer; of a folder that none was saved to, with mean pooling (the last token of a decoder).

    It brings an adapter into the model itself, without a PeftModel, and what it brings is frozen.

    Args:
        base: what the model inside was made from, which is ``folder`` unless that holds an adapter.

    Raises:
        ValueError: there is no transformers model in it.
    """
    made = need("sentence_transformers", "embedding").SentenceTransformer(folder, model_kwargs=options, device="cpu")
    inner: Any = made.transformers_model
    fresh: list[str] = []
    if not isinstance(inner, transformers.PreTrainedModel):
        raise ValueError(f"model {folder!r} has no model of transformers inside, and so no attention")
    if train_adapter:
        inner.set_adapter(list(inner.peft_config))
    if folder == base:
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # has been told
        try:
            where: dict[str, Any] = {"output_loading_info": True, "device_map": "meta"}
            read: Any = type(inner).from_pretrained(inner.name_or_path, **where, **options)
        finally:
            transformers.utils.logging.set_verbosity(level)
        # What else it lacks, such as BERT's pooler, it has no use for.
        fresh = [name for name in sorted(read[1]["missing_keys"]) if in_slot(name)]
    _pad(made, made.tokenizer)
    return Loaded(model=made, processing=made.tokenizer, source=base, auto=type(made).__name__, fresh=fresh)


def _class_of(kind: str, base: str) -> Any:
    """The class of transformers that loads a model of a kind.

    Raises:
        ValueError: the model is of another kind.
    """
    config = transformers.AutoConfig.from_pretrained(base)
    if kind == ANY:
        return getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
    return _class_for(kind, config, base)


def _class_for(kind: str, config: Any, base: str) -> Any:
    """The class of transformers that makes a model of a kind from a config; ValueError where there is none."""
    autos = [getattr(transformers, name) for name in KINDS[kind].auto]
    known = [auto for auto in autos if type(config) in auto._model_mapping]
    if not known and not hasattr(config, "auto_map"):
        raise ValueError(f"model {base!r} is of type {config.model_type}, of which transformers has no {kind} model")
    return [*known, *autos][0]


def read_processing(kind: str, folder: str, base: str) -> Any:
    """What makes inputs for a model: as the folder of an adapter has it, else its base model's. Of tokens, None."""
    auto = KINDS[kind].processing if kind in KINDS else "AutoTokenizer"
    if auto is None:
        return None
    holds = any((Path(folder) / name).exists() for name in PROCESSING_FILES)
    if auto == "AutoImageProcessor":  # which transformers 5.17 has at its top with torchvision alone
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(folder if holds else base)
    return getattr(transformers, auto).from_pretrained(folder if holds else base)


PROCESSING_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


def _pad(model: Any, tokenizer: Any) -> None:
    """Have rows padded with the end token, where tokenizer and model name no other."""
    if getattr(tokenizer, "eos_token", None) is None:
        return
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def load_blank(
    source: str,
    *,
    attention: Any = AS_SAVED,
    kind: str = "causal-lm",
    labels: list[str] | None = None,
    dtype: Dtype = "auto",
) -> Loaded:
    """What :func:`load` loads to train it, without weights (meta device) and processing: config.json is read alone.

    New are the weights of a head where the checkpoint's architecture is another, and of attentions.

    Args:
        kind: a key of :data:`attn_plugins.tasks.kinds.KINDS`, whose models transformers loads.

    Raises:
        ValueError: there is no such model, or the attention does not fit it.
    """
    if is_new(source):
        with torch.device("meta"):
            return _new(source, attention, kind, labels, dtype)
    folder = resolve(source)
    adapter = read_adapter(folder)
    base = folder if adapter is None else resolve(adapter["base"])
    names = labels if labels is not None or adapter is None else adapter["labels"]
    with one_line(source):
        cls = _class_of(kind, base)
        config = transformers.AutoConfig.from_pretrained(base)
    saved, classes = list(config.architectures or []), config.num_labels
    _name_classes(config, kind, names)
    attention = attention if adapter is None else _of_adapter(attention, adapter)
    if attention != AS_SAVED:
        config.attn_plugin = read_attention(attention)
    asked = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    with torch.device("meta"):
        model = cls.from_config(config, **asked)
        body = getattr(model, model.base_model_prefix, model)
        known = type(model).__name__ in saved and config.num_labels == classes
        inside = {id(parameter) for parameter in body.parameters()}
        fresh = [] if known else sorted(name for name, one in model.named_parameters() if id(one) not in inside)
        if adapter is not None:
            peft = need("peft", "train")
            settings = peft.PeftConfig.from_pretrained(folder)
            settings.inference_mode = False
            with linear_of_both_kinds():
                model, fresh = peft.get_peft_model(model, settings), []
    return Loaded(model=model, processing=None, source=base, auto=cls.__name__, fresh=fresh)


def skeleton(source: str, attention: Any = AS_SAVED) -> nn.Module:
    """The model without its weights (meta device), from config.json alone.

    Raises:
        ValueError: there is no such model, or the attention does not fit it.
    """
    if is_new(source):
        with torch.device("meta"):
            return _new(source, attention, ANY, None, "auto").model
    folder = resolve(source)
    adapter = read_adapter(folder)
    with one_line(source):
        config = transformers.AutoConfig.from_pretrained(folder if adapter is None else resolve(adapter["base"]))
    attention = attention if adapter is None else _of_adapter(attention, adapter)
    if attention != AS_SAVED:
        config.attn_plugin = read_attention(attention)
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is not None:
            return architecture._from_config(config)
        return transformers.AutoModel.from_config(config)


def read_adapter(folder: str) -> dict[str, Any] | None:
    """What a folder says of the adapter in it (base, its quantization, attention, task, labels); None without one."""
    path = Path(folder)
    if not (path / "adapter_config.json").exists():
        return None
    settings = read_json(path / "adapter_config.json")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path / 'adapter_config.json'} names no base model (base_model_name_or_path)")
    found: dict[str, Any] = {"base": base, "attention": settings.get("attn_plugin", AS_SAVED) or None}
    # A swapped model's says more after a space: hf/checkpoints/peft.py.
    found |= {"labels": None, "quantization": None, "task": (settings.get("task_type") or "").partition(" ")[0]}
    if (path / "config.json").exists():  # `attn-plugins finetune` writes the base model's config beside the adapter
        beside = read_json(path / "config.json")
        names, found["quantization"] = beside.get("id2label", {}), beside.get("quantization_config")
        if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
            raise ValueError(f"{path / 'config.json'}: id2label={names!r}; allowed: a name for each number from 0 on")
        if names:
            found["labels"] = [names[str(number)] for number in range(len(names))]
    return found


def _kind_of(adapter: dict[str, Any], base: str) -> str:
    """The kind of model that an adapter was trained in, whose head its base model may lack; ANY where it names none."""
    config = transformers.AutoConfig.from_pretrained(base)
    for kind, one in KINDS.items():
        auto: Any = getattr(transformers, one.auto[0], None)
        if PEFT_TASKS.get(one.auto[0]) == adapter["task"] and type(config) in auto._model_mapping:
            return kind
    return ANY


def _of_adapter(attention: Any, adapter: dict[str, Any]) -> Any:
    return adapter["attention"] if attention == AS_SAVED else attention


def in_slot(parameter: str) -> bool:
    """Whether a parameter's name is that of an attention's own weight."""
    return SLOT in parameter.split(".")


@contextlib.contextmanager
def one_line(source: str):
    """Turn what transformers raises where there is no such model into a ValueError of one line."""
    try:
        yield
    except OSError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"model {source!r} could not be loaded: {' '.join(lines[:2])}") from error
