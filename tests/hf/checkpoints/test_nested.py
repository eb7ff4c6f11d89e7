"""Models that are built inside the constructors of others: what they were saved with stays, whoever builds them."""

import copy
import threading

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import attn_plugins as ap

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog", "layers": [0, 1]}


class Around(PreTrainedModel):
    """A model whose constructor gets a part from ``make`` and holds it as a submodule, deep down or in a list."""

    config_class = BertConfig
    base_model_prefix = ""

    def __init__(self, config, make, held="part"):
        super().__init__(config)
        part = make()
        if held == "list":
            self.aside = [part]
        elif held == "deep":
            self.inner = nn.Sequential(nn.Module())
            self.inner[0].part = part
        else:
            self.part = part
        self.post_init()

    def _init_weights(self, module):
        pass


class Built(nn.Module):
    """A module of no kind that transformers knows, which builds its model itself."""

    def __init__(self, path):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path)


def part_of(around):
    return next(m for m in around.modules() if isinstance(m, LlamaForCausalLM))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model) of a swapped model whose new weights are all 0.25."""
    model = ap.swap_attention(tiny.build("llama"), HEDGEHOG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_plugin" in name:
                parameter.fill_(0.25)
    folder = tmp_path_factory.mktemp("swapped")
    model.save_pretrained(folder)
    return folder, model


def in_a_thread(make):
    found = []
    thread = threading.Thread(target=lambda: found.append(make()))
    thread.start()
    thread.join()
    return found[0]


MAKERS = {
    "from_pretrained": lambda path: LlamaForCausalLM.from_pretrained(path),
    "auto": lambda path: AutoModelForCausalLM.from_pretrained(path),
    "module": lambda path: Built(path),
    "two levels": lambda path: Around(BertConfig(), lambda: LlamaForCausalLM.from_pretrained(path)),
    "deepcopy": lambda path: copy.deepcopy(LlamaForCausalLM.from_pretrained(path)),
    "thread": lambda path: in_a_thread(lambda: LlamaForCausalLM.from_pretrained(path)),
}


@pytest.mark.parametrize("held", ["part", "deep"])
@pytest.mark.parametrize("make", MAKERS)
@torch.no_grad()
def test_weights_loaded_inside_another_constructor_are_the_saved_ones(saved, make, held):
    path, model = saved
    around = Around(BertConfig(), lambda: MAKERS[make](path), held)
    part, given = part_of(around).eval(), tiny.inputs("llama")
    assert part.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in part.state_dict().items())
    assert torch.equal(tiny.output(part, given), tiny.output(model, given))
    rows = ap.describe_attention(around)
    assert [row.plugin for row in rows if "self_attn" in row.path] == ["linear", "linear", None]


@pytest.mark.parametrize("held", ["part", "deep", "list"])
def test_a_flagged_config_inside_another_constructor_is_swapped(held):
    config = LlamaConfig(**tiny.GROUPED, attn_plugin="local")
    around = Around(BertConfig(), lambda: LlamaForCausalLM._from_config(config), held)
    part = around.aside[0] if held == "list" else part_of(around)
    assert [row.plugin for row in ap.describe_attention(part)] == ["local"] * 3


def test_a_constructor_that_raises_leaves_nothing_behind(saved):
    path, model = saved

    def fail():
        LlamaForCausalLM._from_config(LlamaConfig(**tiny.GROUPED, attn_plugin="local"))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Around(BertConfig(), fail)
    back = LlamaForCausalLM.from_pretrained(path)
    assert ap.describe_attention(back) == ap.describe_attention(model)


def test_the_flag_of_a_model_does_not_drop_what_its_parts_have_learned(saved):
    path, model = saved
    rules = {**model.config.attn_plugin[0], "modules": "self_attn"}
    around = Around(BertConfig(attn_plugin=rules), lambda: LlamaForCausalLM.from_pretrained(path))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in part_of(around).state_dict().items())
    for other in ({"type": "local", "modules": "self_attn"}, {**rules, "layers": 1}):
        with pytest.raises(
            ValueError,
            match=r"attn_plugin of Around would replace 'linear' at part.model.layers.0.self_attn, which its part "
            "LlamaForCausalLM came with; give rules that say the same, or build that part with attn_plugin=None",
        ):
            Around(BertConfig(attn_plugin=other), lambda: LlamaForCausalLM.from_pretrained(path))
