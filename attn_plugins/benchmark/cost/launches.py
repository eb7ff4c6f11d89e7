"""How many operations a layer starts, by length: what an attention costs a device that is faster than its host.

Counted on CPU tensors, with the form for other devices unless a rule names a backend. "A layer" is a further call with
the same mask, as each layer of a model but the first makes it; what the first call needs more are the tables of the
mask, once a forward pass. Numbers of heads and sizes change what an operation does, and hardly how many there are.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from attn_plugins.benchmark.cost.operations import Operations, counted
from attn_plugins.benchmark.results.cells import described
from attn_plugins.benchmark.results.tables import Table
from attn_plugins.config.output import check_folder
from attn_plugins.config.versions import spelled, versions
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.backend import FORMS, get_backend
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import list_attentions
from attn_plugins.core.rules import Rule, parse_rules

MOST = 700
"""Operations of a layer, forward and backward, that an attention should not exceed."""
GROWTH = 1.3
"""Times as many at 16k tokens as at 4k, at most, unless an attention's cost is quadratic."""
MOST_OF_A_MASK, SYNCS_OF_A_MASK = 300, 5
"""Operations and syncs that the first call with a mask may need more than others. A layer has no sync."""

ALL_PAIRS = 512
"""Longest length at which attentions of quadratic cost are counted on tensors that have values."""
LONGEST_GAP = 1024
"""How many tokens more than asked for an attention may get that does not serve every length."""


@dataclass(frozen=True, kw_only=True)
class LaunchesConfig:
    """Which attentions at which lengths, and the shape of what they get."""

    output_dir: str = "runs/launches"
    """Where launches.json and report.md go."""
    attentions: dict[str, Any] | None = None
    """Label -> a name, or a mapping with type, options and backend; null is every attention, with its defaults."""
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    """Lengths in tokens."""
    packed_length: int = 1000
    """Tokens of a text of the packed rows; 0 counts no packed rows."""
    num_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 8
    """Key/value heads; num_heads is a multiple of it."""
    head_dim: int = 16
    backend: str = "batched"
    """For rules that name none."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads}; allowed: a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths={self.lengths}; allowed: at least one, each at least 1")
        if self.packed_length < 0:
            raise ValueError(f"packed_length={self.packed_length}; allowed: at least 0")
        if self.backend not in FORMS:
            get_backend(self.backend)
        self.rules()

    @property
    def heads(self) -> HeadShape:
        """The heads that every attention serves."""
        return HeadShape(
            num_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            hidden_size=self.num_heads * self.head_dim,
            layer=0,
        )

    def rules(self) -> dict[str, Rule]:
        """Label -> the rule to count, with the backend that is counted."""
        chosen = {name: name for name in list_attentions()} if self.attentions is None else self.attentions
        return {label: _rule(label, value, self) for label, value in chosen.items()}


def _rule(label: str, value: Any, config: LaunchesConfig) -> Rule:
    try:
        rules = parse_rules(value)
    except ValueError as error:
        raise ValueError(f"attentions.{label}: {error}") from None
    if len(rules) != 1:
        raise ValueError(f"attentions.{label}={value!r}; allowed: one attention with its options and backend")
    (rule,) = rules
    size: int | None = getattr(rule.config, "max_length", None)
    if size is not None and isinstance(value, str):  # tables of a size that serves all lengths
        (rule,) = parse_rules(value, max_length=max(size, *config.lengths))
    return rule if rule.backend != "auto" else replace(rule, backend=config.backend)


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """What one attention starts at one length."""

    length: int
    """Tokens: the first length from the one asked for on that the attention serves."""
    packed: bool
    forward: int
    """Operations of a forward pass without gradients."""
    forward_backward: int
    """Operations of a forward and a backward pass."""
    tables: int
    """Operations that the first forward and backward pass with a mask needs more."""
    syncs: dict[str, int]
    """Of a forward and a backward pass: "operation at file:line" -> how often."""
    syncs_of_tables: dict[str, int]
    """The same of what the first pass with a mask needs more."""

    def exceeds(self, *, shorter: "LayerCounts | None" = None, quadratic: bool = False) -> list[str]:
        """What is above the bars, in words; GROWTH is held against the counts of a quarter of the length."""
        told = []
        if self.forward_backward > MOST and not quadratic:
            told.append(f"{self.forward_backward} operations, more than {MOST}")
        if shorter is not None and not quadratic and self.forward_backward > GROWTH * shorter.forward_backward:
            told.append(
                f"{self.forward_backward} operations at {self.length} tokens, more than {GROWTH} times the "
                f"{shorter.forward_backward} at {shorter.length}"
            )
        if quadratic and self.forward_backward > MOST + self.length / 64:
            told.append(f"{self.forward_backward} operations, more than {MOST} + N / 64")
        if self.syncs:
            told.append(f"{sum(self.syncs.values())} syncs: {_listed(self.syncs)}")
        if self.tables > MOST_OF_A_MASK:
            told.append(f"{self.tables} operations for the tables of a mask, more than {MOST_OF_A_MASK}")
        if sum(self.syncs_of_tables.values()) > SYNCS_OF_A_MASK:
            told.append(
                f"{sum(self.syncs_of_tables.values())} syncs for the tables of a mask, more than {SYNCS_OF_A_MASK}: "
                f"{_listed(self.syncs_of_tables)}"
            )
        return told


def quadratic(attention: type[Attention]) -> bool:
    """Whether an attention looks at all pairs by what its cost says, so that pieces of them may grow in number."""
    return attention.cost.startswith("O(N^2")


def count_layer(
    rule: Rule, heads: HeadShape, length: int, *, packed_length: int = 0, batch_size: int = 1
) -> LayerCounts:
    """Count what a layer starts.

    All pairs of many tokens take long: attentions of quadratic cost are counted on tensors without values beyond
    :data:`ALL_PAIRS`, where it is an error to ask for one.

    Args:
        length: tokens; an attention that does not serve every length gets the first that it does from there on.
        packed_length: tokens of the texts that rows are packed with; 0 is one text a row.

    Raises:
        ValueError: the attention serves no such length, or cannot honour packed rows.
    """
    values = length <= ALL_PAIRS or not quadratic(rule.attention)
    with torch.random.fork_rng(devices=[]), contextlib.nullcontext() if values else FakeTensorMode():
        torch.manual_seed(0)
        module = rule.attention(rule.config, heads, backend=rule.backend)
        length = served(module, length) if values else served_without_values(module, length)
        call = LaunchCall(module, length, packed_length, batch_size)
        first, again, forward = call.both(), call.both(), call.forward()
    return LayerCounts(
        length=length,
        packed=packed_length > 0,
        forward=len(forward.launches),
        forward_backward=len(again.launches),
        tables=len(first.launches) - len(again.launches),
        syncs=dict(again.syncs | forward.syncs),
        syncs_of_tables=dict(first.syncs - again.syncs),
    )


def served(module: Attention, length: int) -> int:
    """The first length from ``length`` on that an attention serves; itself unless it declares otherwise."""
    if module.any_length:
        return length
    with FakeTensorMode(allow_non_fake_inputs=True):
        return served_without_values(module, length)


def served_without_values(module: Attention, length: int) -> int:
    """The same where tensors have no values."""
    if module.any_length:
        return length
    for longer in range(length, length + LONGEST_GAP):
        try:
            LaunchCall(module, longer).forward()
        except ValueError as error:
            reason = error
        except DataDependentOutputException:  # it has taken the length, and asks for values that are not there
            return longer
        else:
            return longer
    raise reason


class LaunchCall:
    """Calls of an attention with one mask, as the layers of a model make them."""

    def __init__(
        self,
        module: Attention,
        length: int,
        packed_length: int = 0,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
    ):
        heads = module.heads
        assert heads is not None
        self.module = module
        self.tensors = [
            torch.randn(batch_size, length, number, size, dtype=dtype).transpose(1, 2).requires_grad_()
            for number, size in (
                (heads.num_heads, heads.head_dim),
                (heads.num_key_value_heads, heads.head_dim),
                (heads.num_key_value_heads, heads.value_dim),
            )
        ]
        self.hidden = {}
        if module.wants_hidden:
            size = heads.known_hidden_size(module.name)
            self.hidden = {"hidden": torch.randn(batch_size, length, size, dtype=dtype, requires_grad=True)}
        segments_BK = (torch.arange(length) // packed_length).expand(batch_size, -1) if packed_length else None
        self.mask = AttentionMask(batch_size, length, length, causal=module.causal, segments_BK=segments_BK)
        self.scale = heads.head_dim**-0.5

    def forward(self) -> Operations:
        with counted() as found, torch.no_grad():
            self._out()
        return found

    def both(self) -> Operations:
        wanted = [*self.tensors, *self.hidden.values(), *self.module.parameters()]
        with counted() as found:
            out = self._out()
            torch.autograd.grad(out, wanted, torch.ones_like(out))
        return found

    def _out(self) -> torch.Tensor:
        return self.module(*self.tensors, mask=self.mask, scale=self.scale, **self.hidden)[0]


def run_launches(config: LaunchesConfig, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Count all that the config names: a record an attention and length, plain and packed.

    What an attention cannot serve is recorded with its error, and the others go on.
    """
    records = []
    for label, rule in config.rules().items():
        for packed_length in dict.fromkeys((0, config.packed_length)):
            if packed_length and not rule.attention.segments:
                continue
            shorter = None
            for length in sorted(config.lengths):
                record: dict[str, Any] = {
                    "label": label,
                    "rule": rule.to_dict(),
                    "quadratic": quadratic(rule.attention),
                }
                try:
                    counts = count_layer(rule, config.heads, length, packed_length=packed_length)
                except Exception as error:  # what one attention cannot do must not end the others' counts
                    record |= {"length": length, "packed": packed_length > 0, "error": described(error)}
                    text = record["error"]
                else:
                    above = counts.exceeds(shorter=shorter, quadratic=record["quadratic"])
                    record |= {**asdict(counts), "above_the_bars": above}
                    text, shorter = (
                        f"{counts.forward_backward} operations; {'; '.join(above) or 'within the bars'}",
                        counts,
                    )
                say(f"{label}{', packed' if packed_length else ''} · {length}: {text}")
                records.append(record)
    return records


def write_launches(config: LaunchesConfig, records: list[dict[str, Any]]) -> tuple[list[Table], list[Path]]:
    """Write launches.json and report.md into the output folder: (the tables, what was written)."""
    out = check_folder(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    tables = launch_tables(config, records)
    written = {"config": asdict(config), "versions": versions(), "records": records}
    (out / "launches.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    shape = f"batch 1, {config.num_heads} heads of {config.head_dim}"
    lines = [
        "# Operations that a layer starts",
        "",
        f"- {shape}, counted on CPU tensors",
        f"- {spelled(versions())}",
        "",
    ]
    lines += [part for table in tables for part in (table.markdown(), "")]
    (out / "report.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return tables, [out / "launches.json", out / "report.md"]


def launch_tables(config: LaunchesConfig, records: list[dict[str, Any]]) -> list[Table]:
    """Counts of plain rows, of packed ones, and what is above the bars or failed."""
    tables = []
    for packed in (False, True):
        rows = {record["label"]: record for record in records if record["packed"] == packed}
        if rows:
            tables.append(_counts(config, [record for record in records if record["packed"] == packed], packed))
    above = [
        [record["label"], f"{record['length']}{', packed' if record['packed'] else ''}", what]
        for record in records
        for what in ([record["error"]] if "error" in record else record["above_the_bars"])
    ]
    if above:
        note = (
            f"At most {MOST} operations a layer, {GROWTH} times as many at four times the length, no sync; "
            f"{MOST_OF_A_MASK} operations and {SYNCS_OF_A_MASK} syncs for the tables of a mask. Attentions whose cost "
            "is quadratic: N / 64 more."
        )
        tables.append(Table("Above the bars", note, ["attention", "length", "what"], above))
    return tables


def _counts(config: LaunchesConfig, records: list[dict[str, Any]], packed: bool) -> Table:
    note = (
        "Operations that one layer starts in a forward and a backward pass (in a forward pass alone). The mask's: what "
        "the first call of a forward pass needs more, and syncs in it. Syncs: of one layer."
    )
    lengths = sorted(config.lengths)
    header = ["attention", *map(str, lengths)]
    title = f"Packed rows of texts of {config.packed_length} tokens" if packed else "Rows of one text"
    table = Table(title, note, [*header, f"the mask's, {lengths[-1]}", f"syncs, {lengths[-1]}"])
    for label in dict.fromkeys(record["label"] for record in records):
        own = [record for record in records if record["label"] == label]
        row, last = [label], own[-1]
        row += ["cannot" if "error" in one else f"{one['forward_backward']} ({one['forward']})" for one in own]
        if "error" not in last:
            row += [
                f"{last['tables']}, {sum(last['syncs_of_tables'].values())} syncs",
                f"{sum(last['syncs'].values())}",
            ]
        table.rows.append(row + [""] * (len(table.header) - len(row)))
    return table


def _listed(syncs: dict[str, int]) -> str:
    return ", ".join(f"{number} x {where}" for where, number in Counter(syncs).most_common())
