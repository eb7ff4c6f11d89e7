"""Images of several sizes in one call: in rows with padding, one after another in a row, in chunks and windows."""

import itertools

import pytest
import torch
import transformers as tf
from transformers.models.glm4v.configuration_glm4v import Glm4vVisionConfig
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from attn_plugins import swap_attention
from attn_plugins.core.grid import Grid, order_of
from attn_plugins.hf.chunks import grids_of_chunks

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
RULES = [
    {"type": "neighborhood_2d", "kernel_size": 3},
    {"type": "axial"},
    {"type": "window_2d", "window_size": 3, "shift_size": 1},
]
SHAPES = [(3, 4), (2, 6), (5, 3), (2, 6)]


def siglip2():
    torch.manual_seed(0)
    config = tf.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=4, vision_use_head=False)
    return tf.Siglip2VisionModel(config).eval()


def naflex(shapes):
    """Patches, which of them are real, and the shapes."""
    torch.manual_seed(1)
    patches, real = torch.randn(len(shapes), 16, 48), torch.zeros(len(shapes), 16, dtype=torch.long)
    for row, (height, width) in enumerate(shapes):
        real[row, : height * width] = 1
    return {"pixel_values": patches, "pixel_attention_mask": real, "spatial_shapes": torch.tensor(shapes)}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["type"])
@torch.no_grad()
def test_padded_images_are_served_each_by_its_grid(rule):
    model = swap_attention(siglip2(), rule)
    given = naflex(SHAPES)
    together = model(**given).last_hidden_state
    for row, shape in enumerate(SHAPES):
        one = {name: x[row : row + 1] for name, x in given.items()}
        one["pixel_values"], one["pixel_attention_mask"] = (
            x[:, : shape[0] * shape[1]] for x in (one["pixel_values"], one["pixel_attention_mask"])
        )
        alone = model(**one).last_hidden_state[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)


def test_padded_images_keep_values_and_gradients_of_the_model_where_all_is_seen():
    model, given = siglip2(), naflex(SHAPES)
    given["pixel_values"].requires_grad_()
    real = given["pixel_attention_mask"].bool()

    def outcome():
        out = model(**given).last_hidden_state[real]
        return out, torch.autograd.grad(out.square().sum(), given["pixel_values"])[0]

    want = outcome()
    swap_attention(model, "neighborhood_2d", kernel_size=6)
    for got, expected in zip(outcome(), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def pixtral():
    torch.manual_seed(0)
    return tf.PixtralVisionModel(tf.PixtralVisionConfig(**SMALL, image_size=64, patch_size=4, head_dim=8)).eval()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["type"])
@torch.no_grad()
def test_images_in_one_row_are_served_each_by_its_grid(rule):
    model, sizes = pixtral(), [(16, 8), (12, 20), (20, 20)]
    pixels = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    want = model(pixels, image_sizes=sizes).last_hidden_state[0]
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 5})
    torch.testing.assert_close(model(pixels, image_sizes=sizes).last_hidden_state[0], want, rtol=1e-4, atol=1e-5)
    swap_attention(model, rule)
    together = model(pixels, image_sizes=sizes).last_hidden_state[0]
    parts = together.split([height * width // 16 for height, width in sizes])
    for image, (height, width), got in zip(pixels, sizes, parts, strict=True):
        alone = model(image[None, :, :height, :width]).last_hidden_state[0]
        torch.testing.assert_close(got, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, want, atol=1e-3)


@torch.no_grad()
def test_images_in_one_row_need_a_mask_that_keeps_them_apart(monkeypatch):
    from transformers.models.pixtral import modeling_pixtral

    model = swap_attention(pixtral(), RULES[0])
    monkeypatch.setattr(modeling_pixtral, "generate_block_attention_mask", lambda lengths, tensor: None)
    with pytest.raises(ValueError, match="2 images are in one row of 32 tokens, and the mask does not say that each"):
        model(torch.zeros(2, 3, 16, 16))


def test_heads_by_themselves_and_observers_refuse_several_sizes():
    model = swap_attention(siglip2(), {**RULES[0], "kv_heads": [0]})
    with pytest.raises(
        ValueError, match="was given images of several sizes, of which attention to some heads alone is"
    ):
        model(**naflex(SHAPES))


CHUNKED = {"embed_dim": 32, "hidden_size": 32, "num_heads": 4, "depth": 1, "spatial_merge_size": 2, "patch_size": 4}


def qwen2_vl():
    config = Qwen2VLVisionConfig(**{**CHUNKED, "mlp_ratio": 2, "temporal_patch_size": 2})
    return Qwen2VisionTransformerPretrainedModel(config), (2,)


def glm4v():
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 1}
    return Glm4vVisionModel(Glm4vVisionConfig(**sizes, image_size=32, patch_size=4)), (2,)


def qwen2_5_vl(whole=True):
    sizes = {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": 1}
    layers = [0] if whole else []
    config = Qwen2_5_VLVisionConfig(**sizes, patch_size=4, window_size=16, fullatt_block_indexes=layers)
    return Qwen2_5_VisionTransformerPretrainedModel(config), (4, 2)


CHUNKS = {"qwen2_vl": qwen2_vl, "glm4v": glm4v, "qwen2_5_vl": qwen2_5_vl}
IMAGES = [(1, 4, 8), (3, 6, 10), (1, 8, 4)]
"""(frames, rows, columns): of the first and the last as many patches."""


def images_of(name):
    """GLM takes frames one by one."""
    return [(1, *image[1:]) for image in IMAGES] if name == "glm4v" else IMAGES


def chunked(name, **options):
    torch.manual_seed(0)
    model, blocks = CHUNKS[name](**options)
    model = model.eval()
    images = images_of(name)
    patches = torch.randn(sum(t * h * w for t, h, w in images), 3 * 2 * 4 * 4)

    held = []
    model.blocks[0].register_forward_hook(lambda module, args, out: held.append(out[0] if type(out) is tuple else out))

    @torch.no_grad()
    def run(patches):
        model(patches, grid_thw=torch.tensor(images))
        return held.pop()

    return model, blocks, patches, run


def seeing(place, length):
    """Which places have this one among their 3 nearest."""
    return [other for other in range(length) if max(0, min(other - 1, length - 3)) in range(place - 2, place + 1)]


def place_of(blocks, images=IMAGES):
    """(frame, row, column) of each token, frames counted over all images."""
    found, frame = [], 0
    for number, rows, columns in images:
        for _ in range(number):
            found += [(frame, place // columns, place % columns) for place in order_of(Grid((rows, columns), blocks))]
            frame += 1
    return found


@pytest.mark.parametrize("name", CHUNKS)
def test_chunks_of_a_row_are_frames_whose_patches_reach_their_neighbours(name):
    model, blocks, patches, run = chunked(name)
    want = run(patches)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 10})
    torch.testing.assert_close(run(patches), want, rtol=1e-4, atol=1e-5)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 3})
    images = images_of(name)
    given, made = place_of((2,), images), place_of(blocks, images)
    sides = [(rows, columns) for number, rows, columns in images for _ in range(number)]
    for frame, row, column in ((0, 2, 5), (1, 3, 4), (len(sides) - 1, 5, 2)):
        changed = patches.clone()
        changed[given.index((frame, row, column))] += 1
        differs = (run(changed) - run(patches)).abs().amax(dim=-1) > 1e-6
        reached = {made[token] for token in differs.nonzero().flatten().tolist()}
        near = itertools.product(seeing(row, sides[frame][0]), seeing(column, sides[frame][1]))
        assert reached == {(frame, *place) for place in near}


def test_windows_of_chunks_are_grids_of_their_own():
    model, blocks, patches, run = chunked("qwen2_5_vl", whole=False)
    want = run(patches)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 4})
    torch.testing.assert_close(run(patches), want, rtol=1e-4, atol=1e-5)
    swap_attention(model, {"type": "axial"})
    given, made = place_of((2,)), place_of(blocks)
    changed = patches.clone()
    changed[given.index((2, 5, 8))] += 1  # in the window of rows 4 and 5, columns 8 and 9
    differs = (run(changed) - run(patches)).abs().amax(dim=-1) > 1e-6
    assert {made[token] for token in differs.nonzero().flatten().tolist()} == {(2, 4, 8), (2, 5, 8), (2, 5, 9)}


def test_chunks_computed_again_in_the_backward_have_their_grids():
    model, _, patches, _ = chunked("qwen2_vl")
    swap_attention(model, {"type": "axial"})
    model.train()

    def gradients():
        model.zero_grad()
        out = model(patches.clone().requires_grad_(), grid_thw=torch.tensor(IMAGES)).last_hidden_state
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    for reentrant in (False, True):
        swap_attention(model, {"type": "axial"})  # anew, so that nothing is known of earlier calls
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(
            {"use_reentrant": reentrant}
        )
        for got, expected in zip(gradients(), want, strict=True):
            torch.testing.assert_close(got, expected)


def test_chunks_that_are_no_images_and_orders_that_are_not_told_are_refused():
    model, *_ = chunked("qwen2_vl")
    with pytest.raises(
        ValueError, match=r"attends in 2 chunks of 4, 5 tokens, which are neither .* \(1, 3, 3\) frames"
    ):
        grids_of_chunks((4, 5), [(1, 3, 3)], model, None, "VisionAttention")
    with pytest.raises(ValueError, match="attends to 4 x 8 patches, and rotary positions do not tell in what order"):
        grids_of_chunks((32,), [(1, 4, 8)], model, None, "VisionAttention")
    rows = torch.arange(8).float().repeat(4)
    angles = torch.stack([torch.arange(4).float().repeat_interleave(8), rows], dim=1)
    assert grids_of_chunks((32,), [(1, 4, 8)], model, angles, "VisionAttention") == [Grid((4, 8))]
    video = torch.cartesian_prod(*(torch.arange(n).float() for n in (2, 4, 6)))
    assert grids_of_chunks((48,), [(2, 4, 6)], model, video, "VisionAttention") == [Grid((2, 4, 6))]
