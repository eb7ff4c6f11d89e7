"""The models of a comparison: loaded, their heads chosen, their new weights taught, where its settings ask for that."""

import dataclasses
import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attn_plugins.benchmark.contenders import CONTENDER, LeftOutError, contender_in, spelled_contender
from attn_plugins.benchmark.results.store import hash_of
from attn_plugins.choice.run import ChooseConfig, choose
from attn_plugins.config.extras import need
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import read_json
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.options import build
from attn_plugins.core.rules import parse_rules
from attn_plugins.data.sources import DataConfig
from attn_plugins.training.evaluate import place
from attn_plugins.training.models import AS_SAVED, Loaded, load, read_attention
from attn_plugins.training.resume import finished, same_versions
from attn_plugins.transfer.config import TransferConfig
from attn_plugins.transfer.run import prepare_transfer

if TYPE_CHECKING:
    from attn_plugins.benchmark.compare.cells import CompareCell
    from attn_plugins.benchmark.compare.config import CompareConfig

CHOOSE = "choose"
"""Key of an attention that is rules to be chosen: its value is settings of a choice."""

NOT_IN_CHOICE = ("model", "data", "output_dir", "dtype", "seed")
NOT_IN_TRANSFER = ("model", "attention", *NOT_IN_CHOICE[1:])

HEADS = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=64, value_dim=64, hidden_size=256, layer=0)


def spelled_out(value: Any, data: DataConfig | None) -> Any:
    """Rules, or settings of their choice, with every option: a default that changes some day changes the cell's key.

    Raises:
        ValueError: they are wrong as far as that shows without a model.
    """
    if isinstance(value, dict) and CONTENDER in value:
        return spelled_contender(value)
    if not isinstance(value, dict) or CHOOSE not in value:
        read = read_attention(value)
        return read if read in (None, AS_SAVED) else [rule.to_dict() for rule in parse_rules(read)]
    given = value[CHOOSE]
    if len(value) > 1 or not isinstance(given, dict):
        raise ValueError(f"got {value!r}; allowed: rules, or {CHOOSE} and its settings alone")
    refuse_keys(given, NOT_IN_CHOICE, CHOOSE)
    if data is None:
        raise ValueError(f"{CHOOSE} needs data")
    parsed = build(ChooseConfig, {**given, "model": "", "data": dataclasses.asdict(data)}, CHOOSE)
    options = {one.name: getattr(parsed, one.name) for one in dataclasses.fields(parsed)}
    options = {name: option for name, option in options.items() if name not in NOT_IN_CHOICE}
    return {CHOOSE: {**options, "attention": spelled_out(parsed.attention, None), "data": dataclasses.asdict(data)}}


def refuse_keys(settings: dict[str, Any], wrong: tuple[str, ...], where: str) -> None:
    """Raise a ValueError for a setting that the comparison sets for all of its cells."""
    taken = sorted(set(settings) & set(wrong))
    if taken:
        raise ValueError(f"{where}.{taken[0]} is set for the whole comparison; take it out of {where}")


def chosen(rules: Any) -> bool:
    """Whether what ``spelled_out`` gave is rules that are yet to be chosen."""
    return isinstance(rules, dict) and CHOOSE in rules


def learns(rules: Any) -> bool:
    """Whether what ``spelled_out`` gave brings weights that a transfer could teach."""
    if chosen(rules):
        return learns(rules[CHOOSE]["attention"])
    if rules in (None, AS_SAVED) or isinstance(rules, dict):
        return False
    with torch.device("meta"):
        slots = [rule.attention(rule.config, HEADS) for rule in parse_rules(rules)]
    return any(next(slot.parameters(), None) is not None for slot in slots)


def transfer_config(config: "CompareConfig", source: str, rules: Any, seed: int, output_dir: str) -> TransferConfig:
    """The transfer before some cells."""
    assert config.data is not None
    fixed = {"model": source, "attention": rules, "seed": seed, "output_dir": output_dir, "dtype": config.dtype}
    return build(
        TransferConfig, {**(config.transfer or {}), **fixed, "data": dataclasses.asdict(config.data)}, "transfer"
    )


class CompareModels:
    """The models in memory, the baseline and the one that was asked for last, and what was made for them on disk."""

    def __init__(
        self,
        config: "CompareConfig",
        fresh: bool,
        name: Callable[["CompareCell", str], str],
        made: set[Path] | None = None,
    ):
        self.config, self.fresh, self.name = config, fresh, name
        self.loaded: dict[tuple[str, str, int], Loaded] = {}
        self.made: set[Path] = set() if made is None else made
        """Folders of this run, which ``fresh`` lets be."""

    def get(self, cell: "CompareCell", attention: str, seed: int) -> Loaded:
        """The cell's model with an attention, as it is swapped in."""
        source = cell.settings["model"]
        key = (source, attention, seed)
        if key not in self.loaded:
            for other in list(self.loaded):
                if other != (source, self.config.baseline, self.config.seeds[0]):
                    del self.loaded[other]
            gc.collect()
            rules = self.rules(dataclasses.replace(cell, attention=attention, seed=seed))
            self.loaded[key] = self._load(source, rules, seed)
        return self.loaded[key]

    def _load(self, source: str, rules: Any, seed: int) -> Loaded:
        contender = contender_in(rules)
        swapped = None if contender else rules
        kind, dtype = self.config.task.model, self.config.dtype
        loaded = place(load(source, attention=swapped, kind=kind, dtype=dtype, seed=seed))
        return dataclasses.replace(loaded, model=contender.ready(loaded.model)) if contender else loaded

    def drop(self) -> None:
        self.loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def rules(self, cell: "CompareCell") -> Any:
        """Rules of the cell's attention, chosen where its settings say so: once, and found again by a later run."""
        rules = self.config.attentions[cell.attention]
        return read_attention(str(self._chosen(cell) / "rules.yaml")) if chosen(rules) else rules

    def scores(self, cell: "CompareCell") -> list[dict[str, Any]]:
        """What the choice of the cell's rules was made by: role, layer, kv_head (of heads), score and kept of each."""
        path = self._chosen(cell) / "scores.json"
        told = read_json(path)["scores"] if path.exists() else []
        return [{name: its for name, its in one.items() if name not in ("path", "stack")} for one in told]

    def _chosen(self, cell: "CompareCell") -> Path:
        """Folder of the choice of a cell's rules."""
        rules = self.config.attentions[cell.attention]
        source, dtype = cell.settings["model"], self.config.dtype
        settings = {name: value for name, value in rules[CHOOSE].items() if name != "data"}
        made_of = {"model": source, "dtype": dtype, "seed": cell.seed, **rules, "versions": versions()}
        folder = self._folder("chosen", cell, hash_of(made_of))
        with self._alone(folder):
            if not (folder / "rules.yaml").exists():
                fixed = {"model": source, "dtype": dtype, "seed": cell.seed, "output_dir": str(folder)}
                choose(build(ChooseConfig, {**settings, **fixed, "data": rules[CHOOSE]["data"]}), lambda line: None)
        return folder

    def transferred(self, cell: "CompareCell") -> tuple[str, dict[str, Any]]:
        """Folder of the cell's model after the transfer, and what its metrics.json holds."""
        self.drop()
        shared = {name: cell.settings[name] for name in ("model", "rules", "dtype", "data", "transfer")}
        folder = self._folder("transferred", cell, hash_of({"seed": cell.seed, **shared}))
        rules = self.rules(cell)
        with self._alone(folder):
            if folder.exists() and not same_versions(folder):
                shutil.rmtree(folder)
            settings = transfer_config(self.config, shared["model"], rules, cell.seed, str(folder))
            metrics = finished(settings)
            if metrics is None:
                _, metrics = prepare_transfer(settings, resume=True).run()
        return str(folder), metrics

    def written(self, cell: "CompareCell") -> str:
        """Folder of what the cell's contender makes of its model, as a checkpoint that a fine-tune starts from."""
        self.drop()
        settings = {name: cell.settings[name] for name in ("model", "rules", "dtype")}
        made_of = {"seed": cell.seed, **settings, "kind": self.config.task.model, "versions": versions()}
        folder = self._folder("contenders", cell, hash_of(made_of))
        with self._alone(folder):
            if not (folder / "config.json").exists():
                made: Any = self._load(settings["model"], settings["rules"], cell.seed)
                if made.processing is None:
                    raise LeftOutError("a model without a tokenizer is no checkpoint that a fine-tune could start from")
                made.processing.save_pretrained(folder)
                made.model.save_pretrained(folder)
        return str(folder)

    def _alone(self, folder: Path) -> Any:
        """While what several cells use is made, a process that shares them with this one waits."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        return need("filelock", "compare").FileLock(folder.with_name(f"{folder.name}.lock"))

    def _folder(self, what: str, cell: "CompareCell", key: str) -> Path:
        """Where something of the cell's model is kept; empty where all is to be made anew and this was not yet."""
        folder = Path(self.config.output_dir).expanduser() / what / self.name(cell, key)
        if self.fresh and folder not in self.made:
            shutil.rmtree(folder, ignore_errors=True)
        self.made.add(folder)
        return folder
