"""Attention classes that never ask transformers' interface and have no adapter, and why."""

from collections.abc import Iterator

from torch import nn

REASONS: dict[str, str] = {
    "AutoformerAttention": "weighs whole series, shifted by a few delays, by their autocorrelation: no key by a query",
    "Gemma3nAudioAttention": "a window already, whose softcap limits scores and their position bias together",
    "Gemma4AudioAttention": "a window already, whose softcap limits scores and their position bias together",
    "GroupViTAssignAttention": "gives each patch to one group: a softmax over queries, hard",
    "InformerProbSparseAttention": "attends for a few queries that it chooses, and gives the others the mean of values",
    "LSHSelfAttention": "hashes vectors that are queries and keys at once, and attends in chunks of sorted hashes",
    "LocalSelfAttention": "chunks that see the one before them, a window already, and caches that hold hidden states",
    "MobileViTV2LinearSelfAttention": "one score for each patch, and one weighted sum of all patches for all of them",
    "MraSelfAttention": "approximates softmax attention in its own way: blocks of scores in two resolutions",
    "NystromformerSelfAttention": "approximates softmax attention in its own way: landmarks and a pseudo-inverse",
    "PatchTSMixerGatedAttention": "a gate of each feature by softmax over features, without keys",
    "ProphetNetNgramSelfAttention": "several streams at once, in which each query has a key more that no other sees",
    "RwkvSelfAttention": "a recurrence with a decay for each channel, without queries",
    "SLANeXtAttentionGRUCell": "a step of a recurrent cell that attends to an image from its own state",
    "SLANetAttentionGRUCell": "a step of a recurrent cell that attends to an image from its own state",
    "SwiftFormerEfficientAdditiveAttention": "one score for each token, and one global query made of all of them",
    "YosoSelfAttention": "approximates attention in its own way: by hashes that queries and keys share",
}
"""Class -> what it does in place of, or beside, attention of queries to keys."""


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of those in a model."""
    return ((path, module) for path, module in model.named_modules() if type(module).__name__ in REASONS)


def reasons(model: nn.Module) -> dict[str, str]:
    """Those of the classes of a model's modules, and of classes of timm, which attend inside a part that is timm's."""
    found, outer = {}, ""
    for path, module in model.named_modules():
        name = type(module).__name__
        if type(module).__module__.startswith("timm."):
            outer = outer if f"{path}.".startswith(f"{outer}.") and outer else path
            if "Attention" in name or "Attn" in name:
                found[name] = f"timm's: swap that part by itself, ap.swap_attention(model.{outer}, ...)"
        elif name in REASONS:
            found[name] = REASONS[name]
    return found
