"""SAM's encoder in a model that reads pages, which older versions of transformers do not have."""

from transformers.models.unlimited_ocr import modeling_unlimited_ocr

from attn_plugins.hf.adapters.decomposed_positions import SamVisionAttention

FAMILIES = ("unlimited_ocr",)


class UnlimitedOcrSamVisionAttention(modeling_unlimited_ocr.UnlimitedOcrSamVisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class UnlimitedOcrSamVisionSdpaAttention(modeling_unlimited_ocr.UnlimitedOcrSamVisionSdpaAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward
