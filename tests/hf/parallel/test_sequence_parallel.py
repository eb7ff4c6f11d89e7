"""Where each process has a part of a text, swapped attentions refuse to take it for the whole."""

import socket

import pytest
import tiny
import torch
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attn_plugins as ap

REFUSED = "torch's context_parallel gives each process a part of the text, .*; train without it"


def free_address():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", free_address(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@torch.no_grad()
def test_context_parallel_is_refused(one_process):
    """Whatever the attention, and the family: also one with an adapter, and an encoder."""
    for name, attention in (("llama", "softmax"), ("llama", "linear"), ("bert", "local"), ("t5", "softmax")):
        model, given = tiny.build(name), tiny.inputs(name, padded=False)
        expected = tiny.output(ap.swap_attention(model, attention), given)
        with (
            context_parallel(one_process, buffers=[torch.zeros(2, 8)], buffer_seq_dims=[1]),
            pytest.raises(ValueError, match=REFUSED),
        ):
            model(**given)
        torch.testing.assert_close(tiny.output(model, given), expected)


@torch.no_grad()
def test_another_function_in_place_of_ours_is_refused(monkeypatch):
    """DeepSpeed's Ulysses puts one function, of an attention that it knows, under every name."""
    model, given = ap.swap_attention(tiny.build("llama"), "local", layers=0), tiny.inputs("llama")
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    for held in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_ATTENTION_FUNCTIONS._local_mapping):
        with monkeypatch.context() as patched:
            patched.setitem(held, "attn_plugins", sdpa)
            with pytest.raises(
                ValueError, match=r"another program .* in place of 'attn_plugins', .*; train without it"
            ):
                model(**given)
    ap.restore_attention(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "attn_plugins", sdpa)
    model(**given)


def test_losses_of_whole_rows_are_refused_where_a_forward_is_called_as_such(one_process):
    """AdaLoRA calls it so, past the hooks of the model with the head."""
    ids, positions, config = torch.arange(3, 11).expand(2, -1), torch.arange(8).unsqueeze(0), tiny.build("llama").config
    for cls, labels in (
        (tf.LlamaForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (
            tf.LlamaForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ):
        model = ap.swap_attention(cls(config), "local")
        given = {"input_ids": ids, "position_ids": positions, **labels}
        assert model.forward(**given).loss > 0
        with ap.context_parallel(one_process), pytest.raises(ValueError, match="is a loss of whole rows; give each"):
            model.forward(**given)


def part(rank, address, failures):
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
    model = ap.swap_attention(tiny.build("llama"), "local")
    ids, positions = torch.arange(3, 19).unsqueeze(0), torch.arange(16).unsqueeze(0)
    mesh = init_device_mesh("cpu", (2,))
    with context_parallel(mesh, buffers=[ids, positions], buffer_seq_dims=[1, 1]):
        try:
            model(ids, position_ids=positions, use_cache=False)
        except ValueError as error:
            failures[rank] = str(error)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_a_text_each():
    with torch.multiprocessing.Manager() as manager:
        failures = manager.dict()
        torch.multiprocessing.spawn(part, args=(free_address(), failures), nprocs=2)
        assert sorted(failures) == [0, 1]
        assert all(message.startswith("torch's context_parallel") for message in failures.values())
