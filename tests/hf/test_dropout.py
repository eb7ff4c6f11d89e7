"""Attention dropout where an attention has no form of it: said once, when the attention is put in."""

import re
import warnings

import pytest
import tiny
import torch

import attn_plugins as ap
from attn_plugins.hf.names import SLOT

MESSAGE = "drops no weights: the model's attention dropout of {} is left out"


def warned(run):
    """The dropouts that ``run`` is warned of being left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    found = [re.search(MESSAGE.format(r"(\S+)"), str(one.message)) for one in caught]
    return {float(match.group(1)) for match in found if match}


def with_dropout(name, p):
    """A tiny model whose config asks for attention dropout, by whatever name, and for no other."""
    kind, config = tiny.MODELS[name]()
    for part in (config, *(getattr(config, key) for key in config.sub_configs)):
        for field in vars(part):
            if re.search("drop", field) and isinstance(getattr(part, field), (int, float)):
                setattr(part, field, 0.0 if "layer" in field else p)  # layers that are left out get no dropout
    return kind._from_config(config)


def dropouts(model, given):
    """What arrives at the slots in training."""
    seen = set()
    for module in model.modules():
        if hasattr(module, SLOT):
            getattr(module, SLOT).register_forward_pre_hook(
                lambda _, args, kwargs: seen.add(kwargs["dropout"]), with_kwargs=True
            )
    model.train()(**given)
    return {p for p in seen if p > 0}


@pytest.mark.parametrize("name", sorted(set(tiny.MODELS) - {"t5", *tiny.OWN_PATTERN}))
@pytest.mark.parametrize("p", [0.25, 0.0])
def test_what_will_arrive_in_training_is_told_at_the_swap(name, p):
    model = with_dropout(name, p)
    told = warned(lambda: ap.swap_attention(model, "linear"))
    assert told == dropouts(model, tiny.inputs(name, length=20)) == ({0.25} if p else set())


def test_an_attention_that_has_dropout_tells_nothing():
    assert not warned(lambda: ap.swap_attention(with_dropout("bert", 0.25), "local"))


def test_loading_tells_it_too(tmp_path):
    with_dropout("bert", 0.25).save_pretrained(tmp_path)
    load = tiny.MODELS["bert"]()[0].from_pretrained
    assert warned(lambda: load(tmp_path, attn_plugin="linear")) == {0.25}


def test_it_is_shown_once():
    model = with_dropout("bert", 0.15)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            ap.swap_attention(model, "linear")
            ap.restore_attention(model)
        ap.swap_attention(model, "linear").train()(**tiny.inputs("bert"))
    assert len([one for one in caught if MESSAGE.format(0.15) in str(one.message)]) == 1


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model, given = with_dropout("bert", 0.25).eval(), tiny.inputs("bert")
    before = tiny.output(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MESSAGE.format(0.25)):
            ap.swap_attention(model, "linear")
    assert torch.equal(tiny.output(model, given), before)
    assert all(row.plugin is None for row in ap.describe_attention(model))
