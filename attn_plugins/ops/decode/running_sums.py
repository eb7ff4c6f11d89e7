"""Sums: the state of attentions that add up all tokens seen, as large after a million of them as after the first."""

from collections.abc import Callable

import torch

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.features import check_length, row_positions
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype

PREFILL_CHUNK = 4096
"""Tokens of a prefill chunk: features and projections are made for as many at a time."""

AttendChunk = Callable[..., torch.Tensor]
"""(q_BHQD, k_BGKD, v_BGKV, and what else keys bring), the queries the last of the keys' tokens -> out_BHQV; takes the
tokens in."""


class Sums(State):
    """Running sums over all tokens but the last ``window_size``, and the keys and values of these in a ring buffer.

    ``tensors``: k (B, G, num_first + window, D) and v likewise, each row's first real tokens, then the ring, in which
    position p is in place p modulo ``window``. They are empty where there is no window, and say all the same which
    tokens may follow. The others are the attention's own, in float32, or float64 for tokens in float64.

    Args:
        window_size: of tokens that are not summed up yet.
        num_first: first real tokens of each row that are kept for good.
        max_length: most tokens that a row may have, where the attention's options set a limit (cosformer).
        grows: whether what is held grows with the text, as the logarithm of its length does.
    """

    supports_fixed_length = True

    def __init__(
        self,
        fixed_length: int | None = None,
        *,
        window_size: int = 0,
        num_first: int = 0,
        max_length: int | None = None,
        grows: bool = False,
    ):
        super().__init__(fixed_length)
        self.grows = grows
        self.num_first = num_first
        self.window = window_size if fixed_length is None else min(window_size, fixed_length)
        self.max_length = max_length

    def start(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The tensors, made if they are not there: besides k and v, (B, *shape) under each name.

        They begin with zeros, those whose name ends in "max" with MASKED_SCORE.
        """
        if not self.tensors:
            (batch, groups), dtype = k_BGKD.shape[:2], accumulation_dtype(k_BGKD, v_BGKV)
            self.tensors = {
                "k": k_BGKD.new_zeros(batch, groups, self.num_first + self.window, k_BGKD.shape[3]),
                "v": v_BGKV.new_zeros(batch, groups, self.num_first + self.window, v_BGKV.shape[3]),
            }
            for name, shape in shapes.items():
                self.tensors[name] = k_BGKD.new_full((batch, *shape), _empty(name), dtype=dtype)
        return self.tensors

    def commit(self, number: int, **sums: torch.Tensor | None) -> None:
        """Replace the sums by those that ``number`` more tokens are part of."""
        for name, x in sums.items():
            if x is None:
                continue
            held = self.tensors[name]
            # Else what earlier calls have read is still as it was, for their gradients.
            if self.fixed_length is None or x.requires_grad or held.requires_grad:
                self.tensors[name] = x
            else:
                held.copy_(x)
        self.advance(number)

    def first_positions(self, mask: AttentionMask, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the first tokens of each row from its first real one on, and which of them are real.

        Args:
            number: how many of the ``num_first``.

        Returns:
            both (B or 1, number).
        """
        count, padding_BK = torch.arange(number, device=mask.device).unsqueeze(0), mask.padding_BK
        if padding_BK is None:
            return count, torch.ones_like(count, dtype=torch.bool)
        length = padding_BK.shape[1]
        start_B = torch.where(padding_BK.any(dim=1), padding_BK.long().argmax(dim=1), length)
        position_BS = start_B.unsqueeze(1) + count
        return position_BS, padding_BK.gather(1, position_BS.clamp(max=length - 1)) & (position_BS < length)

    def keep_first(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: AttentionMask) -> None:
        """Write those of the next tokens that are first ones of a row into their places."""
        new, compiling = k_BGKD.shape[2], torch.compiler.is_compiling()
        number = self.num_first if compiling else min(self.num_first, self.length + new)
        if not number or (mask.padding_BK is None and not compiling and self.length >= number):
            return
        position_BS, _ = mask.cached(("first", number), lambda: self.first_positions(mask, number))
        index = position_BS - self.position
        here, index = ((index >= 0) & (index < new))[:, None, :, None], index.clamp(0, new - 1)[:, None, :, None]
        places = torch.arange(number, device=k_BGKD.device)
        for name, x in (("k", k_BGKD), ("v", v_BGKV)):
            first = torch.gather(x, 2, index.expand(*x.shape[:2], -1, x.shape[3]))
            self.write(name, 2, places, torch.where(here, first, self.tensors[name][:, :, :number]))

    def not_padding(self, mask: AttentionMask, number: int) -> torch.Tensor | None:
        """Which of the next ``number`` tokens are no padding, (B, number); None if all are."""
        if mask.padding_BK is None:
            return None
        position = torch.arange(number, device=mask.padding_BK.device) + self.position
        return mask.padding_BK.index_select(1, position).expand(mask.batch_size, -1)

    def reset(self) -> None:
        super().reset()
        for name, tensor in self.tensors.items():
            tensor.fill_(_empty(name))

    def check(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        mask: AttentionMask,
        *,
        need_weights: bool = False,
    ) -> None:
        super().check(q_BHQD, k_BGKD, v_BGKV, mask, need_weights=need_weights)
        if self.max_length is None or mask.kv_length <= self.max_length:
            return
        last = row_positions(mask, self.position + self.num_pending + k_BGKD.shape[2] - 1, 1).max()
        if torch.compiler.is_compiling():
            torch._assert_async(last < self.max_length, "feature_map='cosformer' got more tokens than its max_length")
        else:
            check_length(int(last) + 1, self.max_length)

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.tensors["k"], self.tensors["v"]) if self.tensors else super().like()


def _empty(name: str) -> float:
    return MASKED_SCORE if name.endswith("max") else 0.0


def chunked_prefill(attend: AttendChunk, q_BHQD: torch.Tensor, *of_keys: torch.Tensor) -> torch.Tensor:
    """Apply ``attend`` to a chunk of queries after another; the first also gets the tokens that have no queries."""
    queries, before = q_BHQD.shape[2], of_keys[0].shape[2] - q_BHQD.shape[2]
    if queries <= PREFILL_CHUNK:
        return attend(q_BHQD, *of_keys)
    outs = []
    for low in range(0, queries, PREFILL_CHUNK):
        own, new = slice(low, low + PREFILL_CHUNK), slice(before + low if low else 0, before + low + PREFILL_CHUNK)
        outs.append(attend(q_BHQD[:, :, own], *(x[:, :, new] for x in of_keys)).transpose(1, 2))
    return torch.cat(outs, dim=1).transpose(1, 2)
