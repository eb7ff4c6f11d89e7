"""A swapped Llama is one graph under torch.compile with the forms for devices that are not a CPU."""

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

import attn_plugins as ap

CAUSAL = [name for name in ap.list_attentions() if ap.get_attention(name).causal]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_step_of_training_is_one_graph(name):
    torch._dynamo.reset()
    flag = {"type": name, "backend": "batched"}
    model, count = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), flag), CompileCounter()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for run in (compiled, model):
        model.zero_grad()
        loss = run(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append({"loss": loss.detach(), **{name: weight.grad for name, weight in model.named_parameters()}})
    for what, want in found[1].items():
        torch.testing.assert_close(found[0][what], want, atol=1e-5, rtol=1e-3)
    assert count.frame_count == 1
