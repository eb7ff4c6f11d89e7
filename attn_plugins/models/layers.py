"""Recurrent layers over rows with padding: torch's own, which see the tokens of a row one after another, no padding."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from attn_plugins.core.tracing import readable

State = tuple[torch.Tensor, ...]
"""States (layers, B, size) of a recurrent layer: hidden, and the cell's of an LSTM."""

_CLASSES: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def make_layers(config: Any, input_size: int, *, bidirectional: bool = False) -> nn.RNNBase:
    """The recurrent layers of a config, whose states are of its ``hidden_size``, of both directions together."""
    return _CLASSES[config.cell](
        input_size,
        config.hidden_size // (2 if bidirectional else 1),
        config.num_layers,
        batch_first=True,
        dropout=config.dropout if config.num_layers > 1 else 0.0,
        bidirectional=bidirectional,
    )


def run(
    layers: nn.RNNBase, inputs: torch.Tensor, mask: torch.Tensor | None, state: State | None = None
) -> tuple[torch.Tensor, State | None]:
    """(Outputs (B, N, size), which are 0 at padding; the states after each row's last real token).

    Tokens that are not padding follow one another, wherever the padding is: before, behind or between them.

    Args:
        inputs: (B, N, size).
        mask: (B, N), true where a token is real; None where all are.
        state: to begin with; None for zeros.

    Returns:
        None for the states, where a graph is recorded with a mask.
    """
    if mask is None or (readable(mask) and bool(mask.all())):
        outputs, after = layers(inputs, _given(layers, state))
        return outputs, _tuple(after)
    mask = mask.bool()
    number = mask.sum(dim=1)
    # Real tokens first, each in its order; without a sort, which ONNX has in no stable form.
    place = torch.where(mask, mask.cumsum(1), number.unsqueeze(1) + (~mask).cumsum(1)).sub(1).unsqueeze(2)
    inputs = torch.zeros_like(inputs).scatter(1, place.expand_as(inputs), inputs)
    found: State | None = None
    if readable(mask):
        outputs, found = _packed(layers, inputs, number, state)
    else:
        outputs = _turned(layers, inputs, number, state)
    outputs = outputs.gather(1, place.expand_as(outputs))
    return outputs * mask.unsqueeze(2).to(outputs.dtype), found


def _packed(
    layers: nn.RNNBase, inputs: torch.Tensor, number: torch.Tensor, state: State | None
) -> tuple[torch.Tensor, State]:
    # A row of padding alone is packed as one of a token, whose state is taken back.
    packed = pack_padded_sequence(inputs, number.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    outputs, last = layers(packed, _given(layers, state))
    outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=inputs.shape[1])
    after = _tuple(last)
    if bool((number == 0).any()):
        before = state or tuple(torch.zeros_like(one) for one in after)
        read = (number > 0).unsqueeze(1)
        after = tuple(torch.where(read, new, old) for new, old in zip(after, before, strict=True))
    return outputs, after


def _turned(layers: nn.RNNBase, inputs: torch.Tensor, number: torch.Tensor, state: State | None) -> torch.Tensor:
    """The same outputs where lengths cannot be read: layer by layer, each direction by itself.

    The backward direction reads rows that are turned around within their own lengths, so that it meets padding last.
    """
    directions = 2 if layers.bidirectional else 1
    index = torch.arange(inputs.shape[1], device=inputs.device).unsqueeze(0)
    turned = torch.where(index < number.unsqueeze(1), number.unsqueeze(1) - 1 - index, index).unsqueeze(2)
    for layer in range(layers.num_layers):
        made = []
        for direction in range(directions):
            at = layer * directions + direction
            given = _given(layers, None if state is None else tuple(x[at : at + 1] for x in state))
            if given is None:
                zeros = inputs.new_zeros(1, inputs.shape[0], layers.hidden_size)
                given = (zeros, zeros) if isinstance(layers, nn.LSTM) else zeros
            x = inputs.gather(1, turned.expand_as(inputs)) if direction else inputs
            out = _FUNCTIONS[type(layers)](x, given, _weights(layers, at), True, 1, 0.0, False, False, True)[0]
            made.append(out.gather(1, turned.expand_as(out)) if direction else out)
        inputs = torch.cat(made, dim=2)
        if layer + 1 < layers.num_layers:
            inputs = nn.functional.dropout(inputs, layers.dropout, layers.training)
    return inputs


_FUNCTIONS: dict[type[nn.RNNBase], Any] = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}


def _weights(layers: nn.RNNBase, at: int) -> list[torch.Tensor]:
    return [getattr(layers, name) for name in layers._all_weights[at]]


def _given(layers: nn.RNNBase, state: State | None) -> Any:
    """States as torch's layer takes them."""
    return state if state is None or isinstance(layers, nn.LSTM) else state[0]


def _tuple(state: Any) -> State:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)
