"""What a checkpoint holds of a slot is what comes back, whichever way the attention initialises itself."""

import typing

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.registry import ATTENTIONS
from attn_plugins.ops.reference import dense_attention

HEADS = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, hidden_size=32, layer=0)


def flags():
    """Every attention with its defaults, its examples, and each value of the options that are names."""
    for name in ap.list_attentions():
        cls = ap.get_attention(name)
        named = {
            option: typing.get_args(hint)
            for option, hint in typing.get_type_hints(cls.Config).items()
            if typing.get_origin(hint) is typing.Literal
        }
        choices = [{}, *cls.examples, *({option: value} for option in named for value in named[option])]
        for options in choices:
            if cls(cls.Config(**options), HEADS).state_dict():
                kind = "llama" if cls.causal else "bert"
                label = ",".join(f"{option}={value}" for option, value in options.items())
                yield pytest.param(kind, {"type": name, **options}, id=f"{name}({label})")


def trained(kind, flag):
    """A swapped model whose slots hold other numbers than they start from, buffers included."""
    model = ap.swap_attention(tiny.build(kind), flag)
    generator = torch.Generator().manual_seed(3)
    for name, held in model.state_dict().items():
        if "attn_plugin" in name:
            held.copy_(torch.randn(held.shape, generator=generator))
    return model


def slots(model):
    return {name: held.clone() for name, held in model.state_dict().items() if "attn_plugin" in name}


@pytest.mark.parametrize(("kind", "flag"), list(flags()))
def test_saved_weights_come_back(kind, flag, tmp_path):
    model = trained(kind, flag)
    model.save_pretrained(tmp_path)
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    held, saved = slots(back), slots(model)
    assert held.keys() == saved.keys()
    for name, weight in saved.items():
        assert torch.equal(held[name], weight), f"{name} is not what was saved"


@pytest.mark.parametrize(("kind", "flag"), list(flags()))
def test_only_what_a_file_lacks_is_initialised(kind, flag, tmp_path):
    model = trained(kind, flag)
    model.save_pretrained(tmp_path)
    saved, file = slots(model), tmp_path / "model.safetensors"
    lacking = sorted(saved)[::2]
    save_file({k: v for k, v in load_file(file).items() if k not in lacking}, file, metadata={"format": "pt"})
    back, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lacking)
    fresh = slots(ap.swap_attention(tiny.build(kind), flag))
    for name, weight in slots(back).items():
        if name not in lacking:
            assert torch.equal(weight, saved[name]), f"{name} is not what was saved"
            continue
        assert weight.isfinite().all(), f"{name} is left as it was"
        torch.testing.assert_close(weight.norm(), fresh[name].norm(), rtol=0.5, atol=1e-6)


class Careless(ap.Attention):
    """An attention of somebody who has not heard of any guard of loaded tensors.

    Limit case: none.
    """

    causal, cost, paper, family = True, "O(N^2)", "nobody", "other"

    def __init__(self, config, heads=None, **options):
        super().__init__(config, heads, **options)
        self.whole, self.rows = nn.Parameter(torch.empty(4)), nn.Parameter(torch.empty(3, 2))
        self.inner = nn.Linear(2, 2)
        self.register_buffer("steps", torch.empty(5))
        self.register_buffer("derived", torch.empty(2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        self.whole.data = torch.full_like(self.whole, 7.0)
        for row in self.rows:
            nn.init.constant_(row, 7.0)
        with torch.no_grad():
            self.inner.weight[:] = 7.0
            self.inner.bias.mul_(0).add_(7.0)
        self.steps.copy_(torch.full((5,), 7.0))
        self.derived.fill_(7.0)

    def reference(self, q, k, v, *, mask, scale, dropout):
        return dense_attention(q, k, v, mask.dense(), scale=scale, dropout=dropout)

    def attend(self, *tensors, **options):
        return self.reference(*tensors, **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_does_not_matter_how_a_plug_in_writes_its_weights(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(ATTENTIONS, "classes", dict(ATTENTIONS.classes))
    ap.register_attention("careless")(Careless)
    model = trained("llama", "careless").to(dtype)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    part = {k: v for k, v in load_file(file).items() if "layers.0" not in k or not k.endswith(("rows", "steps"))}
    save_file(part, file, metadata={"format": "pt"})
    back = slots(type(model).from_pretrained(tmp_path, dtype=dtype))
    for name, weight in slots(model).items():
        want = torch.full_like(weight, 7.0) if name not in part else weight
        assert torch.equal(back[name], want), name
    slot = type(model).from_pretrained(tmp_path).model.layers[0].self_attn.attn_plugin
    assert torch.equal(slot.derived, torch.full((2,), 7.0))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_seed_gives_a_model_the_same_weights_under_any_rules(kind, tmp_path):
    """A head is what is initialised last: of a model from a config, and of one from a checkpoint that has none."""
    cls, config = tiny.MODELS[kind]()
    cls._from_config(config).base_model.save_pretrained(tmp_path)
    for make in (
        lambda rules: cls._from_config(tiny.MODELS[kind]()[1], attn_plugin=rules),
        lambda rules: cls.from_pretrained(tmp_path, attn_plugin=rules),
    ):
        found = []
        for rules in (None, "additive", "gated_linear"):
            if kind == "bert" and rules == "gated_linear":
                continue
            torch.manual_seed(0)
            found.append({name: x for name, x in make(rules).state_dict().items() if "attn_plugin" not in name})
        for other in found[1:]:
            assert list(other) == list(found[0])
            assert all(torch.equal(x, found[0][name]) for name, x in other.items())
