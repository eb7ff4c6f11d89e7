"""The package's own model types."""

from typing import Any

import torch

from corrections import inputs

CONFIGS: dict[str, dict[str, Any]] = {
    "recurrent_encoder": {"num_attention_heads": 4},
    "recurrent_decoder": {"num_attention_heads": 4, "attention": "bahdanau"},
    "recurrent_seq2seq": {"num_attention_heads": 4, "input_feeding": True, "self_attention": True},
}


@inputs("recurrent_decoder")
def beside_states(model: Any, source: Any) -> dict[str, Any]:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, -4:] = 0
    states = source(2, 13, model.config.hidden_size)
    return {"input_ids": source.ids(2, 7), "encoder_hidden_states": states, "encoder_attention_mask": mask}
