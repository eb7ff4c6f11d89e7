"""What was chosen, by which scores: rules for the flag, a table, a picture, files."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from attn_plugins.config.extras import need

SHOWN = 12
"""Rows of the table, at most, that a terminal shows."""


class _Plain(yaml.SafeDumper):
    """Without names for what stands there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A head group or a layer, and its score."""

    path: str
    """Of its attention module."""
    stack: str
    role: str
    layer: int
    """Number in its stack."""
    kv_head: int | None
    """Number of the key/value head; None where layers are chosen."""
    score: float
    kept: bool


class Choice(list[dict[str, Any]]):
    """Rules of :func:`attn_plugins.choose_attention`, for the flag; printing them gives a table of what was chosen."""

    def __init__(self, rules: Iterable[dict[str, Any]], scores: list[Scored], *, level: str, score: str, budget: float):
        super().__init__(rules)
        self.scores = scores
        self.level, self.score, self.budget = level, score, budget

    @property
    def kept(self) -> list[Scored]:
        """Those that keep full attention, the highest score first."""
        return sorted((one for one in self.scores if one.kept), key=lambda one: -one.score)

    def __str__(self) -> str:
        kept, what = self.kept, "key/value head" if self.level == "heads" else "layer"
        lines = [f"{len(kept)} of {len(self.scores)} {what}s keep full attention, chosen by {self.score}"]
        stacks = len({(one.stack, one.role) for one in self.scores}) > 1
        for one in kept[:SHOWN]:
            where = f"{one.path}  " if stacks else ""
            head = "" if one.kv_head is None else f"  kv head {one.kv_head:>3}"
            lines.append(f"  {where}layer {one.layer:>3}{head}  {one.score:.4g}")
        if len(kept) > SHOWN:
            lines.append(f"  and {len(kept) - SHOWN} more, down to {kept[-1].score:.4g}")
        left = max((one.score for one in self.scores if not one.kept), default=None)
        if left is not None:
            lines.append(f"the best that was left out: {left:.4g}")
        return "\n".join([*lines, "", self.yaml().rstrip()])

    def yaml(self) -> str:
        """The rules, as ``--attn FILE.yaml`` takes them."""
        return yaml.dump(list(self), Dumper=_Plain, sort_keys=False, default_flow_style=None, width=100)

    def save(self, folder: str | Path) -> list[Path]:
        """Write rules.yaml, scores.json and scores.png.

        Returns:
            the files.

        Raises:
            ValueError: matplotlib is not installed; the first two are written then.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rules.yaml").write_text(self.yaml(), encoding="utf8")
        head = {"level": self.level, "score": self.score, "budget": self.budget, "rules": list(self)}
        scores = head | {"scores": [dataclasses.asdict(one) for one in self.scores]}
        (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf8")
        self.plot().savefig(folder / "scores.png", dpi=120)
        return [folder / name for name in ("rules.yaml", "scores.json", "scores.png")]

    def plot(self) -> Any:
        """A matplotlib figure of layers x heads: shades are scores, squares those that are kept.

        Raises:
            ValueError: matplotlib is not installed.
        """
        need("matplotlib", "compare")
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        stacks = list(dict.fromkeys((one.stack, one.role) for one in self.scores))
        parts = [[one for one in self.scores if (one.stack, one.role) == stack] for stack in stacks]
        heads = max(one.kv_head or 0 for one in self.scores) + 1
        width = max(len({one.layer for one in part}) for part in parts)
        size = (min(16, 2.5 + 0.28 * width), 1.2 + len(parts) * (0.9 + 0.22 * min(heads, 32)))
        figure = Figure(figsize=size, layout="constrained")
        most = max(one.score for one in self.scores)
        for axis, part, (stack, role) in zip(
            figure.subplots(len(parts), 1, squeeze=False).flatten(), parts, stacks, strict=True
        ):
            layers = sorted({one.layer for one in part})
            grid = [[float("nan")] * len(layers) for _ in range(max(one.kv_head or 0 for one in part) + 1)]
            for one in part:
                row, column = one.kv_head or 0, layers.index(one.layer)
                grid[row][column] = one.score
                if one.kept:
                    square = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=1.5)
                    axis.add_patch(square)
            image = axis.imshow(grid, aspect="auto", cmap="Greys", vmax=most, interpolation="nearest")
            axis.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
            axis.set_yticks(range(len(grid)) if self.level == "heads" else [])
            axis.set_xlabel("layer")
            axis.set_ylabel("key/value head" if self.level == "heads" else "")
            axis.set_title(f"{self.score}: {stack} ({role})" if len(parts) > 1 else self.score, fontsize=9)
            figure.colorbar(image, ax=axis)
        return figure
