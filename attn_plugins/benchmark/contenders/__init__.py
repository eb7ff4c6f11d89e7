"""Attentions from outside, one a file, imported like attentions: what another library makes of a model, as a row of a
comparison.

A contender changes a model in memory by its own library's way, and says what it cannot do: that cell is left out, with
the reason beside it.
"""

import abc
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, ClassVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from attn_plugins.benchmark.results.store import hash_of
from attn_plugins.core.class_registry import Registry
from attn_plugins.core.options import build, require

CONTENDER = "contender"
"""Key of an attention of a comparison that is a contender's: its value is the name, beside it stand its options."""

VERSION = "version"
"""Beside them, where they are spelled out: of the contender's package, None where that is not installed."""

LEFT_OUT = "left out"
"""Status of the record of a cell that a contender leaves out, whose "error" is the reason."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(q, k, v, scale), each tensor (B, H, N, D) -> (B, H, N, D), causal."""


class LeftOutError(ValueError):
    """What a contender cannot do, or would only seem to do: the cell is left out, and this is the reason."""


@dataclass(frozen=True, kw_only=True)
class ContenderConfig:
    """Base of every contender's ``Config``."""

    require = require


class Contender(abc.ABC):
    """One attention from outside, in a file of ``attn_plugins/benchmark/contenders``."""

    name: ClassVar[str]
    """Set by :func:`register_contender`."""
    package: ClassVar[str]
    """What is imported, and whose absence leaves its cells out."""
    distribution: ClassVar[str | None]
    """What the package is called where it is installed from, whose version its cells depend on; None for one that every
    result names the version of."""
    install: ClassVar[str]
    """The command that installs it."""
    what: ClassVar[str]
    """In a line, for the documentation: whose attention, by which way it comes into a model."""
    measures: ClassVar[tuple[str, ...]] = ("evaluate", "speed", "memory", "step")
    """What may be measured of it: measures of a comparison, and of cost what it is of: cache, decode, step, paper."""
    limits: ClassVar[str]
    """Why nothing else is."""

    Config: ClassVar[type[ContenderConfig]] = ContenderConfig

    def __init__(self, config: Any):
        self.config: Any = config

    @abc.abstractmethod
    def ready(self, model: Any) -> Any:
        """The model with the contender's attention: the same, changed, or another with its weights.

        What it would not honour when it is called (a padding mask, a cache) it refuses there, by the same error.

        Args:
            model: a transformers model with its own attention, where it is to run.

        Raises:
            LeftOutError: it does not fit the model; the model is as it was then.
        """

    def refuse(self, measure: str) -> None:
        """Raise a LeftOutError where the package is missing, or what is measured is beyond the contender."""
        if importlib.util.find_spec(self.package) is None:
            raise LeftOutError(f"{self.name} needs the package {self.package!r}: {self.install}")
        if measure not in self.measures:
            raise LeftOutError(
                f"{measure} is not measured of {self.name}: {self.limits}; allowed: {', '.join(self.measures)}"
            )

    def library(self) -> Any:
        """Its package, imported.

        Raises:
            LeftOutError: it cannot be imported beside what is installed.
        """
        try:
            return importlib.import_module(self.package)
        except (ImportError, AttributeError) as error:
            raise LeftOutError(f"{self.package} cannot be imported here: {error}") from error


def _lacks(cls: Any) -> list[str]:
    if not (isinstance(cls, type) and issubclass(cls, Contender)):
        raise ValueError(f"{cls!r} is not a subclass of {Contender.__module__}.{Contender.__qualname__}")
    missing = [what for what in ("package", "install", "what", "limits", "__doc__") if not getattr(cls, what, None)]
    missing += [] if hasattr(cls, "distribution") else ["distribution"]
    return missing + sorted(getattr(cls, "__abstractmethods__", ()))


CONTENDERS: Registry[Contender] = Registry(CONTENDER, __name__, _lacks, "attn_plugins.contenders")

register_contender, list_contenders, get_contender = CONTENDERS.register, CONTENDERS.names, CONTENDERS.get


def contender_in(rules: Any) -> Contender | None:
    """The contender that an attention of a comparison names, or None where it names none.

    Raises:
        ValueError: there is no such contender, or it has no such options.
    """
    if not isinstance(rules, dict) or CONTENDER not in rules:
        return None
    cls = get_contender(rules[CONTENDER])
    options = {name: value for name, value in rules.items() if name not in (CONTENDER, VERSION)}
    return cls(build(cls.Config, options, cls.name))


def spelled_contender(rules: dict[str, Any]) -> dict[str, Any]:
    """What names a contender, with every option and the version of its package: all that its cells depend on."""
    contender = contender_in(rules)
    assert contender is not None
    spelled = {CONTENDER: contender.name, **dataclasses.asdict(contender.config)}
    if contender.distribution is None:
        return spelled
    try:
        return {**spelled, VERSION: metadata.version(contender.distribution)}
    except metadata.PackageNotFoundError:
        return {**spelled, VERSION: None}


NOT_HONOURED = ("softcap", "s_aux", "sliding_window", "position_bias")
"""What a model's own attention may ask for, and a function of queries, keys and values alone leaves out."""


def through_interface(model: Any, contender: Contender, attend: Attend) -> Any:
    """Have a decoder attend by a function of whole rows, through transformers' own AttentionInterface.

    Keys and values of grouped heads are repeated. A call with padding, a cache, dropout, or with anything else that the
    function does not know, is refused when it comes.

    Raises:
        LeftOutError: the model does not attend through that interface.
    """

    def forward(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        *,
        scaling: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        ignored = [name for name in NOT_HONOURED if options.get(name) is not None]
        ignored += ["dropout"] if options.get("dropout") else []
        ignored += [] if getattr(module, "is_causal", False) else ["attention that is not causal"]
        if ignored:
            raise LeftOutError(
                f"{contender.name} knows no {', '.join(ignored)}, which {type(module).__name__} asks for"
            )
        if query.shape[2] != key.shape[2]:
            raise LeftOutError(f"{contender.name} reads whole rows: it has no form for keys from a cache")
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
        out = attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.transpose(1, 2).contiguous(), None

    def mask(*, attention_mask: Any = None, **options: Any) -> None:
        if attention_mask is not None and not attention_mask.all():
            raise LeftOutError(f"{contender.name} would see padding; allowed: rows of one length, or one at a time")

    implementation = f"{contender.name}-{hash_of(dataclasses.asdict(contender.config))}"
    AttentionInterface.register(implementation, forward)
    AttentionMaskInterface.register(implementation, mask)
    before = model.config._attn_implementation
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation(implementation)
    if before == model.config._attn_implementation:
        raise LeftOutError(f"{type(model).__name__} does not attend through transformers' AttentionInterface")
    return model
