"""A suite: several comparisons of one folder, from YAML and the command line."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.compare.config import CompareConfig
from attn_plugins.benchmark.suites.kinds import FOR, unfit
from attn_plugins.benchmark.suites.presets import read_preset, rows_for
from attn_plugins.config.shipped import CONFIGS, named
from attn_plugins.config.yaml import parse_yaml, read_yaml, read_yaml_file
from attn_plugins.core.options import build, check_keys, did_you_mean
from attn_plugins.training.new_models import is_new

CONTENDERS = ("attentions", "preset", "baseline", "bar")
"""Settings that go together: who brings attentions of its own brings the labels of these too."""
OF_A_SUITE = ("description", "suites", "models", "shared", "parts", "output_dir")
OF_A_PART = ("file", "for", "preset", "shared")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Comparisons that are run and reported together."""

    name: str
    description: str
    output_dir: str
    parts: list[tuple[str, CompareConfig]] = field(default_factory=list)
    """Name of each part and its comparison; a name comes again where models differ in what they are compared with."""
    left_out: list[tuple[str, str, str]] = field(default_factory=list)
    """(part, label of a model, why it or one of its rows is left out)."""


def suite_tree(name: str) -> dict[str, Any]:
    """Settings of a suite that comes with the package, or of a YAML file of one, for :func:`read_suite`.

    Every part is a mapping, so that ``--set parts.NAME.key=value`` has a place. Parts of other suites that it names
    come first, each named after its suite too, with what that one shares.

    Raises:
        ValueError: there is no such suite, or the file is not one.
    """
    return _suite_tree(name, ())


def _suite_tree(name: str, files: tuple[Path, ...]) -> dict[str, Any]:
    path = named("suites", name, "suite")
    if path in files:
        raise ValueError(f"suites name each other in a ring: {', '.join(one.stem for one in (*files, path))}")
    tree = read_yaml(path)
    check_keys(tree, OF_A_SUITE, str(path))
    parts, others = tree.get("parts", {}), tree.pop("suites", [])
    if not isinstance(others, list) or not all(isinstance(one, str) for one in others):
        raise ValueError(f"{path}: suites={others!r}; allowed: a list of names or YAML files")
    if not isinstance(parts, dict) or not (parts or others):
        raise ValueError(f"{path}: parts={parts!r}; allowed: a mapping of names to comparisons, at least one")
    spelled: dict[str, Any] = {}
    for inner in (_suite_tree(one, (*files, path)) for one in others):
        shared = {"models": inner.get("models") or {}, **(inner.get("shared") or {})}
        named_parts = {f"{inner['name']}: {part}": own for part, own in inner["parts"].items()}
        spelled |= {part: own and {"shared": shared, **own} for part, own in named_parts.items()}
    spelled |= {part: {"file": value} if isinstance(value, str) else value for part, value in parts.items()}
    if path.parent == CONFIGS / "suites":
        spelled = {part: _of_the_package(own) for part, own in spelled.items()}
    return {"output_dir": f"runs/suites/{path.stem}", **tree, "name": path.stem, "parts": spelled}


def _of_the_package(own: Any) -> Any:
    """A part of a suite of the package, whose file is the package's too, whatever there is in this folder."""
    if not isinstance(own, dict) or Path(own.get("file", "")).parts[:1] != (CONFIGS.name,):
        return own
    return {**own, "file": str(CONFIGS.joinpath(*Path(own["file"]).parts[1:]))}


def read_suite(
    tree: Mapping[str, Any],
    models: Mapping[str, str] | None = None,
    attentions: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> Suite:
    """The suite that settings say, with the models that each part is for.

    Args:
        tree: as :func:`suite_tree` gives it; parts that are null are left out.
        models: label -> source, in place of those that the settings name.
        attentions: label -> rules, in place of those that the settings name, or beside those of ``preset``.
        preset: name of one, in place of the attentions that the settings name.

    Raises:
        ValueError: a setting is wrong, or no part is for any of the models.
    """
    shared = _mapping(tree.get("shared") or {}, "shared")
    found = Suite(name=tree["name"], description=tree.get("description", ""), output_dir=tree["output_dir"])
    for part, own in _mapping(tree["parts"], "parts").items():
        if own is None:
            continue
        where = f"parts.{part}"
        settings = _part(_mapping(own, where), shared, where)
        given = settings.get("models") or tree.get("models") or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{where}.models={given!r}; allowed: a mapping of labels to models")
        from_scratch = any(isinstance(source, dict) or is_new(source) for source in given.values())
        settings["models"] = given if from_scratch else models or given
        asked = settings.pop("for", None)
        if asked is not None and asked not in FOR:
            raise ValueError(f"{where}.for={asked!r}{did_you_mean(asked, FOR)}; allowed: {', '.join(FOR)}")
        settings["output_dir"] = found.output_dir
        if preset is not None:
            settings = {**with_attentions(settings, {}), "preset": preset}
        elif attentions is not None:
            settings = with_attentions(settings, attentions)
        asked_preset = settings.pop("preset", None)
        if not settings["models"]:
            raise ValueError(f"{where} names no models; give them: --model NAME, or --model LABEL=NAME")
        config = _built(with_attentions(settings, {}), where)
        reasons = {
            label: _reason(source, config.task.model, asked, asked_for=settings["models"] is models)
            for label, source in config.models.items()
        }
        found.left_out.extend((part, label, why) for label, why in reasons.items() if why is not None)
        fitting = {label: source for label, source in config.models.items() if reasons[label] is None}
        if asked_preset is None:
            found.parts.extend([(part, _built({**settings, "models": fitting}, where))] if fitting else [])
            continue
        chosen = read_preset(asked_preset)
        for label, source in fitting.items():
            rows = rows_for(chosen, source, config.dtype, config.data)
            found.left_out.extend((part, label, f"{row}: {why}") for row, why in rows.left_out.items())
            own = {**settings, "models": {label: source}, **rows.settings}
            own["attentions"] = {**own["attentions"], **((attentions or {}) if preset is not None else {})}
            found.parts.append((part, _built(own, where)))
    if not found.parts:
        told = "; ".join(f"{part}, {label}: {why}" for part, label, why in found.left_out)
        raise ValueError(f"suite {found.name!r} has no part for these models ({told or 'it has none at all'})")
    return found


def _part(own: dict[str, Any], shared: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings of a part: its own, over those of the file that it names, or else over those that all parts share."""
    under = _mapping(own["shared"], f"{where}.shared") if "shared" in own else shared
    if "file" in own:
        under = _mapping(read_yaml_file(own["file"], f"{where} "), f"{where}.file={own['file']!r}")
    elif "attentions" in own or "preset" in own:
        under = {key: value for key, value in under.items() if key not in CONTENDERS}
    settings = {**under, **own}
    return {key: value for key, value in settings.items() if key not in ("file", "shared", "output_dir")}


def _reason(source: Any, kind: str, asked: str | None, *, asked_for: bool) -> str | None:
    """Why a model is left out of a part, or None; one that is not there is an error where it was asked for."""
    try:
        return unfit(source, kind, asked)
    except ValueError as error:
        if asked_for:
            raise
        return str(error)


def _built(settings: dict[str, Any], where: str) -> CompareConfig:
    check_keys(settings, [*(one.name for one in fields(CompareConfig)), *OF_A_PART], where)
    return build(CompareConfig, settings, where)


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}; allowed: a mapping of settings of a comparison")
    return dict(value)


def with_attentions(settings: Mapping[str, Any], attentions: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a comparison with other attentions, and no word of those that are not among them."""
    baseline = settings.get("baseline", "dense")
    attentions = attentions if baseline in attentions else {baseline: None, **attentions}
    kept = {key: value for key, value in settings.items() if key not in ("preset", "bar", "transfer_of")}
    if settings.get("bar") in attentions:
        kept["bar"] = settings["bar"]
    return {**kept, "attentions": dict(attentions)}


def labelled(models: list[str]) -> dict[str, str]:
    """Label -> source, of what ``--model`` gives: ``label=source``, or a source whose last name is the label.

    Raises:
        ValueError: a label comes twice.
    """
    found: dict[str, str] = {}
    for text in models:
        label, equals, source = text.partition("=")
        if not equals:
            label, source = Path(text).name or text, text
        if not label or not source:
            raise ValueError(f"--model {text!r}; allowed: a folder, a name, or label=these")
        if label in found:
            raise ValueError(f"--model {text!r}: {label!r} is the label of {found[label]!r}; write LABEL={source}")
        found[label] = source
    return found


def attention_flags(given: list[str]) -> dict[str, Any]:
    """Label -> rules, of what ``--attn`` gives: a name, YAML, or a YAML file, which is its own label."""
    return {text: text if text.endswith((".yaml", ".yml")) else parse_yaml(text) for text in given}
