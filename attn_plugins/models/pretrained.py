"""What recurrent models share as models of transformers: how their weights begin."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init


class RecurrentPreTrainedModel(PreTrainedModel):
    """Base of the recurrent models."""

    base_model_prefix = "recurrent"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True  # a state does not go back, so that nothing can be drafted and taken back

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Recurrent layers as torch has them, with forget gates open; matrices by Glorot; embeddings of unit length."""
        if isinstance(module, nn.RNNBase):
            bound = module.hidden_size**-0.5
            for name, weight in module.named_parameters():
                init.uniform_(weight, -bound, bound)
                if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                    held = getattr(weight, "_is_hf_initialized", False)
                    if not held:  # the gates are input, forget, cell, output; of a slice init would not know
                        weight[module.hidden_size : 2 * module.hidden_size] = 1.0
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        else:
            super()._init_weights(module)
