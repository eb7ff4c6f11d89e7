"""What is recorded into a graph on one input holds for others: nothing is left out because that input allowed it."""

import io

import pytest
import tiny
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

import attn_plugins as ap
from attn_plugins.core.mask import AttentionMask

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

KINDS = {"bert": "bidirectional", "llama": "causal"}


class States(torch.nn.Module):
    """The last hidden states of a model, or what its head makes of them."""

    def __init__(self, name, flag, **config):
        super().__init__()
        model = tiny.build(name, **config)
        self.model = ap.swap_attention(model.bert if name == "bert" else model, flag)
        self.options = {"use_cache": False} if name == "llama" else {}

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask, **self.options)[0]


def cases():
    for name in ap.list_attentions():
        attention = ap.get_attention(name)
        for model, capability in KINDS.items():
            if attention.any_length and getattr(attention, capability):
                yield pytest.param(model, {"type": name, "layers": 1, **attention.examples[0]}, id=f"{name}-{model}")


def slots(model):
    return [module.attn_plugin for module in model.modules() if hasattr(module, "attn_plugin")]


def texts(batch, length):
    """Texts of which one is padded on the left and, if there is another, one on the right."""
    ids, mask = torch.randint(3, 90, (batch, length)), torch.ones(batch, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    mask[1:2, -length // 4 :] = 0
    return ids, mask


def assert_same(got, want, mask):
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("model_name", "flag"), list(cases()))
@torch.jit.optimized_execution(False)
@torch.no_grad()
def test_a_trace_of_texts_without_padding_serves_padding(model_name, flag):
    model, (ids, padded) = States(model_name, flag), texts(2, 10)
    traced = torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False)
    assert_same(traced(ids, padded), model(ids, padded), padded)
    (slot, *_) = slots(model)
    for shape in [(3, 23), (1, 4)]:
        ids, padded = texts(*shape)
        if slot.symbolic_length:
            assert_same(traced(ids, padded), model(ids, padded), padded)
        else:
            with pytest.raises(RuntimeError):
                traced(ids, padded)


@pytest.mark.parametrize("flag", ["local", {"type": "linear", "feature_map": "hedgehog"}])
@torch.no_grad()
def test_a_trace_is_plain_torch(flag):
    """It can be saved and loaded where this package is not."""
    model, (ids, padded) = States("bert", flag), texts(2, 20)
    torch.jit.save(torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False), held := io.BytesIO())
    held.seek(0)
    assert_same(torch.jit.load(held)(ids, padded), model(ids, padded), padded)


@pytest.mark.parametrize("flag", ["local", "linear", "topk"])
@pytest.mark.parametrize("mode", ["real", "fake"])
@torch.no_grad()
def test_a_graph_of_make_fx_serves_padding(flag, mode):
    model, (ids, padded) = States("bert", flag), texts(2, 20)
    graph = make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(ids, torch.ones_like(ids))
    assert_same(graph(ids, padded), model(ids, padded), padded)


@pytest.mark.parametrize(("model_name", "flag"), [("bert", "local"), ("bert", "linear"), ("llama", "linear")])
@torch.no_grad()
def test_rows_of_vmap_have_padding_of_their_own(model_name, flag):
    model, (ids, padded) = States(model_name, flag), texts(3, 20)
    got = torch.vmap(lambda ids, mask: model(ids[None], mask[None])[0])(ids, padded)
    assert_same(got, model(ids, padded), padded)


def test_gradients_of_functorch():
    model, (ids, padded) = States("llama", "linear"), texts(2, 20)
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids, padded))[padded.bool()].square().mean()

    got = torch.func.grad(loss)(weights)
    loss(weights).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight.grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_a_backend_that_looks_at_values_is_refused():
    model, (ids, mask) = States("bert", {"type": "local", "backend": "torch"}), texts(2, 20)
    with pytest.raises(ValueError, match=r"backend='torch' of attention 'local' cannot be part.*allowed there: 'refer"):
        torch.jit.trace(model, (ids, mask), check_trace=False)
    model(ids, mask)
    (slot, *_) = slots(model)
    q = torch.randn(1, 4, 6, 8)
    with pytest.raises(ValueError, match="'local' cannot be part of a recorded graph"):
        torch.vmap(lambda q: slot(q[None], q[None], q[None], mask=AttentionMask(1, 6, 6, causal=False), scale=1.0))(q)


@torch.no_grad()
def test_while_recording_caches_are_ordinary():
    model, (ids, padded) = States("llama", "linear"), texts(2, 20)
    model.options["past_key_values"] = cache = DynamicCache(config=model.model.config)
    traced = torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False)
    assert cache.layers[0].keys.shape == (2, 2, 20, 8)
    assert_same(traced(ids, padded), model.model(ids, attention_mask=padded).logits, padded)


@torch.no_grad()
def test_what_a_cache_keeps_is_refused_while_recording():
    model, (ids, _) = States("llama", "linear"), texts(2, 20)
    model.options["past_key_values"] = model.model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"what attention 'linear' keeps in a cache cannot .*\(use_cache=False\)"):
        torch.jit.trace(model, (ids,), check_trace=False)


@torch.no_grad()
def test_a_longest_sequence_holds_in_a_trace():
    """cosformer refuses longer ones, which a graph cannot: it is of one length then."""
    model, (ids, padded) = (
        States("bert", {"type": "linear", "feature_map": "cosformer", "max_length": 24}),
        texts(2, 20),
    )
    traced = torch.jit.trace(model, (ids, torch.ones_like(ids)), check_trace=False)
    assert_same(traced(ids, padded), model(ids, padded), padded)
    with pytest.raises(RuntimeError, match=r"size of the tensor \(20\) must match the existing size \(30\)"):
        traced(*texts(2, 30))
