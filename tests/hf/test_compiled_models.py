"""Decoders whose attention is made of products alone are one graph under torch.compile, as they are unswapped."""

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attn_plugins as ap
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask

LEARNED = {"type": "linear", "feature_map": "hedgehog"}
WHOLE = [{"type": "softmax", "layers": 0}, {**LEARNED, "layers": 1}, {"type": "additive", "layers": 2}]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("softmax_plus_one", "fastformer")]


def compiled(flag, backend="eager"):
    torch._dynamo.reset()
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=len(flag) if flag is WHOLE else 1), flag)
    count = CompileCounterWithBackend(backend)
    return model, torch.compile(model, backend=count, fullgraph=True), count


@pytest.mark.parametrize("flag", [pytest.param(WHOLE, id="softmax, linear and additive"), *MORE])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_prompt_is_one_graph(flag, padded):
    """Without a mask transformers makes a rule of packed sequences while compiling, unless there is a cache."""
    model, call, count = compiled(flag)
    ids = torch.randint(3, 90, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for use_cache in (None, False):
        options = {"attention_mask": mask if padded else None, "use_cache": use_cache}
        got, want = (run(ids, **options).logits[mask.bool()] for run in (call, model))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert count.frame_count == 2


@pytest.mark.parametrize("flag", [LEARNED, pytest.param("additive", marks=pytest.mark.slow), *MORE], ids=str)
def test_a_step_of_training_is_one_graph(flag):
    model, call, count = compiled(flag, "aot_eager")
    ids = torch.randint(3, 90, (2, 6))
    found = []
    for run in (call, model):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, atol=1e-5, rtol=1e-3)
    assert count.frame_count == 1


@torch.no_grad()
def test_packed_sequences_by_position_ids_compile_whole():
    model, call, _ = compiled("linear")
    ids = torch.randint(3, 90, (1, 12))
    positions = torch.tensor([[*range(5), *range(7)]])
    got, want = (run(ids, position_ids=positions, use_cache=False).logits for run in (call, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    alone = model(ids[:, 5:], use_cache=False).logits
    torch.testing.assert_close(got[:, 5:], alone, atol=1e-5, rtol=1e-4)


def test_packed_sequences_in_pieces_are_refused_in_a_graph_too():
    heads = HeadShape(num_heads=2, num_key_value_heads=2, head_dim=4, value_dim=4)
    slot, x = ap.get_attention("linear")(ap.get_attention("linear").Config(), heads), torch.randn(1, 2, 6, 4)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(x, segments):
        mask = AttentionMask(1, 6, 6, causal=True, segments_BK=segments, device="cpu")
        return slot(x, x, x, mask=mask, scale=1.0)[0]

    attend(x, torch.tensor([[0, 0, 1, 1, 2, 2]]))
    with pytest.raises(RuntimeError, match="a row has packed sequences in several pieces; allowed: each packed"):
        attend(x, torch.tensor([[0, 0, 1, 1, 0, 0]]))


BATCHED = [pytest.param(name, "batched", marks=pytest.mark.slow) for name in ("local", "lsh")]


@pytest.mark.parametrize(("name", "backend"), [("softmax", "reference"), *BATCHED])
def test_dropout_may_change_between_calls_of_a_graph(name, backend):
    """A probability that has changed is symbolic from then on, and 0 in evaluation is another one too."""
    model, call, _ = compiled({"type": name, "backend": backend})
    ids = torch.randint(3, 90, (1, 12))
    want = call(ids, use_cache=False).logits
    for probability in (0.1, 0.2):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = probability
        assert not torch.allclose(call.train()(ids, use_cache=False).logits, want)
    torch.testing.assert_close(call.eval()(ids, use_cache=False).logits, want)
