"""SAM's encoder in models that read pages: copies with the same body."""

from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2
from transformers.models.got_ocr2 import modeling_got_ocr2
from transformers.models.pp_formulanet import modeling_pp_formulanet

from attn_plugins.hf.adapters.decomposed_positions import SamVisionAttention

FAMILIES = ("deepseek_ocr2", "got_ocr2", "pp_formulanet")


class GotOcr2VisionAttention(modeling_got_ocr2.GotOcr2VisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class PPFormulaNetVisionAttention(modeling_pp_formulanet.PPFormulaNetVisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class DeepseekOcr2SamVisionAttention(modeling_deepseek_ocr2.DeepseekOcr2SamVisionAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward


class DeepseekOcr2SamVisionSdpaAttention(modeling_deepseek_ocr2.DeepseekOcr2SamVisionSdpaAttention):
    is_causal = False
    adds_position_bias = SamVisionAttention.adds_position_bias
    forward = SamVisionAttention.forward
