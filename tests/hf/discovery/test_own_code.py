"""Attention classes of users and of remote code: found however they call the interface, swapped, saved and loaded."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_dispatch
import pytest
import tiny
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

import attn_plugins as ap
from attn_plugins.hf.discovery.by_code import dispatch_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_model.py"


def plain(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """The eager attention of these classes, which is not called as transformers calls its own."""
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * kwargs["scaling"]
    weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


def dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return KERNELS.get_interface(module.config._attn_implementation, plain)(module, *args, **kwargs)


def turned(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shape = (*x.shape[:-1], -1, module.head_dim)
    return tuple(p(x).view(shape).transpose(1, 2) for p in (module.q_proj, module.k_proj, module.v_proj))


class Helped(LlamaAttention):
    """Its forward calls a method that calls the interface."""

    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        out, weights = self.attend(*turned(self, hidden_states), attention_mask)
        return self.o_proj(out.flatten(2)), weights

    def attend(self, *args: Any) -> Any:
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain)
        return attention(self, *args, scaling=self.scaling)


class Aliased(Helped):
    """It knows the interface by another name."""

    def attend(self, *args: Any) -> Any:
        return KERNELS.get_interface(self.config._attn_implementation, plain)(self, *args, scaling=self.scaling)


class Delegating(Helped):
    """A function of its file calls the interface."""

    def attend(self, *args: Any) -> Any:
        return dispatch(self, *args, scaling=self.scaling)


class Inheriting(Helped):
    """Its parent's forward does it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 1.0, weights


def traced(forward: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return run


class Decorated(Helped):
    """Its forward is decorated, by a decorator that does not say of what."""

    @traced
    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        out, weights = dispatch(self, *turned(self, hidden_states), attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), weights


class Nested(Helped):
    """A function inside its forward does it."""

    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        def attend(*args: Any) -> Any:
            attention = KERNELS.get_interface(self.config._attn_implementation, plain)
            return attention(self, *args, scaling=self.scaling)

        out, weights = attend(*turned(self, hidden_states), attention_mask)
        return self.o_proj(out.flatten(2)), weights


class Dotted(Helped):
    """It knows the interface as an attribute of a module."""

    def attend(self, *args: Any) -> Any:
        attention = modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain)
        return attention(self, *args, scaling=self.scaling)


class FarDotted(Helped):
    """It is an attribute of a module in a module, with a name of its own between."""

    def attend(self, *args: Any) -> Any:
        held = transformers.modeling_utils
        attention = held.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, plain)
        return attention(self, *args, scaling=self.scaling)


class Asking(Helped):
    """It asks for the attribute by its name."""

    def attend(self, *args: Any) -> Any:
        interface = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS")  # noqa: B009
        attention = interface.get_interface(self.config._attn_implementation, plain)
        return attention(self, *args, scaling=self.scaling)


class Importing(Helped):
    """It imports the interface when it is called."""

    def attend(self, *args: Any) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as HERE

        attention = HERE.get_interface(self.config._attn_implementation, plain)
        return attention(self, *args, scaling=self.scaling)


class Holding(Helped):
    """Its class holds the interface."""

    kernels = KERNELS

    def attend(self, *args: Any) -> Any:
        return self.kernels.get_interface(self.config._attn_implementation, plain)(self, *args, scaling=self.scaling)


class Defaulting(Helped):
    """The interface is the default of an argument."""

    def attend(self, *args: Any, kernels: Any = KERNELS) -> Any:
        return kernels.get_interface(self.config._attn_implementation, plain)(self, *args, scaling=self.scaling)


def enclosed(kernels: Any) -> type[nn.Module]:
    class Enclosed(Helped):
        """Its closure holds the interface."""

        def attend(self, *args: Any) -> Any:
            return kernels.get_interface(self.config._attn_implementation, plain)(self, *args, scaling=self.scaling)

    return Enclosed


class Elsewhere(Helped):
    """A function of another file calls the interface."""

    def attend(self, *args: Any) -> Any:
        return own_dispatch.dispatch(self, *args, scaling=self.scaling)


partly = functools.partial(own_dispatch.dispatch)


class Partly(Helped):
    """A function with some of its arguments calls the interface."""

    def attend(self, *args: Any) -> Any:
        return partly(self, *args, scaling=self.scaling)


nowhere: dict[str, Any] = {"dispatch": dispatch}
exec("def somewhere(module, *args, **kwargs):\n    return dispatch(module, *args, **kwargs)", nowhere)
somewhere = nowhere["somewhere"]


class Nowhere(Helped):
    """A function that is of no module calls the interface."""

    def attend(self, *args: Any) -> Any:
        return somewhere(self, *args, scaling=self.scaling)


class Inline(Helped):
    """It computes attention itself."""

    def forward(self, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return plain(self, *turned(self, hidden_states), attention_mask, scaling=self.scaling)


OWN = [
    *(Helped, Aliased, Delegating, Inheriting, Decorated, Nested),
    *(Dotted, FarDotted, Asking, Importing, Holding, Defaulting, enclosed(KERNELS), Elsewhere, Partly, Nowhere),
]


def model_with(cls: type[nn.Module], implementation: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = tiny.build("llama")
    for index, layer in enumerate(model.model.layers):
        weights = layer.self_attn.state_dict()
        layer.self_attn = cls(model.config, index)
        layer.self_attn.load_state_dict(weights)
    model.set_attn_implementation(implementation)
    return model.eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cls", OWN)
@torch.no_grad()
def test_the_interface_is_found_however_it_is_called(cls, implementation):
    given, model = tiny.inputs("llama"), model_with(cls, implementation)
    own = tiny.output(model, given)
    assert len(ap.describe_attention(model)) == 3
    for rule in ("softmax", {"type": "softmax", "layers": 1}):
        ap.swap_attention(model, rule)
        torch.testing.assert_close(tiny.output(model, given), own, atol=1e-5, rtol=1e-4)
    ap.swap_attention(model, "local", window_size=2)
    assert not torch.allclose(tiny.output(model, given), own, atol=1e-3)
    assert torch.equal(tiny.output(ap.restore_attention(model), given), own)


def test_what_does_not_call_it_is_not_found():
    for cls in (Inline, LlamaDecoderLayer, transformers.LlamaModel, transformers.LlamaForCausalLM, nn.Linear):
        assert dispatch_of(cls) is None
    with pytest.raises(ValueError, match="no attention that can be swapped"):
        ap.swap_attention(model_with(Inline), "softmax")


def test_an_eager_attention_that_cannot_be_found_is_an_error():
    class Hidden(Helped):
        functions = (plain,)

        def attend(self, *args: Any) -> Any:
            attention = KERNELS.get_interface(self.config._attn_implementation, self.functions[0])
            return attention(self, *args, scaling=self.scaling)

    model = ap.swap_attention(model_with(Hidden, "eager"), "softmax", layers=0)
    with pytest.raises(ValueError, match="cannot find the 'eager' attention of Hidden; name it eager_att"):
        model(**tiny.inputs("llama"))


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """A folder with a model's code and weights, as the hub has them, whose code knows nothing of this package."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "remote"
    folder.mkdir()
    code = EXAMPLE.read_text(encoding="utf8").partition("AutoConfig.register(")[0]
    code = code.replace("import attn_plugins as ap\n", "").replace('model_type = "own"', 'model_type = "own_remote"')
    assert "attn_plugins" not in code
    (folder / "modeling_own.py").write_text(code, encoding="utf8")
    config = {
        "model_type": "own_remote",
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_remote_code_loads_with_the_flag_saves_and_loads_back(remote, tmp_path):
    load = functools.partial(AutoModelForCausalLM.from_pretrained, trust_remote_code=True)
    given = tiny.inputs("llama")
    own = tiny.output(load(remote), given)
    torch.testing.assert_close(tiny.output(load(remote, attn_plugin="softmax"), given), own, atol=1e-5, rtol=1e-4)
    flag = [
        {"type": "linear", "feature_map": "hedgehog", "layers": 0},
        {"type": "local", "window_size": 4, "layers": 1},
    ]
    model = load(remote, attn_plugin=flag)
    assert [row.plugin for row in ap.describe_attention(model)] == ["linear", "local", None]
    expected = tiny.output(model, given)
    assert not torch.allclose(expected, own, atol=1e-3)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modeling_own.py").exists()
    again = load(tmp_path / "saved")
    assert torch.equal(tiny.output(again, given), expected)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    said = again.generate(**given, **how)
    assert torch.equal(said, model.generate(**given, **how))
    assert torch.equal(said, again.generate(**given, **how, use_cache=False))
    assert torch.equal(tiny.output(ap.restore_attention(again), given), own)


def test_configs_of_remote_code_without_the_flag_stay_as_they_are(remote):
    saved = json.loads((remote / "config.json").read_text(encoding="utf8"))
    assert not [key for key in saved if "attn" in key]
    assert LlamaConfig().attn_plugin is None
