"""Neighbourhood attention in encoders of images: which tokens come before the patches, and who reaches whom."""

import pytest
import torch
import transformers as tf

from attn_plugins import swap_attention

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 4}
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
    num_prefix_tokens, model = made(name)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = hidden(model, image)
    swap_attention(model, {"type": "neighborhood_2d", "kernel_size": 8, "num_prefix_tokens": num_prefix_tokens})
    torch.testing.assert_close(hidden(model, image), want, rtol=1e-4, atol=1e-5)


def test_a_wrong_number_of_tokens_before_the_patches_is_an_error():
    _, model = made("siglip")
    swap_attention(model, {"type": "neighborhood_2d"})
    with pytest.raises(ValueError, match=r"got 64 tokens, of which 1 come before the patches .*; allowed: a square"):
        hidden(model, torch.zeros(1, 3, 32, 32))
