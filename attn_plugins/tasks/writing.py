"""What tasks share whose models write texts by ``generate``: a Trainer that lets them, and tokens as texts."""

from typing import Any

import torch

from attn_plugins.data.text import IGNORED


def let_generate(parts: dict[str, Any], max_length: int, num_beams: int | None) -> None:
    """Complete what Seq2SeqTrainer takes: figures of texts where it generates while it trains, and none where it does
    not, since those would be of the logits, kept for all rows.

    Args:
        parts: what Trainer takes, by its names; changed in place.
        max_length, num_beams: of what is written, unless the training's settings say otherwise.

    Raises:
        ValueError: it is to generate, and the model is no encoder-decoder.
    """
    arguments = parts["args"]
    if not arguments.predict_with_generate:
        parts["compute_metrics"] = None
    elif not parts["model"].config.is_encoder_decoder:
        raise ValueError(
            "training.predict_with_generate is for encoder-decoders; other models are evaluated by their loss while "
            "they train, and by what they write afterwards"
        )
    else:
        arguments.generation_max_length = arguments.generation_max_length or max_length
        arguments.generation_num_beams = arguments.generation_num_beams or num_beams


def decoded(tokenizer: Any, ids_BT: Any) -> list[str]:
    """Texts of tokens, without special ones; IGNORED stands for padding."""
    ids_BT = torch.as_tensor(ids_BT)
    texts = tokenizer.batch_decode(ids_BT.where(ids_BT != IGNORED, tokenizer.pad_token_id), skip_special_tokens=True)
    return [text.strip() for text in texts]
