"""Each head group or layer by itself: the model with only this one swapped, or with only this one kept."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch.nn.functional import cross_entropy, kl_div

from attn_plugins.choice.mixed import mixed
from attn_plugins.choice.resume import Resumed
from attn_plugins.choice.samples import Sample
from attn_plugins.choice.scene import Scene, Table
from attn_plugins.hf.swap import restore_attention, swap_attention

Alone = Literal["swapped", "kept"]


def divergence(scene: Scene, *, alone: Alone) -> Table:
    """KL divergence from the model's own outputs, that only this one swapped brings, or only this one kept saves.

    Over the text between what is told and asked, where the sample has any, else over all outputs that are not padding.

    Cost: a forward pass for each head group, or each layer, and sample, resumed from the hidden states before its
    block: half of it on average.

    Raises:
        ValueError: the model gives no logits.
    """
    return _each(scene, alone, _divergence)


def recall(scene: Scene, *, alone: Alone) -> Table:
    """Log-likelihood a recalled token, in nats, that only this one swapped loses, or only this one kept saves.

    Cost: as of :func:`divergence`.

    Raises:
        ValueError: nothing is recalled in a sample, or the model gives no logits.
    """
    if not all(sample.answers for sample in scene.samples):
        raise ValueError(
            "score 'recall' needs rows in which something is recalled: a tokenizer and texts, or such rows"
        )
    return _each(scene, alone, lambda sample, own: functools.partial(_recall_loss, sample))


def measured(scene: Scene, *, metric: Callable[[torch.nn.Module], float]) -> Table:
    """What a metric, of which more is better, loses where only this one is swapped.

    Cost: the metric once for each head group or layer, and once more.
    """
    scene.told("metric: the model as it is")
    whole, table = float(metric(scene.swapped(restore_attention))), list[list[float]]()
    for place in scene.places:
        scene.told(f"metric: {place.path}")
        table.append([])
        for unit in range(scene.units(place)):
            others = {
                one.path: [n for n in range(scene.units(one)) if (one, n) != (place, unit)] for one in scene.places
            }
            kept = {path: units for path, units in others.items() if units}
            rules = scene.places.keeping(kept, level=scene.level)
            table[-1].append(whole - float(metric(scene.swapped(swap_attention, rules))))
    return table


Loss = Callable[[torch.Tensor], float]


def _each(scene: Scene, alone: Alone, loss_of: Callable[[Sample, torch.Tensor], Loss]) -> Table:
    """How a loss of the logits changes, the mean over samples; ``loss_of`` gets the model's own logits."""
    table = [[0.0] * scene.units(place) for place in scene.places]
    with mixed(scene.model, scene.places, [scene.units(place) for place in scene.places]) as slots, torch.no_grad():
        for number, sample in enumerate(scene.samples):
            run = functools.partial(_logits, scene, sample)
            for slot in slots:
                slot.gates = [1.0] * len(slot.gates)
            resumed = Resumed(scene.model)
            base = own = resumed.first(run)
            loss = loss_of(sample, own)
            rest, this = (1.0, 0.0) if alone == "swapped" else (0.0, 1.0)
            if alone == "kept":
                for slot in slots:
                    slot.gates = [0.0] * len(slot.gates)
                base = resumed.first(run)
            before, whole = loss(base), not _resumes(resumed, scene.places[-1].path, run, base)
            for place, slot, row in zip(scene.places, slots, table, strict=True):
                scene.told(f"sample {number + 1} of {len(scene.samples)}: {place.path}")
                for unit in range(len(row)):
                    slot.gates = [this if other == unit else rest for other in range(len(row))]
                    after = loss(run() if whole else resumed.from_block(place.path, run))
                    row[unit] += (after - before if alone == "swapped" else before - after) / len(scene.samples)
                slot.gates = [rest] * len(row)
    return table


def _logits(scene: Scene, sample: Sample) -> torch.Tensor:
    logits = scene.run(sample)
    if logits is None:
        raise ValueError(f"{type(scene.model).__name__} gives no logits; choose by contribution or by a metric")
    return logits


def _resumes(resumed: Resumed, path: str, run: Callable[[], torch.Tensor], base: torch.Tensor) -> bool:
    """Whether a run that is resumed gives what the whole one gives, in a model whose blocks hand on more than that."""
    return torch.equal(resumed.from_block(path, run), base)


def _divergence(sample: Sample, own: torch.Tensor) -> Loss:
    chosen = functools.partial(_outputs, sample)
    teacher = chosen(own).log_softmax(-1)

    def loss(logits: torch.Tensor) -> float:
        return float(kl_div(chosen(logits).log_softmax(-1), teacher, log_target=True, reduction="batchmean"))

    return loss


def _outputs(sample: Sample, logits: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes) of a sample's text, or all that are real, in float32."""
    if sample.answers:
        return logits[0, sample.predicted_by("text")].float()
    real = sample.inputs.get("attention_mask")
    if isinstance(real, torch.Tensor) and real.shape == logits.shape[:2]:
        return logits[real.bool()].float()
    return logits.flatten(0, -2).float()


def _recall_loss(sample: Sample, logits: torch.Tensor) -> float:
    queries = sample.predicted_by()
    wanted = sample.inputs["input_ids"][0, [query + 1 for query in queries]]
    return float(cross_entropy(logits[0, queries].float(), wanted))
