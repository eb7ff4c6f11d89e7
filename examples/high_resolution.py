"""What other attentions leave of an image model as pictures grow, before and after a short transfer, and their cost.

    python examples/high_resolution.py --model MODEL --objects FOLDER -o runs/high_resolution

MODEL is a folder or a name on the hub of a model of the kind of ViT or DINOv2. FOLDER holds PNG pictures with
transparency, in folders of any depth. Some of them are pasted on textures, so that which pixel belongs to which is
known exactly; the same scenes are drawn at each size. At each size and for each attention the table has

- agreement: cosine of the last hidden states of patches with the model's own, mean over the test scenes;
- segmentation: a linear probe (ridge regression) from patches of the training scenes to objects and background, and the
  mean over classes of intersection over union on the test scenes. Patches that are not mostly of one class don't count;
- times as fast: processor time of a forward pass of the model's own attention over that of the other, the median over
  scenes, which all attentions see in turn;
- peak memory of a forward pass through one layer.

The transfer teaches LoRA adapters, in steps on scenes of their own at one size, to give the last hidden states of the
model with its own attention; attentions with new weights learn to attend first. Adapters are merged before they are
measured. Results go to high_resolution.jsonl in the output folder as they come, the tables to high_resolution.md.
"""

import argparse
import copy
import inspect
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn.functional import avg_pool2d, cosine_similarity, interpolate, one_hot

from attn_plugins import swap_attention, transfer_attention
from attn_plugins.benchmark.cost.timing import Workload, peak_bytes
from attn_plugins.benchmark.results.tables import Table
from attn_plugins.config.extras import need
from attn_plugins.config.versions import versions
from attn_plugins.config.yaml import parse_yaml
from attn_plugins.core.attention import Attention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.grids import grid_of_image
from attn_plugins.ops.softmax.attention import PatternAttention
from attn_plugins.training.distillation import distillation_loss
from attn_plugins.training.models import resolve

CELLS = 4
"""Objects along each side of a scene."""
TRAIN, TEST, TRANSFER = 0, 10_000, 20_000
"""Seeds of the scenes of each kind begin here."""
OWN = ("the model's own", "")
MOSTLY = 0.7
"""Share of a patch's pixels that its class has at least."""

ATTENTIONS = [
    "neighborhood 13 x 13={type: neighborhood_2d, kernel_size: 13}",
    "axial={type: axial}",
    "windows 13 x 13, shifted={type: window_2d, window_size: 13}",
    "windows 13 x 13, every 3rd layer dense="
    "[{type: window_2d, window_size: 13, shift_size: 0, layers: 'every:3'}, "
    "{type: window_2d, window_size: 13, shift_size: 0, layers: 'every:3+1'}]",
    "169 in reading order={type: local, window_size: 85}",
    "linear={type: linear, feature_map: hedgehog}",
]
"""What is measured by default, LABEL=RULE. The first, the third and the fifth see as many keys."""


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Pictures of one size, and the class of each patch."""

    pixels: list[torch.Tensor]
    """(1, 3, size, size) each."""
    classes: list[torch.Tensor]
    """(patches,) each: 0 background, objects from 1 on, -1 for none."""


class Painter:
    """Draws scenes of objects on textures, the same for a seed at every size."""

    def __init__(self, folder: Path, objects: int):
        need("PIL", "train")
        from PIL import Image

        files = sorted(folder.rglob("*.png"))
        found = []
        for file in files:
            with Image.open(file) as picture:
                if picture.mode in ("RGBA", "LA") and min(picture.size) >= 96:
                    found.append(picture.convert("RGBA"))
        if len(found) < objects:
            raise ValueError(f"{folder} has {len(found)} PNG pictures with transparency, of 96 pixels at least; "
                             f"{objects} are needed (--classes)")  # fmt: skip
        self.objects = found[:: max(1, len(found) // objects)][:objects]

    def scene(self, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(3, size, size) colours from 0 to 1, and (size, size) classes."""
        from PIL import Image

        generator = torch.Generator().manual_seed(seed)
        texture = sum(
            interpolate(torch.rand(1, 3, n, n, generator=generator), (size, size), mode="bicubic") * weight
            for n, weight in ((4, 0.6), (16, 0.25), (64, 0.15))
        )
        picture, classes = texture[0].clamp(0, 1), torch.zeros(size, size, dtype=torch.long)  # type: ignore[index]
        order = torch.cat([torch.randperm(len(self.objects), generator=generator) for _ in range(CELLS**2)])
        cell = size / CELLS
        for place in range(CELLS**2):
            number = int(order[place])
            scale, down, across, flip = torch.rand(4, generator=generator).tolist()
            thing = self.objects[number]
            factor = cell * (0.65 + 0.35 * scale) / max(thing.size)
            width, height = (max(1, round(side * factor)) for side in thing.size)
            thing = thing.resize((width, height), Image.Resampling.BICUBIC)
            if flip > 0.5:
                thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            top = int(cell * (place // CELLS) + down * (cell - height))
            left = int(cell * (place % CELLS) + across * (cell - width))
            drawn = torch.frombuffer(bytearray(thing.tobytes()), dtype=torch.uint8).view(height, width, 4) / 255
            colours, cover = drawn[..., :3].permute(2, 0, 1), drawn[..., 3]
            here = (slice(top, top + height), slice(left, left + width))
            under = picture[(slice(None), *here)]
            picture[(slice(None), *here)] = under * (1 - cover) + colours * cover
            classes[here] = classes[here].masked_fill(cover > 0.5, number + 1)
        return picture, classes

    def scenes(self, first: int, number: int, size: int, grid: tuple[int, ...]) -> Scenes:
        pixels, found = [], []
        mean, spread = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        for seed in range(first, first + number):
            picture, classes = self.scene(seed, size)
            pixels.append(((picture - mean) / spread).unsqueeze(0))
            share = one_hot(classes, len(self.objects) + 1).permute(2, 0, 1).float()
            share = avg_pool2d(share, (size // grid[0], size // grid[1])).flatten(1)
            highest, label = share.max(dim=0)
            found.append(label.masked_fill(highest < MOSTLY, -1))
        return Scenes(pixels=pixels, classes=found)


def with_attention(model: nn.Module, rules: Any) -> nn.Module:
    """A copy of the model that shares its weights and has another attention."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    torch.manual_seed(0)
    return swap_attention(copy.deepcopy(model, shared), rules).eval()


def transferred(model: nn.Module, rules: Any, scenes: Scenes, learning_rate: float) -> nn.Module:
    """A copy with other attention whose adapters have learned the model's last hidden states, merged."""
    need("peft", "train")
    import peft

    torch.manual_seed(0)
    student: Any = swap_attention(copy.deepcopy(model), rules)
    batches = [{"pixel_values": pixels} for pixels in scenes.pixels]
    new = any(True for module in slots(student) for _ in module.parameters())
    if new:
        transfer_attention(student, batches, steps=len(batches), progress=False)
    linear = [name for name, part in student.named_modules() if type(part) is nn.Linear and ".attn_plugin" not in name]
    beside = ["attn_plugin"] if new else None
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=linear, modules_to_save=beside)
    student = peft.get_peft_model(student, lora)
    learning = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))
        loss, _ = distillation_loss(student, batch, loss="hidden")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    print(f"  transfer: loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
    return student.merge_and_unload().eval()


def slots(model: nn.Module) -> list[Attention]:
    return [module for module in model.modules() if isinstance(module, Attention)]


@torch.no_grad()
def features(model: nn.Module, pixels: torch.Tensor, patches: int) -> tuple[torch.Tensor, float]:
    """(patches, size) last hidden states, and seconds of the processor."""
    takes = inspect.signature(model.forward).parameters
    more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    started = time.process_time()
    states = model(pixel_values=pixels, **more).last_hidden_state[0, -patches:]
    return states, time.process_time() - started


def probe(train: list[torch.Tensor], train_classes: list[torch.Tensor], number: int) -> Any:
    """Ridge regression from features to classes: a function of features."""
    states, classes = torch.cat(train).double(), torch.cat(train_classes)
    states, classes = states[classes >= 0], classes[classes >= 0]
    mean, spread = states.mean(dim=0), states.std(dim=0) + 1e-6

    def standard(x: torch.Tensor) -> torch.Tensor:
        x = (x.double() - mean) / spread
        return torch.cat([x, x.new_ones(len(x), 1)], dim=1)

    x, y = standard(states), one_hot(classes, number).double()
    weights = torch.linalg.solve(x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return lambda found: (standard(found) @ weights).argmax(dim=1)


def mean_iou(found: torch.Tensor, classes: torch.Tensor, number: int) -> float:
    """Mean over the classes that occur of intersection over union."""
    found, classes = found[classes >= 0], classes[classes >= 0]
    shares = []
    for one in range(number):
        union = ((found == one) | (classes == one)).sum()
        if (classes == one).any():
            shares.append(float(((found == one) & (classes == one)).sum() / union))
    return statistics.mean(shares)


def keys_seen(model: nn.Module, grid: tuple[int, ...], prefix: int) -> float | None:
    """Mean share of all keys that a query sees, over the layers; None where an attention works by no pairs."""
    found, length = [], prefix + grid[0] * grid[1]
    mask = AttentionMask(1, length, length, causal=False)
    queries, keys = torch.arange(0, length, 17).view(1, -1, 1), torch.arange(length).view(1, 1, -1)
    for slot in slots(model):
        if not isinstance(slot, PatternAttention):
            return None
        ((_, pattern),) = slot.patterns(1, mask, grid)
        found.append(float(pattern.sees(mask, queries, keys).float().mean()))
    dense = len(_layers(model)) - len(found)
    return statistics.mean([*found, *[1.0] * dense])


def _layers(model: nn.Module) -> nn.ModuleList:
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def peak(model: nn.Module, rules: Any, pixels: torch.Tensor, patches: int) -> int:
    """Peak memory of a pass through one layer, bytes."""
    first = model if rules is None else with_attention(model, rules)
    shared = {id(tensor): tensor for tensor in [*first.parameters(), *first.buffers()]}
    first = copy.deepcopy(first, shared)
    del _layers(first)[1:]
    return peak_bytes([Workload(run=lambda: features(first, pixels, patches), count=1)], torch.device("cpu"))


def run(args: argparse.Namespace, out: Path) -> None:
    """Measure whatever has no result yet."""
    model: Any = tf.AutoModel.from_pretrained(resolve(args.model), dtype=torch.float32).eval()
    painter = Painter(args.objects, args.classes)
    rules = {}
    for given in args.attention or ATTENTIONS:
        label, _, rule = given.partition("=")
        rules[label] = parse_yaml(rule)
    students: dict[str, nn.Module] = {}
    for stage in ("before", "after") if args.transfer_steps else ("before",):
        for size, train, test in args.scenes:
            done = {(record["attention"], record["stage"]) for record in _read(out) if record["size"] == size}
            todo: dict[tuple[str, str], nn.Module] = {OWN: model} if OWN not in done else {}
            for label, rule in rules.items():
                if (label, stage) in done:
                    continue
                if stage == "after" and label not in students:
                    grid = grid_of_image(model, torch.zeros(1, 3, args.transfer_size, args.transfer_size))
                    scenes = painter.scenes(TRANSFER, args.transfer_steps, args.transfer_size, grid)
                    print(label, flush=True)
                    students[label] = transferred(model, rule, scenes, args.learning_rate)
                todo[label, stage] = with_attention(model, rule) if stage == "before" else students[label]
            if todo:
                _measure(model, todo, rules, painter, (size, train, test), args, out)


def _measure(
    model: nn.Module,
    models: dict[tuple[str, str], nn.Module],
    rules: dict[str, Any],
    painter: Painter,
    asked: tuple[int, int, int],
    args: argparse.Namespace,
    out: Path,
) -> None:
    size, train, test = asked
    grid = grid_of_image(model, torch.zeros(1, 3, size, size))
    patches, number = grid[0] * grid[1], len(painter.objects) + 1
    parts = [painter.scenes(first, count, size, grid) for first, count in ((TRAIN, train), (TEST, test))]
    states: dict[tuple[str, str], list[torch.Tensor]] = {key: [] for key in [OWN, *models]}
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in states}
    for part, every in zip(parts, (models, {OWN: model, **models}), strict=True):
        for pixels in part.pixels:
            for key, one in every.items():
                found, spent = features(one, pixels, patches)
                states[key].append(found)
                seconds[key].append(spent)
    for key, one in models.items():
        found = states[key]
        rule = rules.get(key[0])
        cosines = [
            float(cosine_similarity(a, b).mean()) for a, b in zip(found[train:], states[OWN][-test:], strict=True)
        ]
        classify = probe(found[:train], parts[0].classes, number)
        guessed = torch.cat([classify(x) for x in found[train:]])
        ratios = [a / b for a, b in zip(seconds[OWN][-test:], seconds[key][-test:], strict=True)]
        prefix = 0 if rule is None else slots(one)[0].heads.prefix_tokens or 0  # type: ignore[union-attr]
        record = {
            "attention": key[0], "stage": key[1], "size": size, "grid": list(grid), "rules": rule,
            "keys_seen": 1.0 if rule is None else keys_seen(one, grid, prefix),
            "agreement": statistics.mean(cosines), "agreement_by_scene": cosines,
            "mean_iou": mean_iou(guessed, torch.cat(parts[1].classes), number),
            "seconds": statistics.median(seconds[key]), "times_as_fast": statistics.median(ratios),
            "lowest": min(ratios), "highest": max(ratios),
            "peak_bytes_of_a_layer": None if key[1] == "after" else peak(model, rule, parts[1].pixels[0], patches),
            "settings": {
                "model": Path(args.model).name, "scenes": [train, test], "classes": number,
                "transfer_steps": args.transfer_steps, "transfer_size": args.transfer_size,
                "learning_rate": args.learning_rate, "threads": torch.get_num_threads(),
            },
            "versions": versions(),
        }  # fmt: skip
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        told = " ".join(f"{record[name]:.3f}" for name in ("agreement", "mean_iou", "times_as_fast"))
        print(f"{size}: {key[0]} {key[1]}: {told}", flush=True)


def _read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def report(records: list[dict[str, Any]]) -> str:
    """Markdown: a table a size."""
    tables = []
    for size in sorted({record["size"] for record in records}):
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for record in records:
            if record["size"] == size:
                rows.setdefault(record["attention"], {})[record["stage"]] = record
        first = next(iter(rows[OWN[0]].values()))
        height, width = first["grid"]
        train, test = first["settings"]["scenes"]
        what = f"{height} x {width} patches; scenes: {train} of the probe, {test} of the test."
        head = ["attention", "keys seen", "agreement", "after transfer", "mean IoU", "after transfer"]
        table = Table(f"{size} px", what, [*head, "times as fast", "peak of a layer"])
        for label, stages in rows.items():
            before, after = stages.get("before", stages.get("")), stages.get("after")
            assert before is not None
            seen = "" if before["keys_seen"] is None else f"{before['keys_seen']:.1%}"
            late = ["", ""] if after is None else [f"{after[name]:.3f}" for name in ("agreement", "mean_iou")]
            table.rows.append([
                label, seen, f"{before['agreement']:.3f}", late[0], f"{before['mean_iou']:.3f}", late[1],
                f"{before['times_as_fast']:.2f}", f"{before['peak_bytes_of_a_layer'] / 2**20:.0f} MiB",
            ])  # fmt: skip
        tables.append(table.markdown())
    return "\n\n".join(tables) + "\n"


def scenes_of(text: str) -> tuple[int, int, int]:
    size, train, test = (int(part) for part in text.split(":"))
    return size, train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--objects", type=Path, required=True, help="folder of PNG pictures with transparency")
    parser.add_argument("--classes", type=int, default=12, help="how many of them are objects")
    parser.add_argument(
        "--scenes", type=scenes_of, nargs="+", metavar="SIZE:TRAIN:TEST",
        default=[(224, 8, 8), (518, 4, 4), (1036, 2, 2)], help="pixels a side, and scenes of the probe and of the test",
    )  # fmt: skip
    parser.add_argument("--attention", action="append", metavar="LABEL=RULE", help="instead of those in this file")
    parser.add_argument("--transfer-steps", type=int, default=16, help="0 for none")
    parser.add_argument("--transfer-size", type=int, default=392, help="pixels a side")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("runs/high_resolution"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    out = args.output_dir / "high_resolution.jsonl"
    run(args, out)
    text = report(_read(out))
    (args.output_dir / "high_resolution.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
