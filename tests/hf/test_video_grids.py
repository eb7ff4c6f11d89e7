"""Attentions on the grid of a video: the patches that the model cuts, tubelets of frames among them."""

import itertools

import pytest
import torch
import transformers as tf

from attn_plugins import restore_attention, swap_attention

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
IMAGE = {**SIZES, "image_size": (16, 24), "patch_size": 4, "intermediate_size": 48, "tubelet_size": 2}


def vjepa2():
    config = tf.VJEPA2Config(
        **SIZES, crop_size=16, patch_size=4, frames_per_clip=8, tubelet_size=2, mlp_ratio=1.5,
        pred_hidden_size=16, pred_num_hidden_layers=1, pred_num_attention_heads=2,
    )  # fmt: skip
    return tf.VJEPA2Model(config)


def vivit():
    sizes = {**IMAGE, "image_size": 16, "tubelet_size": (2, 4, 4), "num_frames": 8}
    return tf.VivitModel(tf.VivitConfig(**{key: value for key, value in sizes.items() if key != "patch_size"}))


MODELS = {
    "videomae": (0, (4, 4, 6), lambda: tf.VideoMAEModel(tf.VideoMAEConfig(**IMAGE, num_frames=8))),
    "vivit": (1, (4, 4, 4), vivit),
    "vjepa2": (0, (4, 4, 4), vjepa2),
}
"""Tokens before the patches, the grid of 8 frames of 16 pixels, and the model."""


def made(name):
    torch.manual_seed(0)
    prefix, grid, make = MODELS[name]
    video = torch.randn(2, 8, 3, 4 * grid[1], 4 * grid[2], generator=torch.Generator().manual_seed(0))
    return make().eval(), prefix, grid, video


@torch.no_grad()
def hidden(model, video):
    if isinstance(model, tf.VJEPA2Model):
        return model(pixel_values_videos=video, skip_predictor=True).last_hidden_state
    return model(pixel_values=video).last_hidden_state


def swapped(model, name, **options):
    options |= {"modules": "*encoder.layer.*"} if isinstance(model, tf.VJEPA2Model) else {}
    return swap_attention(model, {"type": name, **options})


def box(q, grid):
    """Patches with q among their 2 x 3 x 3 neighbours: those whose neighbourhood begins at most so far before q."""
    seen = torch.zeros(grid, dtype=torch.bool)
    for place in itertools.product(*map(range, grid)):
        first = [max(0, min(p - size // 2, side - size)) for p, side, size in zip(place, grid, (2, 3, 3), strict=True)]
        seen[place] = all(start <= at < start + size for start, at, size in zip(first, q, (2, 3, 3), strict=True))
    return seen


def cross(q, grid):
    seen = torch.zeros(grid, dtype=torch.bool)
    seen[:, q[1], q[2]] = seen[q[0], :, q[2]] = seen[q[0], q[1], :] = True
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("attention", "options", "reach"), [("neighborhood_3d", {"kernel_size": [2, 3, 3]}, box), ("axial", {}, cross)]
)
def test_a_patch_reaches_those_that_see_it_in_one_layer(name, attention, options, reach):
    model, prefix, grid, video = made(name)
    swapped(model, attention, **options)
    place = (2, 1, 3)
    changed = video.clone()
    changed[:, 5, :, 4:8, 12:16] += 1  # one frame of the tubelet of frames 4 and 5
    differs = (hidden(model, changed) - hidden(model, video)).abs().amax(dim=2) > 1e-6
    assert differs[:, :prefix].all()
    for row in differs[:, prefix:]:
        assert torch.equal(row.view(grid), reach(place, grid))


@pytest.mark.parametrize("name", MODELS)
def test_what_shows_the_whole_video_changes_nothing(name):
    model, prefix, grid, video = made(name)
    want = hidden(model, video)
    for attention, options in (
        ("neighborhood_3d", {"kernel_size": grid}),
        ("axial", {"axes": ["time+height+width"]}),
    ):
        swapped(model, attention, **options)
        torch.testing.assert_close(hidden(model, video), want, rtol=1e-4, atol=1e-5)
        swapped(model, attention, **options, num_prefix_tokens=prefix, grid_size=grid)
        torch.testing.assert_close(hidden(model, video), want, rtol=1e-4, atol=1e-5)
    restore_attention(model)
    assert torch.equal(hidden(model, video), want)


def test_a_video_of_fewer_frames_has_a_grid_of_its_own():
    model, _, _, video = made("vjepa2")
    for frames in (2, 4):
        want = hidden(swapped(model, "axial", grid_size=(frames // 2, 4, 4)), video[:, :frames])
        assert torch.equal(hidden(swapped(model, "axial"), video[:, :frames]), want)


def test_attentions_for_images_refuse_a_video_and_masked_tubelets_are_no_grid():
    model, _, _, video = made("videomae")
    for name in ("neighborhood_2d", "window_2d"):
        with pytest.raises(ValueError, match=rf"'{name}' got a video of 4 x 4 x 6 patches; allowed: images"):
            hidden(swapped(model, name), video)
    swapped(model, "neighborhood_3d")
    masked = torch.zeros(2, 96, dtype=torch.bool)
    masked[:, :40] = True
    with pytest.raises(ValueError, match=r"got 56 tokens, of which 0 come before .*; allowed: 4 x 4 x 6 patches"):
        model(pixel_values=video, bool_masked_pos=masked)
