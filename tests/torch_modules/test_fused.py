"""Modules that call torch's scaled_dot_product_attention: people's own, and those of timm and torchvision."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import AutoModel, TimmWrapperConfig

import attn_plugins as ap


def split(x, heads):
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class Attention(nn.Module):
    """As timm's: one layer for queries, keys and values, and two ways to go on."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.num_heads, self.fused_attn = heads, True
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = (split(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.fused_attn:
            dropout = self.drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        else:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Keys of fewer heads, by a method, a scale of its own and torch's whole name."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 4
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.attend(x).transpose(1, 2).flatten(2)

    def attend(self, x):
        q, k, v = self.q_proj(x).unflatten(-1, (4, 4)), self.k_proj(x).unflatten(-1, (2, 4)), self.v_proj(x)
        v = v.unflatten(-1, (2, 4))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)


class OneHead(nn.Module):
    def forward(self, x, mask=None):
        return F.scaled_dot_product_attention(x, x, x, mask)


class CrossAttention(nn.Module):
    def forward(self, x, other):
        return F.scaled_dot_product_attention(split(x, 4), split(other, 4), split(other, 4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), nn.Linear(16, 16)

    def forward(self, x, **mask):
        return x + self.mlp(x + self.attn(x, **mask))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, **mask):
        for block in self.blocks:
            x = block(x, **mask)
        return x


X = torch.randn(2, 12, 16)
SEEN = torch.ones(12, 12, dtype=torch.bool).tril()
HOLES = (torch.arange(144).view(12, 12) % 5 != 0) | torch.eye(12, dtype=torch.bool)


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"is_causal": True},
        {"attn_mask": SEEN},
        {"attn_mask": HOLES},
        {"attn_mask": torch.linspace(-2, 2, 144).view(12, 12)},
        {"attn_mask": torch.linspace(-2, 2, 4 * 144).view(4, 12, 12)},
        {"attn_mask": HOLES.expand(2, 4, 12, 12)},
        {"attn_mask": (torch.arange(12) < torch.tensor([[12], [7]])).view(2, 1, 1, 12)},
    ],
    ids=["none", "causal", "causal mask", "holes", "bias", "bias of heads", "whole", "padding"],
)
@torch.no_grad()
def test_equals_its_own(mask):
    own = Model().eval()
    close(ap.swap_attention(copy.deepcopy(own), "softmax")(X, **mask), own(X, **mask))


@pytest.mark.parametrize("kind", [Grouped, OneHead])
@torch.no_grad()
def test_other_forms_equal_their_own(kind):
    own = kind().eval()
    close(ap.swap_attention(copy.deepcopy(own), "softmax")(X), own(X))


@torch.no_grad()
def test_a_causal_mask_is_known_as_one():
    model = ap.swap_attention(Model().eval(), "linear")
    close(model(X, attn_mask=SEEN), model(X, is_causal=True))
    with pytest.raises(ValueError, match="a mask beyond causal, padding and segments"):
        model(X, attn_mask=HOLES)


@torch.no_grad()
def test_without_its_own_call_it_is_made_to_call_and_later_does_as_before():
    own = Model().eval()
    want = own(X)
    own.blocks[1].attn.fused_attn = False
    ap.swap_attention(own, "softmax")
    close(own(X), want)
    assert [block.attn.fused_attn for block in own.blocks] == [True, True, True]
    ap.restore_attention(own)
    assert [block.attn.fused_attn for block in own.blocks] == [True, False, True]
    assert {type(block.attn) for block in own.blocks} == {Attention}


@torch.no_grad()
def test_a_forward_that_goes_another_way_is_an_error():
    model = ap.swap_attention(Model().eval(), "local")
    model.blocks[2].attn.fused_attn = False
    with pytest.raises(
        ValueError, match=r"forward of Attention has not called scaled_dot_product_attention, .*LocalAttention"
    ):
        model(X)


@torch.no_grad()
def test_rules_choose_layers_and_heads():
    own = Model().eval()
    rules = [{"type": "local", "window_size": 2, "layers": [0, 2]}, {"type": "softmax", "kv_heads": [1]}]
    swapped = ap.swap_attention(copy.deepcopy(own), rules)
    rows = [(row.path, row.plugin, row.kv_heads) for row in ap.describe_attention(swapped)]
    assert rows == [
        ("blocks.0.attn", "local", None),
        ("blocks.1.attn", "softmax", (1,)),
        ("blocks.1.attn", None, (0, 2, 3)),
        ("blocks.2.attn", "local", None),
    ]
    assert (swapped(X) - own(X)).abs().max() > 1e-3
    close(ap.swap_attention(swapped, {"type": "softmax", "kv_heads": [1]})(X), own(X))


@torch.no_grad()
def test_copies_and_files_of_the_whole_model():
    own = Model().eval()
    want = own(X)
    swapped, file = ap.swap_attention(own, "linear", feature_map="hedgehog"), io.BytesIO()
    torch.save(swapped, file)
    file.seek(0)
    for again in (copy.deepcopy(swapped), torch.load(file, weights_only=False)):
        assert isinstance(again.blocks[0].attn, Attention)
        assert torch.equal(again(X), swapped(X))
        assert torch.equal(ap.restore_attention(again)(X), want)
    other = ap.swap_attention(Model().eval(), "linear", feature_map="hedgehog")
    other.load_state_dict(swapped.state_dict())
    assert torch.equal(other(X), swapped(X))


def test_new_weights_learn_and_dropout_is_the_modules():
    model = ap.swap_attention(Model().train(), "linear", feature_map="hedgehog")
    model(X).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "attn_plugin" in name)
    softmax = ap.swap_attention(Model().train(), "softmax")
    assert not torch.equal(softmax(X), softmax(X))


@torch.no_grad()
def test_gates_get_the_hidden_states():
    close(*(ap.swap_attention(seeded(), "gated_delta")(X, is_causal=True) for _ in range(2)))


def seeded():
    torch.manual_seed(0)
    return Model().eval()


@torch.no_grad()
def test_compiled_in_one_graph():
    model = ap.swap_attention(Grouped().eval(), "softmax")
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(X), model(X))


@torch.no_grad()
def test_cross_attention_goes_by_its_name_and_by_lengths():
    own, other = CrossAttention(), torch.randn(2, 5, 16)
    close(ap.swap_attention(copy.deepcopy(own), "softmax", roles=["cross"])(X, other), own(X, other))
    with pytest.raises(ValueError, match=r"the model has roles .'cross'."):
        ap.swap_attention(own, "softmax")


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cannot tell the number and size of the heads of OneHead"):
        ap.swap_attention(OneHead(), "linear", feature_map="hedgehog")
    model = ap.swap_attention(Model(), "local")
    with pytest.raises(ValueError, match="attends with is_causal=True and attn_mask; allowed: one"):
        model(X, is_causal=True, attn_mask=SEEN)
    with pytest.raises(ValueError, match=r"shapes \[\(12, 16\), .*allowed: \(batch, heads, length, size\)"):
        ap.swap_attention(OneHead(), "local")(X[0])
    with pytest.raises(ValueError, match=r"needs rotary positions, and blocks.0.attn .Attention. has none"):
        ap.swap_attention(Model(), "local", positions="cache", num_sink_tokens=4)


@pytest.mark.parametrize("function", [ap.describe_attention, ap.restore_attention])
def test_what_is_no_module_is_refused(function):
    with pytest.raises(ValueError, match=r"got a str; allowed: a transformers PreTrainedModel .*, or another torch"):
        function("model")


def test_a_model_without_attention_says_what_was_looked_for():
    with pytest.raises(
        ValueError, match=r"got a Linear; allowed: .*, or another torch module that holds a torch.nn.Multi"
    ):
        ap.swap_attention(nn.Linear(2, 2), "local")
    assert ap.describe_attention(nn.Linear(2, 2)) == []


def test_a_part_that_is_of_transformers_is_left_to_itself():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    both = nn.ModuleDict({"text": BertModel(BertConfig(vocab_size=9, **sizes)), "mine": Model()})
    assert {row.path[:4] for row in ap.describe_attention(both)} == {"mine"}
    with pytest.raises(ValueError, match=r"its part text .BertModel. is a model of transformers: swap that one"):
        ap.swap_attention(nn.ModuleDict({"text": both["text"]}), "local")


IMAGE = {"img_size": 32, "patch_size": 8, "num_classes": 5}
VIT = {**IMAGE, "embed_dim": 16, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", VIT),
        ("vit_tiny_patch16_224", {**VIT, "global_pool": "map", "class_token": False}),
        ("deit_tiny_distilled_patch16_224", VIT),
        ("beit_base_patch16_224", {**VIT, "use_rel_pos_bias": True, "use_abs_pos_emb": False}),
        ("eva02_tiny_patch14_224", VIT),
        ("cait_xxs24_224", VIT),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
        ),
        # The towers of models of transformers: Perception Encoder's, Gemma 3n's, FastVLM's.
        ("vit_pe_core_large_patch14_336", {**VIT, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
        ("mobilenetv5_300m_enc", {"channel_multiplier": 0.0625}),
        ("fastvit_mci3", {"layers": (1,) * 5, "embed_dims": (8, 16, 32, 32, 32)}),
    ],
)
@torch.no_grad()
def test_models_of_timm_equal_their_own(name, options):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model, image = timm.create_model(name, **options).eval(), torch.randn(2, 3, 32, 32)
    rows = ap.describe_attention(model)
    roles = [role for role in ("encoder", "cross") if any(row.role == role for row in rows)]
    want = model(image)
    close(ap.swap_attention(model, "softmax", roles=roles)(image), want)
    assert all(row.plugin == "softmax" for row in ap.describe_attention(model))
    assert torch.equal(ap.restore_attention(model)(image), want)


@torch.no_grad()
def test_first_tokens_and_patches_of_timm_are_known():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", **VIT, reg_tokens=2).eval()
    ap.swap_attention(model, "neighborhood_2d")
    (options, _) = (row.options for row in ap.describe_attention(model))
    assert options["num_prefix_tokens"] == 3
    assert model.blocks[0].attn.attn_plugin.heads.grid_size == (4, 4)
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


@torch.no_grad()
def test_grids_are_those_of_windows_where_a_module_has_any():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = timm.create_model("swin_tiny_patch4_window7_224", window_size=4, **sizes).eval()
    ap.swap_attention(model, "neighborhood_2d", kernel_size=3)
    assert {m.attn_plugin.heads.grid_size for m in model.modules() if hasattr(m, "attn_plugin")} == {(4, 4)}
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    class_token = timm.create_model("beit_base_patch16_224", **{**VIT, "use_rel_pos_bias": True}).eval()
    ap.swap_attention(class_token, "neighborhood_2d", kernel_size=3)
    assert class_token.blocks[0].attn.attn_plugin.heads.grid_size == (4, 4)
    assert class_token(torch.randn(1, 3, 32, 32)).isfinite().all()


@torch.no_grad()
def test_timm_inside_a_model_of_transformers_is_swapped_by_itself():
    pytest.importorskip("timm", reason="timm is not installed")
    sizes = {name: value for name, value in VIT.items() if name != "num_classes"}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=sizes)
    model, image = AutoModel.from_config(config).eval(), torch.randn(2, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"Attention: timm's: swap that part by itself, .*\(model\.timm_model, \.\.\.\)"
    ):
        ap.swap_attention(model, "local")
    want = model(image).last_hidden_state
    ap.swap_attention(model.timm_model, "softmax")
    close(model(image).last_hidden_state, want)
    ap.swap_attention(model.timm_model, "local", window_size=1)
    assert (model(image).last_hidden_state - want).abs().max() > 1e-5
    ap.restore_attention(model.timm_model)
    assert torch.equal(model(image).last_hidden_state, want)


@torch.no_grad()
def test_torchvisions_vit_equals_its_own():
    vision = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 16}
    model, image = vision.VisionTransformer(**sizes, num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.heads.head.weight)
    want = model(image)
    close(ap.swap_attention(model, "softmax")(image), want)
    assert [row.plugin for row in ap.describe_attention(model)] == ["softmax", "softmax"]
    ap.swap_attention(model, "neighborhood_2d", kernel_size=3)
    assert model.encoder.layers[0].self_attention.attn_plugin.heads.grid_size == (4, 4)
    assert ap.describe_attention(model)[0].options["num_prefix_tokens"] == 1
    assert (model(image) - want).abs().max() > 1e-5
    assert torch.equal(ap.restore_attention(model)(image), want)
