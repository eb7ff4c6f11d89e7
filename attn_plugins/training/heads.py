"""What of a model stands beside the part that attends."""

from torch import nn

from attn_plugins.hf.swap import describe_attention


def beside_attention(model: nn.Module) -> list[str]:
    """Names of a model's own parts with weights in which there are no attention modules: its heads."""
    body = {row.path.partition(".")[0] for row in describe_attention(model)}
    return [name for name, part in model.named_children() if name not in body and any(True for _ in part.parameters())]
