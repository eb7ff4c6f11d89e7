"""Every bidirectional attention serves encoders, of text and of images, through the bridge."""

import pytest
import tiny
import torch

import attn_plugins as ap


def flag(name):
    """Options at which the pattern bites at the lengths of these tests."""
    attention = ap.get_attention(name)
    return {"type": name, **(attention.examples[0] if attention.examples else {})}


def pairs(*models):
    """Attentions and the models that they serve; one that takes images alone serves no text."""
    found = []
    for name in ap.list_attentions():
        attention = ap.get_attention(name)
        for model in models:
            if attention.bidirectional and (attention.any_length or model == "vit"):
                found.append(pytest.param(name, model, id=f"{name}-{model}"))
    return found


def slots(model):
    return [module.attn_plugin for module in model.modules() if hasattr(module, "attn_plugin")]


@pytest.mark.parametrize(("name", "model_name"), pairs("bert", "distilbert", "vit"))
def test_the_fast_form_is_the_reference_in_a_model(name, model_name):
    model, given = ap.swap_attention(tiny.build(model_name), flag(name)), tiny.inputs(model_name)
    found = []
    for backend in ("torch", "reference"):
        for slot in slots(model):
            slot.backend = backend
        out = tiny.output(model, given)
        model.zero_grad()
        out.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert any("attn_plugin" in n for n in gradients) == bool(list(slots(model)[0].parameters()))
        found.append((out, gradients))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for n, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][n], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("name", "model_name"), pairs("bert", "distilbert"))
@torch.no_grad()
def test_padding_changes_nothing_in_a_model(name, model_name):
    model = ap.swap_attention(tiny.build(model_name), flag(name))
    ids = tiny.inputs(model_name)["input_ids"][:1]
    alone = model(input_ids=ids)[0]  # logits of the text, or a state for each token
    padded = torch.cat([ids, ids.flip(1)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], dim=1)
    got = model(input_ids=padded, attention_mask=mask)[0][:, : ids.shape[1]]
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-4)
    if name == "softmax":  # others may not reach that far from the first token, which is what BERT's head reads
        other = model(input_ids=padded)[0][:, : ids.shape[1]]
        assert not torch.allclose(other, alone, atol=1e-5), "without a mask it does"
