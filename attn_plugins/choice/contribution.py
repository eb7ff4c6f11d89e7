"""How much of the residual stream changes where a head is swapped, in one forward pass."""

import functools

import torch

from attn_plugins.choice.blocks import Blocks, Project
from attn_plugins.choice.places import Place
from attn_plugins.choice.scene import Scene, Table
from attn_plugins.hf.observe import Observed, own_attention


def contribution(scene: Scene) -> Table:
    """``|| W_o change || / || stream ||``, the mean over tokens.

    The change is that of a head group's outputs, from the model's own attention to the rule's on the same queries, keys
    and values; ``W_o`` is the output projection, the stream the hidden states that enter the block. Tokens are those
    from which recalled ones are predicted, where the sample has any, else all that are not padding. Everything runs by
    the model's own attention.

    Cost: one forward pass a sample, with both attentions in it; no gradients. SmolLM2-135M in bfloat16, two rows of 768
    tokens, all that is around them counted: 4.4 to 4.9 s of one CPU core.

    Raises:
        ValueError: a module's outputs are projected by no layer that can be seen, or the rule changes nothing.
    """
    changed = False
    places = {scene.module(place): place for place in scene.places}
    sums = {place.path: torch.zeros(scene.units(place), dtype=torch.float64) for place in scene.places}
    for number, sample in enumerate(scene.samples):
        scene.told(f"contribution: sample {number + 1} of {len(scene.samples)}")
        queries = sample.predicted_by()
        with Blocks(scene.model, [place.path for place in scene.places]) as blocks, torch.no_grad():

            def see(one: Observed, queries: list[int] = queries, blocks: Blocks = blocks) -> None:
                place = places.get(one.module)
                nonlocal changed
                if place is not None:
                    share = _score(one, place, blocks, queries, sums[place.path])
                    changed |= not share < torch.finfo(one.own_BQHV.dtype).eps ** 0.5  # NaN too is a change

            with own_attention(scene.model, see):
                scene.run(sample)
    if not changed:
        raise ValueError(
            "the rule changes nothing at the tokens that are scored; where it is a window, give a length far beyond it"
        )
    return [(sums[place.path] / len(scene.samples)).tolist() for place in scene.places]


def _score(one: Observed, place: Place, blocks: Blocks, queries: list[int], sums: torch.Tensor) -> float:
    """Add the contributions of one call, as soon as the output projection is known.

    Returns:
        how large the change is beside the outputs themselves.
    """
    own_BQHV = one.own_BQHV
    change_BQHV = one.attend()[0] - own_BQHV
    wanted_BQ = torch.ones(own_BQHV.shape[:2], dtype=torch.bool, device=own_BQHV.device)
    if queries:
        wanted_BQ = torch.zeros_like(wanted_BQ)
        wanted_BQ[:, queries] = True
    elif one.real_BQ is not None:
        wanted_BQ &= one.real_BQ
    stream = blocks.stream(place.path)
    # Where a block cuts its tokens into windows (Swin), queries are in another order: the mean stands for each.
    aligned = stream.shape[:2] == wanted_BQ.shape
    norm_N = stream.float().norm(dim=-1)
    norm_N = norm_N[wanted_BQ] if aligned else norm_N.mean()
    change_NHV = change_BQHV[wanted_BQ]
    use = functools.partial(_add, change_NHV, norm_N, sums)
    blocks.when_projected(place.path, own_BQHV.shape[2] * own_BQHV.shape[3], use)
    return float(change_NHV.norm() / own_BQHV[wanted_BQ].norm())


def _add(change_NHV: torch.Tensor, norm_N: torch.Tensor, sums: torch.Tensor, project: Project) -> None:
    heads = change_NHV.shape[1] // len(sums)
    for group in range(len(sums)):
        alone_NHV = torch.zeros_like(change_NHV)
        here = slice(group * heads, (group + 1) * heads)
        alone_NHV[:, here] = change_NHV[:, here]
        sums[group] += (project(alone_NHV.flatten(1)).norm(dim=-1) / norm_N.clamp(min=1e-6)).mean().item()
