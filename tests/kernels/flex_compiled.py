"""Compiles FlexAttention's templates with the masks of attentions, for a GPU that is not there.

    python tests/kernels/flex_compiled.py ARCHITECTURE [HEAD_DIM]

Prints JSON, a row a template: the shared memory that a block of threads takes of what there is.
"""

import json
import os
import sys
import warnings

import torch
from flex_in_triton import GPUS, defined, inductor_for

HEADS, LENGTH = 16, 4096
CASES = {
    "local, 4 sink tokens, packed and padded": ("local", {"num_sink_tokens": 4}, True),
    "local, softcap, position bias, learned sinks": ("local", {}, True),
    "longformer": ("longformer", {}, False),
    "bigbird": ("bigbird", {}, True),
    "shifted_block": ("shifted_block", {}, True),
    "neighborhood_2d": ("neighborhood_2d", {"num_prefix_tokens": 0}, False),
}


def written_for(architecture, label, head_dim):
    """(name, source, what inductor says of it) of the templates of one attention, forward and backward."""
    from attn_plugins.backends.flex import Flex
    from attn_plugins.core.attention import HeadShape
    from attn_plugins.core.mask import AttentionMask
    from attn_plugins.core.registry import get_attention

    Flex.devices = ("cpu",)
    name, options, causal = CASES[label]
    cls = get_attention(name)
    heads = HeadShape(num_heads=HEADS, num_key_value_heads=HEADS, head_dim=head_dim, value_dim=head_dim)
    module = cls(cls.Config(**options), heads, backend="flex")
    index, extras, tables = torch.arange(LENGTH), {}, {}
    if "packed" in label:
        tables = {"segments_BK": (index >= 1500).long()[None], "padding_BK": (index < LENGTH - 9)[None]}
    if "bias" in label:
        bias, sinks = torch.zeros(1, HEADS, LENGTH, LENGTH), torch.zeros(HEADS)
        extras = {"softcap": 30.0, "position_bias": bias.requires_grad_(), "sinks": sinks.requires_grad_()}
    mask = AttentionMask(1, LENGTH, LENGTH, causal=causal, **tables)
    shape = (3, 1, HEADS, LENGTH, head_dim)
    with inductor_for(architecture, run=False) as written:
        q, k, v = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True).unbind()
        out, _ = module(q, k, v, mask=mask, scale=head_dim**-0.5, **extras)
        out.backward(torch.zeros_like(out))
    return {kernel: source for kernel, source, _ in written if "_tem_" in kernel}


def compiled(name, source, architecture):
    """The binary of a template."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    said = {}
    function = defined(name, source, said, interpreted=False)
    signature, constants = dict(said["triton_meta"]["signature"]), dict(said["triton_meta"].get("constants", {}))
    constants = {(function.arg_names.index(key) if isinstance(key, str) else key,): x for key, x in constants.items()}
    (attributes,) = said["triton_meta"]["configs"]
    return triton.compile(
        ASTSource(function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={key: said[key] for key in ("num_warps", "num_stages")},
    )


def rows(architecture, head_dim, labels=tuple(CASES)):
    for label in labels:
        for name, source in written_for(architecture, label, head_dim).items():
            binary = compiled(name, source, architecture)
            yield {
                "attention": label,
                "head_dim": head_dim,
                "template": "backward" if "bwd_dkdv_inner(" in source else "forward",
                "architecture": architecture,
                "shared": binary.metadata.shared,
                "of": GPUS[architecture],
                "cubin": len(binary.asm["cubin"]),
            }


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    warnings.filterwarnings("ignore")
    for row in rows(int(sys.argv[1]), *map(int, sys.argv[2:3] or [64]), sys.argv[3:] or tuple(CASES)):
        print(json.dumps(row), flush=True)
