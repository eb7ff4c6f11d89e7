"""Other attentions in plain torch modules: nn.MultiheadAttention, callers of torch's fused attention, our own layer."""
