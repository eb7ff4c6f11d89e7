"""What the chunks of linear attention add to a state, and what was brought to them.

Letters: P (row of the batch, key/value head) pairs, N chunks.
"""

import torch


def sums_by_chunk(
    x: torch.Tensor, y: torch.Tensor, brought: torch.Tensor | None, link: torch.Tensor, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be added up at each place: x^T y of each chunk, and what was brought from the block before or after.

    Args:
        x, y: (P N, rows, F) and (P N, rows, V + 1).
        brought: (P, F, V + 1) or None.
        link: (P, N + 1, N + 1).
        end: the place of what was brought, 0 or -1; the other places are the chunks.

    Returns:
        (columns of ``link``, (P, as many, F (V + 1)) to be multiplied with them).
    """
    pairs, places, _ = link.shape
    chunks = slice(1, None) if end == 0 else slice(0, -1)
    if brought is None:
        return link[:, :, chunks], torch.bmm(x.mT, y).view(pairs, places - 1, -1)
    s = x.new_empty(pairs, places, x.shape[2], y.shape[2])
    s[:, end] = brought
    if pairs == 1:
        torch.bmm(x.mT, y, out=s[0, chunks])
    else:
        s[:, chunks] = torch.bmm(x.mT, y).view(pairs, places - 1, *s.shape[2:])
    return link, s.flatten(2)
