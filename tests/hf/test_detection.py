"""Cross-attention of detectors and segmenters: queries or prompts on tokens of an image, and the other way round."""

import pytest
import torch
import transformers as tf

from attn_plugins import describe_attention, get_attention, list_attentions, restore_attention, swap_attention

CROSS = [name for name in list_attentions() if get_attention(name).cross]


def detr():
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 32], depths=[1, 1, 1, 1], layer_type="basic", out_indices=[4]
    )
    sizes = {"d_model": 32, "num_queries": 7}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    model = tf.DetrModel(tf.DetrConfig(backbone_config=backbone, **sizes))
    padding = torch.ones(2, 96, 96, dtype=torch.long)
    padding[1, :, 64:] = 0
    return model, {"pixel_values": torch.randn(2, 3, 96, 96), "pixel_mask": padding}, "last_hidden_state"


def sam():
    sizes = {"hidden_size": 32, "image_size": 48, "patch_size": 8}
    vision = {**sizes, "output_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "mlp_dim": 48}
    decoder = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 48}
    config = tf.SamConfig(
        vision_config={**vision, "window_size": 3, "global_attn_indexes": [0], "num_pos_feats": 16},
        prompt_encoder_config=sizes,
        mask_decoder_config={**decoder, "iou_head_hidden_dim": 32},
    )
    points = torch.tensor([[[[10.0, 20.0]], [[30.0, 5.0]]]]).expand(2, -1, -1, -1)
    return tf.SamModel(config), {"pixel_values": torch.randn(2, 3, 48, 48), "input_points": points}, "pred_masks"


MODELS = {
    "detr": (detr, {f"decoder.layers.{layer}.encoder_attn" for layer in (0, 1)}),
    "sam": (
        sam,
        {
            *(
                f"mask_decoder.transformer.layers.{layer}.cross_attn_{way}"
                for layer in (0, 1)
                for way in ("token_to_image", "image_to_token")
            ),
            "mask_decoder.transformer.final_attn_token_to_image",
        },
    ),
}
"""The model with its inputs, and its modules of cross-attention."""


def made(name):
    torch.manual_seed(0)
    model, given, out = MODELS[name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)  # so that scores differ from key to key
    return model.eval(), given, lambda: getattr(model(**given), out)


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_those_of_queries_and_keys(name):
    model, _, run = made(name)
    rows = describe_attention(model)
    assert {row.path for row in rows if row.role == "cross"} == MODELS[name][1]
    lengths = {}

    def note(path):
        return lambda module, args, kwargs: lengths.update({path: len({x.shape[2] for x in args[:2]})})

    swap_attention(model, {"type": "softmax", "roles": ["encoder", "decoder", "cross"]})
    for row in rows:
        model.get_submodule(row.path).attn_plugin.register_forward_pre_hook(note(row.path), with_kwargs=True)
    with torch.no_grad():
        run()
    assert {path for path, number in lengths.items() if number == 2} == MODELS[name][1]
    assert {row.role for row in rows} == {"encoder", "cross"}


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_that_serves_cross_attention_serves_it_here(name):
    model, _, run = made(name)
    with torch.no_grad():
        want = run()
    for attention in CROSS:
        cls = get_attention(attention)
        for options in ([cls.limit] if cls.limit is not None else []) + [cls.examples[-1]]:
            torch.manual_seed(0)
            swap_attention(model, {"type": attention, **options, "roles": ["cross"]})
            out = run()
            assert out.isfinite().all(), attention
            if options is cls.limit and cls.limit is not None:
                torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4, msg=attention)
            else:
                out.square().mean().backward()
                new = [p for path, p in model.named_parameters() if "attn_plugin" in path]
                assert all(p.grad is not None and p.grad.isfinite().all() for p in new), attention
    swap_attention(model, {"type": "topk", "topk": 1, "roles": ["cross"]})
    with torch.no_grad():
        assert not torch.allclose(run(), want, atol=1e-3)
        restore_attention(model)
        assert torch.equal(run(), want)


def test_patterns_on_a_grid_do_not_take_queries_of_a_detector():
    model, *_ = made("detr")
    with pytest.raises(ValueError, match="cross"):
        swap_attention(model, {"type": "axial", "roles": ["cross"]})
