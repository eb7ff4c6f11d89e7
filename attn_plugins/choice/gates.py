"""Gates learned end to end: how much of its own attention each head group needs for the model to stay what it was."""

import torch
from torch.nn.functional import kl_div

from attn_plugins.choice.mixed import mixed
from attn_plugins.choice.scene import Scene, Table

STEPS = 24
WEIGHTS = {"text": 1.0, "copy": 1.0, "passkey": 0.2}
"""Of each part of a row in the loss."""


def gates(scene: Scene) -> Table:
    """A gate in [0, 1] a head group, between the rule's attention and the model's own, learned by gradients.

    DuoAttention (Xiao et al. 2024, arXiv:2410.10819, section 2.3), with another loss and fewer steps: Adam with a rate
    of 0.1 from gates of 1, clamped after each of 24 steps, one row a step. The loss is the KL divergence from the
    model's own outputs over the text, the passage that comes again, 0.2 of it over the pass key, and 1.0 of the mean
    gate. All weights stay as they are.

    Cost: 24 forward and backward passes with both attentions.

    Raises:
        ValueError: the model gives no logits, or samples are no rows in which something is recalled.
    """
    if not all(sample.answers for sample in scene.samples):
        raise ValueError("score 'gates' needs rows in which something is recalled: a tokenizer and texts, or such rows")
    device = next(scene.model.parameters()).device
    with mixed(scene.model, scene.places, [scene.units(place) for place in scene.places]) as slots:
        teachers = []
        with torch.no_grad():
            for sample in scene.samples:
                logits = scene.run(sample)
                if logits is None:
                    raise ValueError(
                        f"{type(scene.model).__name__} gives no logits; choose by contribution or a metric"
                    )
                teachers.append(
                    {name: _log_chances(logits, sample.predicted_by(name)).to(logits.dtype) for name in WEIGHTS}
                )
        learned = [torch.ones(scene.units(place), device=device, requires_grad=True) for place in scene.places]
        for slot, gate in zip(slots, learned, strict=True):
            slot.gates = gate
        optimizer = torch.optim.Adam(learned, lr=0.1)
        for step in range(STEPS):
            number = step % len(scene.samples)
            sample, teacher = scene.samples[number], teachers[number]
            with torch.enable_grad():
                logits = scene.run(sample)
                assert logits is not None
                loss = torch.cat(learned).abs().mean()
                for name, weight in WEIGHTS.items():
                    if queries := sample.predicted_by(name):
                        now, own = _log_chances(logits, queries), teacher[name].float()
                        loss = loss + weight * kl_div(now, own, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                for gate in learned:
                    gate.clamp_(0, 1)
            scene.told(f"gates: step {step + 1} of {STEPS}, mean {float(torch.cat(learned).detach().mean()):.3f}")
        return [gate.tolist() for gate in learned]


def _log_chances(logits: torch.Tensor, queries: list[int]) -> torch.Tensor:
    return logits[0, queries].float().log_softmax(-1)
