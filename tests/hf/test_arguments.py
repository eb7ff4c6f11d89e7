"""Arguments that a module gives its attention function: unknown ones are refused, without its source too."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import attn_plugins as ap
from attn_plugins.hf.discovery import by_code as sources

CODE = """
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

class Written(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, {takes}):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, {eager})
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, {gives})
        {then}
        return self.o_proj(out.flatten(2)), weights
"""


def eager(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    raise NotImplementedError


def tilting(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, tilt: Any = None, **kw: Any
) -> Any:
    raise NotImplementedError


def model_with(takes: str, gives: str, eager: str = "eager", then: str = "") -> Any:
    """Llama with attention modules of a class whose source cannot be had."""
    scope = {**globals()}
    exec(CODE.format(takes=takes, gives=gives, eager=eager, then=then), scope)
    cls = scope["Written"]
    assert sources.keyword_arguments(cls) == frozenset()
    model = tiny.build("llama")
    for index, layer in enumerate(model.model.layers):
        weights = layer.self_attn.state_dict()
        layer.self_attn = cls(model.config, index)
        layer.self_attn.load_state_dict(weights)
    return model.eval()


MADE = [
    ("**kwargs", "tilt=q.sum(), **kwargs"),
    ("**kwargs", "**{**kwargs, 'tilt': 0.5}"),
    ("**kwargs", "tilt=3"),
    ("**kwargs", "tilt='left'"),
    ("", "tilt=q.sum()"),
    ("tilt=0.5, **kwargs", "tilt=tilt, **kwargs"),
]
REFUSED = r"Written gives tilt= to its attention, of which attn_plugins does not know what it would change; leave"


@pytest.mark.parametrize(("takes", "gives"), MADE)
@torch.no_grad()
def test_an_argument_that_a_module_makes_is_refused_without_its_source(takes, gives):
    given = tiny.inputs("llama")
    takes = takes or "position_ids=None, use_cache=None"
    model = ap.swap_attention(model_with(takes, gives), "local", layers=[1, 2])
    with pytest.raises(ValueError, match=REFUSED):
        model(**given)
    ap.restore_attention(model)
    assert not any("_attn_plugin" in name for module in model.modules() for name in vars(module))


@torch.no_grad()
def test_what_a_module_was_given_and_hands_on_is_its_callers():
    given, tilt = tiny.inputs("llama"), torch.ones(3)
    model = ap.swap_attention(model_with("**kwargs", "**kwargs"), "local", window_size=4)
    plain = ap.swap_attention(tiny.build("llama"), "local", window_size=4)
    for swapped in (model, copy.deepcopy(model), plain):  # a copy keeps its hooks
        assert torch.equal(tiny.output(swapped, {**given, "tilt": tilt}), tiny.output(plain, given))
    changed = ap.swap_attention(
        model_with("**kwargs", "**{n: v * 2 for n, v in kwargs.items() if n == 'tilt'}"), "local"
    )
    assert changed(**given).logits.shape == (2, 13, tiny.VOCABULARY)
    with pytest.raises(ValueError, match=REFUSED):
        changed(**given, tilt=tilt)


@torch.no_grad()
def test_an_argument_that_its_own_eager_attention_knows_is_refused_whoever_makes_it():
    model = ap.swap_attention(model_with("**kwargs", "**kwargs", eager="tilting"), "local")
    assert model(**tiny.inputs("llama")).logits.isfinite().all()
    with pytest.raises(ValueError, match=REFUSED):
        model(**tiny.inputs("llama"), tilt=torch.ones(3))


@torch.no_grad()
def test_attending_twice_from_one_state_is_refused_without_the_source():
    again = "attend(self, q, k, v, attention_mask, scaling=self.scaling)"
    model = ap.swap_attention(model_with("**kwargs", "**kwargs", then=again), "local")
    assert model(**tiny.inputs("llama"), use_cache=False).logits.isfinite().all()
    with pytest.raises(
        ValueError, match=r"Written calls its attention more than once .*; generate with use_cache=False"
    ):
        model(**tiny.inputs("llama"), use_cache=True)


def test_asking_whether_a_mask_is_a_tensor_is_seen_without_the_source():
    asks = model_with(
        "**kwargs", "**kwargs", then="assert attention_mask is None or isinstance(attention_mask, torch.Tensor)"
    )
    ap.swap_attention(asks, "local", window_size=4)
    with torch.no_grad():
        got = tiny.output(asks, tiny.inputs("llama"))
        want = tiny.output(ap.swap_attention(tiny.build("llama"), "local", window_size=4), tiny.inputs("llama"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert not sources.wants_tensor(type(model_with("**kwargs", "**kwargs").model.layers[0].self_attn))
