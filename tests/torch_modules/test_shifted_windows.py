"""torchvision's Swin and Swin V2, with another attention in their windows."""

import copy

import pytest
import torch
from torch import nn

import attn_plugins as ap

SIZES = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 3]}


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.fixture(params=["SwinTransformerBlock", "SwinTransformerBlockV2"])
def model(request):
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    torch.manual_seed(0)
    merging = swin.PatchMergingV2 if request.param.endswith("V2") else swin.PatchMerging
    made = swin.SwinTransformer(
        **SIZES, num_classes=5, block=getattr(swin, request.param), downsample_layer=merging, stochastic_depth_prob=0.0
    )
    for name, parameter in made.named_parameters():
        if parameter.ndim == 2 or "bias" in name:  # as they are made, windows attend evenly
            nn.init.normal_(parameter, std=0.3)
    return made.eval()


@pytest.mark.parametrize("pixels", [(32, 24), (26, 26), (8, 6)], ids=["whole windows", "padded", "one window"])
def test_equals_its_own(model, pixels):
    def made():
        image = torch.randn(2, 3, *pixels, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model.zero_grad()
        out = model(image)
        out.square().sum().backward()
        return [out, image.grad, *(p.grad.clone() for p in model.parameters())]

    want = made()
    assert [row.role for row in ap.describe_attention(model)] == ["encoder"] * 4
    ap.swap_attention(model, "softmax")
    for got, one in zip(made(), want, strict=True):
        close(got / one.abs().max().clamp(min=1), one / one.abs().max().clamp(min=1))
    ap.swap_attention(model, "local", window_size=1)
    assert (made()[0] - want[0]).abs().max() > 1e-4
    ap.restore_attention(model)
    assert all(torch.equal(got, one) for got, one in zip(made(), want, strict=True))


def test_heads_and_grids_are_those_of_windows(model):
    ap.swap_attention(model, "neighborhood_2d", kernel_size=3)
    shapes = [module.attn_plugin.heads for _, module in model.named_modules() if hasattr(module, "attn_plugin")]
    assert [(one.num_heads, one.head_dim, one.grid_size) for one in shapes] == 2 * [(2, 8, (4, 3))] + 2 * [
        (4, 8, (4, 3))
    ]
    assert model(torch.randn(1, 3, 26, 26)).isfinite().all()


def test_new_weights_learn_and_are_in_the_state_dict(model):
    image = torch.randn(2, 3, 26, 26)
    ap.swap_attention(model, "additive")
    twin = copy.deepcopy(model)
    model.train()(image).sum().backward()
    new = {name: p for name, p in model.named_parameters() if "attn_plugin" in name}
    assert len(new) >= 4
    assert all(p.grad is not None for p in new.values())
    assert sum(bool(p.grad.any()) for p in new.values()) >= len(new) // 2
    for p in twin.parameters():
        nn.init.zeros_(p)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(image), model.eval()(image))


def test_what_cannot_add_its_bias_is_refused_before_anything_has_changed(model):
    with pytest.raises(ValueError, match="it adds a relative position bias to the scores"):
        ap.swap_attention(model, "linear")
    assert all(row.plugin is None for row in ap.describe_attention(model))


def test_a_forward_of_ones_own_is_left_alone():
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")

    class Own(swin.ShiftedWindowAttention):
        def forward(self, x):
            return x

    model = nn.Sequential(Own(8, [2, 2], [0, 0], 2), swin.ShiftedWindowAttention(8, [2, 2], [1, 1], 2))
    assert [row.path for row in ap.describe_attention(model)] == ["1"]
