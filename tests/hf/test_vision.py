"""Neighbourhood attention in encoders of images: which tokens come before the patches, and who reaches whom."""

import inspect

import pytest
import torch
import transformers as tf

from attn_plugins import restore_attention, swap_attention

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
SMALL = {**SIZES, "intermediate_size": 48, "image_size": 16, "num_hidden_layers": 2}
MODELS = {
    "vit": (1, lambda: tf.ViTModel(tf.ViTConfig(**SIZES, intermediate_size=48))),
    "dinov2_with_registers": (
        1 + 4,
        lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)),
    ),
    "dinov3": (
        1 + 2,
        lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**SIZES, intermediate_size=48, num_register_tokens=2)),
    ),
    "siglip": (0, lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SIZES, intermediate_size=48))),
}
"""Tokens before the 8 x 8 patches, and the model."""


def made(name):
    torch.manual_seed(0)
    num_prefix_tokens, make = MODELS[name]
    return num_prefix_tokens, make().eval()


def hidden(model, image):
    with torch.no_grad():
        return model(pixel_values=image).last_hidden_state[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_patch_reaches_its_neighbours_and_the_prefix_in_one_layer(name):
    num_prefix_tokens, model = made(name)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 3, "num_prefix_tokens": num_prefix_tokens})
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = image.clone()
    changed[:, :, 12:16, 28:] += 1  # the patch in row 3, column 7
    differs = (hidden(model, changed) - hidden(model, image)).abs().amax(dim=1) > 1e-6
    assert differs[:num_prefix_tokens].all()
    # The last column's neighbourhood is shifted inwards: it is seen from the last two columns.
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[2:5, 6:] = True
    assert torch.equal(differs[num_prefix_tokens:].view(8, 8), want)


@pytest.mark.parametrize("name", MODELS)
def test_a_neighbourhood_as_large_as_the_image_changes_nothing(name):
    """The tokens before the patches are those of the model, unless the option says how many."""
    num_prefix_tokens, model = made(name)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = hidden(model, image)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 8, "num_prefix_tokens": num_prefix_tokens})
    torch.testing.assert_close(hidden(model, image), want, rtol=1e-4, atol=1e-5)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 8})
    torch.testing.assert_close(hidden(model, image), want, rtol=1e-4, atol=1e-5)


def test_a_wrong_number_of_tokens_before_the_patches_is_an_error():
    _, model = made("siglip")
    swap_attention(model, {"type": "neighborhood_2d", "num_prefix_tokens": 1})
    with pytest.raises(ValueError, match=r"got 64 tokens, of which 1 come before the patches .*; allowed: 8 x 8"):
        hidden(model, torch.zeros(1, 3, 32, 32))


INTERPOLATING = {
    "vit": (1, lambda: tf.ViTModel(tf.ViTConfig(**SMALL))),
    "deit": (2, lambda: tf.DeiTModel(tf.DeiTConfig(**SMALL))),
    "dinov2": (1, lambda: tf.Dinov2Model(tf.Dinov2Config(**SMALL))),
    "dinov3": (1, lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**SMALL, num_register_tokens=0))),
    "beit": (1, lambda: tf.BeitModel(tf.BeitConfig(**SMALL, use_relative_position_bias=True))),
    "clip": (1, lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**SMALL))),
    "siglip": (0, lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SMALL))),
}
"""Tokens before the patches, and a model whose config says 4 x 4 of them."""


def on_grid(model, prefix, **options):
    return swap_attention(model, "neighborhood_2d", kernel_size=3, num_prefix_tokens=prefix, **options)


def pixels(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def seen(model, image):
    takes = inspect.signature(model.forward).parameters
    more = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
    return model(pixel_values=image, **more).last_hidden_state


@pytest.mark.parametrize("name", INTERPOLATING)
@torch.no_grad()
def test_the_grid_is_that_of_the_image_not_of_the_config(name):
    torch.manual_seed(0)
    prefix, make = INTERPOLATING[name]
    model = make().eval()
    for height, width in ((2, 8), (8, 2), (3, 5), (4, 4)):
        image = pixels(4 * height, 4 * width)
        want = seen(on_grid(model, prefix, grid_size=(height, width)), image)
        assert torch.equal(seen(on_grid(model, prefix), image), want)
        if (height, width) == (2, 8):
            assert not torch.allclose(seen(on_grid(model, prefix, grid_size=(4, 4)), image), want, atol=1e-3)
    restore_attention(model)
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if hook.__module__.startswith("attn_plugins")]


@torch.no_grad()
def test_the_grid_of_patches_that_came_cut_is_their_spatial_shape():
    torch.manual_seed(0)
    config = tf.Siglip2VisionConfig(**{**SMALL, "image_size": None}, num_patches=16, vision_use_head=False)
    model = tf.Siglip2VisionModel(config).eval()
    patches, real = torch.randn(2, 16, 48), torch.ones(2, 16, dtype=torch.long)

    def run(*shapes, real=real):
        return model(patches, pixel_attention_mask=real, spatial_shapes=torch.tensor(shapes)).last_hidden_state

    want = run((2, 8), (2, 8)) if on_grid(model, 0, grid_size=(2, 8)) else None
    on_grid(model, 0)
    assert torch.equal(run((2, 8), (2, 8)), want)
    wide, square = run((2, 8), (2, 8)), run((4, 4), (4, 4))
    both = run((2, 8), (4, 4))
    assert torch.equal(both[0], wide[0])
    assert torch.equal(both[1], square[1])


@torch.no_grad()
def test_windows_of_an_image_are_grids_of_their_own():
    torch.manual_seed(0)
    config = tf.SwinConfig(image_size=32, patch_size=2, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4])
    model = tf.SwinModel(config, add_pooling_layer=False).eval()
    for height, width in ((32, 32), (16, 64)):
        image = pixels(height, width)
        want = seen(on_grid(model, 0, grid_size=(4, 4)), image)
        assert torch.equal(seen(on_grid(model, 0), image), want)


def videomae():
    sizes = {"image_size": 16, "patch_size": 4, "num_frames": 4, "tubelet_size": 2}
    return tf.VideoMAEModel(tf.VideoMAEConfig(**{**SMALL, **sizes})), torch.randn(1, 4, 3, 16, 16), r"2 x 4 x 4 patches"


def masked():
    model = tf.ViTMAEModel(tf.ViTMAEConfig(**SMALL, mask_ratio=0.5))
    return model, pixels(16, 16), r"got 9 tokens.*; allowed: 4 x 4 patches"


@pytest.mark.parametrize("make", [videomae, masked])
def test_tokens_that_are_not_the_patches_of_one_image_are_refused(make):
    model, image, message = make()
    on_grid(model.eval(), 0 if make is not masked else 1)
    with pytest.raises(ValueError, match=message):
        model(pixel_values=image)


def test_what_shows_no_grid_is_refused_unless_the_option_tells_it():
    model = tf.BertModel(
        tf.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    ).eval()
    ids = torch.randint(0, 97, (2, 17))
    on_grid(model, 1)
    with pytest.raises(ValueError, match=r"cannot tell rows and columns of the 17 tokens that BertSelfAttention"):
        model(ids)
    assert on_grid(model, 1, grid_size=(2, 8))(ids).last_hidden_state.shape == (2, 17, 32)


@torch.no_grad()
def test_without_an_image_the_grid_of_the_config_counts_where_it_fits():
    torch.manual_seed(0)
    model, states = tf.ViTModel(tf.ViTConfig(**SMALL)).eval(), torch.randn(2, 17, 32)
    seen(on_grid(model, 1), pixels(8, 32))  # of which nothing is left
    layer = model.layers[0] if hasattr(model, "layers") else model.encoder.layer[0]
    got = layer(states)
    on_grid(model, 1, grid_size=(4, 4))
    assert torch.equal(got, layer(states))
    on_grid(model, 1)
    with pytest.raises(ValueError, match=r"got 26 tokens.*; allowed: 4 x 4 patches"):
        layer(torch.randn(2, 26, 32))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_in_the_backward_have_the_grid_of_the_image(reentrant):
    """Reentrant checkpointing runs the layers without gradients in the forward."""

    def gradients(model, *images):
        torch.manual_seed(0)
        model.zero_grad()
        # Not the sum of squares, which the last LayerNorm makes the same whatever was attended to.
        outs = [seen(model, image.requires_grad_()) for image in images]
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    torch.manual_seed(0)
    model = tf.ViTModel(tf.ViTConfig(**SMALL, hidden_dropout_prob=0.0), add_pooling_layer=False).train()
    want = gradients(on_grid(model, 1, grid_size=(2, 8)), pixels(8, 32))
    on_grid(model, 1)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    for got, expected in zip(gradients(model, pixels(8, 32)), want, strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="images of several shapes of 17 tokens, and gradient checkpointing does not"):
        gradients(model, pixels(8, 32), pixels(16, 16))


@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's own
@pytest.mark.parametrize("backend", ["reference", "torch"])
@torch.no_grad()
def test_a_compiled_model_takes_the_grid_of_each_image(backend):
    torch.manual_seed(0)
    model = on_grid(tf.ViTModel(tf.ViTConfig(**{**SMALL, "num_hidden_layers": 1})).eval(), 1, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=backend == "reference")
    for image in (pixels(8, 32), pixels(32, 8)):
        torch.testing.assert_close(compiled(image, interpolate_pos_encoding=True)[0], seen(model, image))
