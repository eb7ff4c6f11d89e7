"""Models with other attentions leave torch: through torch.export, and as ONNX, for fixed and for dynamic lengths."""

import importlib.util

import pytest
import tiny
import torch
from test_tracing import States, assert_same, texts
from torch.export import Dim, export

import attn_plugins as ap
from attn_plugins.hf.call import innermost
from attn_plugins.hf.recording import weights_wanted_of

DYNAMIC = ({0: Dim("batch", max=64), 1: Dim("length", min=2, max=100)},) * 2
NEEDED = ("onnx", "onnxscript", "onnxruntime")


@pytest.mark.parametrize("flag", ["softmax", "local", "linear"])
@pytest.mark.parametrize("model_name", ["bert", "llama"])
@torch.no_grad()
def test_an_export_of_dynamic_lengths_serves_padding_and_other_lengths(model_name, flag):
    model, (ids, _) = States(model_name, flag, num_hidden_layers=1), texts(2, 10)
    exported = export(model, (ids, torch.ones_like(ids)), dynamic_shapes=DYNAMIC).module()
    for ids, mask in (texts(2, 10), texts(3, 23), texts(1, 7)):
        assert_same(exported(ids, mask), model(ids, mask), mask)


@torch.no_grad()
def test_an_attention_that_follows_the_length_is_exported_for_one():
    model, (ids, padded) = States("bert", "topk"), texts(2, 10)
    exported = export(model, (ids, torch.ones_like(ids))).module()
    assert_same(exported(ids, padded), model(ids, padded), padded)
    with pytest.raises(ValueError, match=r"'topk' cannot be exported with a dynamic length.*allowed: a fixed one"):
        export(model, (ids, padded), dynamic_shapes=DYNAMIC)


def test_a_backend_that_cannot_be_exported_is_refused():
    model = States("bert", {"type": "local", "backend": "torch"})
    with pytest.raises(ValueError, match=r"backend='torch' of attention 'local' cannot be part.*allowed there: 'refer"):
        export(model, texts(2, 10))


@pytest.mark.parametrize("weights", [False, True])
def test_an_export_that_fails_leaves_no_call_and_no_wish_for_weights_behind(weights):
    model = States("bert", {"type": "local", "backend": "torch"})
    next(module for module in model.modules() if hasattr(module, "config")).config.output_attentions = weights
    with pytest.raises(ValueError, match="cannot be part of a recorded graph"):
        export(model, texts(2, 10))
    assert innermost() is None
    other = ap.swap_attention(tiny.build("llama"), "local")
    assert not weights_wanted_of(other, {})
    assert other(**tiny.inputs("llama")).attentions is None


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in NEEDED), reason=f"needs {', '.join(NEEDED)}: pip install them"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.parametrize("flag", ["softmax", "local", "linear"])
@torch.no_grad()
def test_onnx_computes_the_same(flag, tmp_path):
    import onnxruntime

    model, given = States("bert", flag).eval(), texts(2, 10)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model,
        (given[0], torch.ones_like(given[0])),
        path,
        dynamo=True,
        dynamic_shapes=DYNAMIC,
        input_names=["ids", "mask"],
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for ids, mask in (given, texts(3, 23)):
        (got,) = session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})
        assert_same(torch.from_numpy(got), model(ids, mask), mask)
