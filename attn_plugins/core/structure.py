"""Structures of tokens that are no plain text: graphs, tables, trees, documents with sections. Masks as data.

A structure says which tokens a token sees. It goes into a model beside its other inputs (``structure=``), becomes part
of every mask of self-attention there, and is never made N x N.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch

from attn_plugins.core.relations import NO_LABEL, Edges, Groups, Relation, stacked, within

Integers: TypeAlias = torch.Tensor | Sequence[Any] | Any
"""Whatever torch.as_tensor makes a tensor of whole numbers of."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Who sees whom in each row of a batch: the union of a few relations.

    Made by :meth:`graph`, :meth:`blocks`, :meth:`table`, :meth:`table_from_tapas`, :meth:`tree`, :meth:`sections` and
    :meth:`dense`, each for one row; ``a | b`` shows what either shows, :meth:`stack` makes a batch of rows.

    It needs memory for a few integers a token and an edge. To ask whether a pair is visible takes a look at a few
    tables, and O(log degree) for edges. Its tables stay on the CPU, where it is made, with copies where they are used.

    Pairs have labels, for biases that are learned a label. Of several relations that show a pair the lowest label
    holds, that of edges last; pairs with a global token of ``num_global`` have none, whatever else shows them.
    """

    relations: tuple[Relation, ...]
    num_tokens: int
    """N, tokens of a row, padding among them."""

    def __post_init__(self):
        # What was made of it: copies on other devices, tables. It is no field: FSDP's mixed precision makes dataclasses
        # among the inputs anew of their fields.
        self.held: dict[Hashable, Any]
        object.__setattr__(self, "held", {})
        edges = [one for one in self.relations if isinstance(one, Edges)]
        if len(edges) > 1:
            raise ValueError("a structure has one list of edges; put those of both into one")
        groups = [one for one in self.relations if isinstance(one, Groups)]
        object.__setattr__(self, "relations", (*sorted(groups, key=lambda one: one.label), *edges))

    @staticmethod
    def graph(
        edges: Integers,
        num_nodes: int,
        *,
        edge_labels: Integers | None = None,
        directed: bool = False,
        max_distance: int = 1,
        num_global: int = 0,
    ) -> "Structure":
        """Nodes see themselves and their neighbours.

        Args:
            edges: (E, 2) nodes by number: of (i, j), j sees i, as messages go from i to j, and i sees j unless
                ``directed``.
            num_nodes: nodes are tokens, in their order.
            edge_labels: (E,) labels from 1 on, 0 is a node with itself. Without them the label of a pair is the length
                of its shortest path.
            directed: edges count in one direction.
            max_distance: nodes within this many steps are seen.
            num_global: tokens before the nodes that see all and are seen by all, such as [CLS].

        Raises:
            ValueError: an edge names no node, or labels and edges don't fit.
        """
        edges_E2 = _integers("edges", edges)
        edges_E2 = edges_E2.reshape(-1, 2) if edges_E2.numel() == 0 else edges_E2
        if edges_E2.ndim != 2 or edges_E2.shape[1] != 2:
            raise ValueError(f"edges is of shape {tuple(edges_E2.shape)}; allowed: (E, 2), pairs of nodes")
        if edges_E2.numel() and not (int(edges_E2.min()) >= 0 and int(edges_E2.max()) < num_nodes):
            low, high = int(edges_E2.min()), int(edges_E2.max())
            raise ValueError(f"edges has nodes from {low} to {high}; allowed: 0 to {num_nodes - 1}")
        if max_distance < 1:
            raise ValueError(f"max_distance={max_distance}; allowed: an integer from 1 on")
        k_E, q_E = edges_E2[:, 0], edges_E2[:, 1]
        labels_E = torch.ones_like(q_E)
        if edge_labels is not None:
            labels_E = _integers("edge_labels", edge_labels)
            if labels_E.shape != q_E.shape or (labels_E.numel() and int(labels_E.min()) < 1):
                raise ValueError(
                    f"edge_labels is of shape {tuple(labels_E.shape)}, its least is "
                    f"{int(labels_E.min()) if labels_E.numel() else None}; allowed: ({len(q_E)},), from 1 on"
                )
            if max_distance > 1:
                raise ValueError(f"edge_labels label edges, and max_distance={max_distance} shows paths; leave one")
        if not directed:
            q_E, k_E, labels_E = torch.cat([q_E, k_E]), torch.cat([k_E, q_E]), labels_E.repeat(2)
        if max_distance > 1:
            q_E, k_E, labels_E = within(q_E, k_E, num_nodes, max_distance)
        node_N = torch.arange(num_nodes, device="cpu")
        q_E, k_E = torch.cat([node_N, q_E]), torch.cat([node_N, k_E])
        labels_E = torch.cat([torch.zeros_like(node_N), labels_E])
        return Structure((Edges.of(q_E, k_E, labels_E, num_nodes),), num_nodes).with_global(num_global)

    @staticmethod
    def blocks(block_ids: Integers, *, num_global: int = 0) -> "Structure":
        """Tokens see those of their own block.

        Args:
            block_ids: (N,) the block of each token, which need not stand together; -1 is none, for tokens that see
                nothing and are not seen.
            num_global: as in :meth:`graph`.
        """
        ids_N = _of_tokens("block_ids", block_ids)
        return Structure((_groups(ids_N, ids_N, label=0),), len(ids_N)).with_global(num_global)

    @staticmethod
    def dense(num_tokens: int) -> "Structure":
        """All tokens see all: of a row without a structure in a batch of others."""
        return Structure.blocks(torch.zeros(num_tokens, dtype=torch.long, device="cpu"))

    @staticmethod
    def table(rows: Integers, columns: Integers, headers: Integers | None = None) -> "Structure":
        """A cell sees its row, its column, all headers and the question; the question sees all, and headers each other.

        As in TaBERT (Yin et al. 2020, arXiv:2005.08314) and MATE (Eisenschlos et al. 2021, arXiv:2109.04312), with all
        heads alike. Labels: 0 for pairs with the question, 1 in a row, 2 in a column, 3 for headers.

        Args:
            rows, columns: (N,) numbers of the row and the column that a token is in; -1 in both is the question, and
                whatever else is not of the table, such as [CLS] and [SEP].
            headers: (N,) True for tokens of column headers, or None where there are none.
        """
        rows_N, columns_N = _of_tokens("rows", rows), _of_tokens("columns", columns)
        headers_N = torch.zeros_like(rows_N, dtype=torch.bool)
        if headers is not None:
            headers_N = torch.as_tensor(headers, device="cpu").bool()
        if not rows_N.shape == columns_N.shape == headers_N.shape:
            sizes = ", ".join(str(tuple(x.shape)) for x in (rows_N, columns_N, headers_N))
            raise ValueError(f"rows, columns and headers are of shapes {sizes}; allowed: (N,) for all")
        question_N = (rows_N < 0) & (columns_N < 0) & ~headers_N
        relations = [
            *_global(question_N, torch.ones_like(question_N), label=0),
            _groups(rows_N, rows_N, label=1),
            _groups(columns_N, columns_N, label=2),
            _groups(torch.zeros_like(rows_N), torch.where(headers_N, 0, -1), label=3),
        ]
        return Structure(tuple(relations), len(rows_N))

    @staticmethod
    def table_from_tapas(token_type_ids: Integers, attention_mask: Integers | None = None) -> "Structure":
        """:meth:`table` of TAPAS's token types (Herzig et al. 2020, arXiv:2004.02349), as its tokenizer makes them.

        Args:
            token_type_ids: (N, 7) or (B, N, 7): segment (0 is the question), column and row from 1 on, where row 0 is
                the header, and four more.
            attention_mask: (N,) or (B, N), 0 for padding, which else looks like a part of the question, and costs as
                much. The mask of the model hides it as a key in any case.
        """
        types = _integers("token_type_ids", token_type_ids)
        if types.ndim not in (2, 3) or types.shape[-1] < 3:
            raise ValueError(f"token_type_ids is of shape {tuple(types.shape)}; allowed: (N, 7) or (B, N, 7)")
        types_BNT = types if types.ndim == 3 else types.unsqueeze(0)
        real_BN = torch.ones_like(types_BNT[..., 0])
        if attention_mask is not None:
            real_BN = torch.as_tensor(attention_mask, device="cpu")
        real_BN = real_BN.bool().reshape(-1, real_BN.shape[-1])
        if real_BN.shape != types_BNT.shape[:2]:
            raise ValueError(
                f"attention_mask is of shape {tuple(real_BN.shape)} beside token_type_ids {tuple(types.shape)}; "
                f"allowed: {tuple(types_BNT.shape[:2])}"
            )
        made = []
        for types_NT, real_N in zip(types_BNT, real_BN, strict=True):
            cell_N = (types_NT[:, 0] > 0) & (types_NT[:, 1] > 0)
            rows_N, columns_N = (torch.where(cell_N, types_NT[:, kind], -1) for kind in (2, 1))
            made.append(Structure.table(rows_N, columns_N, cell_N & (rows_N == 0))._only(real_N))
        return Structure.stack(made)

    @staticmethod
    def tree(
        parents: Integers,
        *,
        ancestors: int | None = None,
        descendants: int | None = 1,
        siblings: bool = True,
        num_global: int = 0,
    ) -> "Structure":
        """Nodes of trees see themselves, nodes above and below them, and their siblings.

        Labels: 0 for itself, 1 for an ancestor, 2 for a descendant, 3 for a sibling.

        Args:
            parents: (N,) the parent of each node, -1 for a root.
            ancestors: how many levels above are seen; None is all up to the root.
            descendants: how many levels below are seen; None is all.
            siblings: whether nodes of one parent see each other. Roots have none.
            num_global: as in :meth:`graph`.

        Raises:
            ValueError: a parent is no node, or a node is above itself.
        """
        parents_N = _of_tokens("parents", parents)
        number = len(parents_N)
        if number and not (int(parents_N.min()) >= -1 and int(parents_N.max()) < number):
            low, high = int(parents_N.min()), int(parents_N.max())
            raise ValueError(f"parents has {low} to {high}; allowed: -1 for a root, or 0 to {number - 1}")
        for name, levels in (("ancestors", ancestors), ("descendants", descendants)):
            if levels is not None and levels < 0:
                raise ValueError(f"{name}={levels}; allowed: None or an integer from 0 on")
        node_N = torch.arange(number, device="cpu")
        pairs = [(node_N, node_N, torch.zeros_like(node_N))]
        node, above, level = node_N, parents_N, 1
        while len(node := node[above >= 0]):
            if level > number:
                raise ValueError(f"parents has a circle that node {int(node[0])} leads to; allowed: trees")
            above = above[above >= 0]
            if ancestors is None or level <= ancestors:
                pairs.append((node, above, torch.ones_like(node)))
            if descendants is None or level <= descendants:
                pairs.append((above, node, torch.full_like(node, 2)))
            above, level = parents_N[above], level + 1
        q_E, k_E, labels_E = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        relations: list[Relation] = [Edges.of(q_E, k_E, labels_E, number)]
        if siblings:
            relations.append(replace(_groups(parents_N, parents_N, label=3), itself=False))
        return Structure(tuple(relations), number).with_global(num_global)

    @staticmethod
    def sections(
        section_ids: Integers,
        *,
        window_size: int | None = None,
        section_tokens: Integers | Literal["first"] | None = "first",
        num_global: int = 0,
    ) -> "Structure":
        """Tokens see a window in their section and the tokens that stand for sections; these see each other and all of
        their own section.

        As in ETC (Ainslie et al. 2020, arXiv:2004.08483), whose global tokens stand beside the text; here they are in
        it. Labels: 0 in a section, 1 for section tokens.

        Args:
            section_ids: (N,) the section of each token; -1 is none.
            window_size: tokens to either side that are seen, the query itself among them; None is the whole section.
            section_tokens: (N,) True for tokens that stand for their section; "first" is the first token of each.
            num_global: as in :meth:`graph`.
        """
        ids_N = _of_tokens("section_ids", section_ids)
        if window_size is not None and window_size < 1:
            raise ValueError(f"window_size={window_size}; allowed: None or an integer from 1 on")
        standing_N = torch.zeros_like(ids_N, dtype=torch.bool)
        if isinstance(section_tokens, str):
            if section_tokens != "first":
                raise ValueError(f"section_tokens={section_tokens!r}; allowed: 'first', None, or (N,) booleans")
            standing_N = _first_of_each(ids_N)
        elif section_tokens is not None:
            standing_N = torch.as_tensor(section_tokens, device="cpu").bool()
            if standing_N.shape != ids_N.shape:
                raise ValueError(f"section_tokens is of shape {tuple(standing_N.shape)}; allowed: {tuple(ids_N.shape)}")
        standing_N = standing_N & (ids_N >= 0)
        relations = [replace(_groups(ids_N, ids_N, label=0), window_size=window_size)]
        if window_size is not None:
            relations.append(_groups(torch.where(standing_N, ids_N, -1), ids_N, label=0))
        relations.append(_groups(torch.where(ids_N >= 0, 0, -1), torch.where(standing_N, 0, -1), label=1))
        return Structure(tuple(relations), len(ids_N)).with_global(num_global)

    @staticmethod
    def stack(
        structures: Iterable["Structure"],
        num_tokens: int | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> "Structure":
        """One structure of a batch. Padding sees nothing and is not seen.

        Args:
            structures: of one row, or several, each.
            num_tokens: N of the batch; None is that of the longest.
            padding_side: where shorter rows are padded.

        Raises:
            ValueError: there is none, or one is longer than ``num_tokens``.
        """
        rows = [row for one in structures for row in one.rows()]
        if not rows:
            raise ValueError("got no structure to stack; allowed: one or more")
        longest = max(row.num_tokens for row in rows)
        length = longest if num_tokens is None else num_tokens
        if longest > length:
            raise ValueError(f"num_tokens={num_tokens}; allowed: {longest} or more, of the longest structure")
        rows = [row.pad(length, padding_side) for row in rows]
        kinds: dict[Hashable, list[Any]] = {}
        for number, row in enumerate(rows):
            seen: dict[Hashable, int] = {}
            for one in row.relations:
                kind = ("edges",) if isinstance(one, Edges) else (one.label, one.window_size, one.itself)
                seen[kind] = seen.get(kind, 0) + 1
                kinds.setdefault((*kind, seen[kind]), [None] * len(rows))[number] = one
        return Structure(tuple(stacked(found, length) for found in kinds.values()), length)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return max((len(one.k_BN if isinstance(one, Groups) else one.starts_BN) for one in self.relations), default=1)

    @property
    def device(self) -> torch.device:
        first = next(iter(self.relations), None)
        if first is None:
            return torch.device("cpu")
        return first.q_BN.device if isinstance(first, Groups) else first.starts_BN.device

    @property
    def kind(self) -> Hashable:
        """What code that asks it depends on, beside tensors."""
        return tuple((type(one).__name__, one.kind) for one in self.relations)

    @property
    def num_labels(self) -> int:
        """One more than its highest label."""
        return max((one.most_labels() for one in self.host.relations), default=0)

    @property
    def num_pairs(self) -> int:
        """How many pairs are visible at most, in all rows: pairs of several relations count in each."""
        return sum(one.number_of_pairs() for one in self.host.relations)

    @property
    def host(self) -> "Structure":
        """Itself on the CPU."""
        return self.held.get("host", self)

    def __repr__(self) -> str:
        return f"Structure({self.batch_size} x {self.num_tokens} tokens, {self.num_pairs} pairs)"

    def __len__(self) -> int:
        return self.batch_size

    def __or__(self, other: "Structure") -> "Structure":
        """What either shows."""
        if not isinstance(other, Structure):
            return NotImplemented
        if (self.batch_size, self.num_tokens) != (other.batch_size, other.num_tokens):
            raise ValueError(f"{self!r} | {other!r}; allowed: two of the same size")
        return Structure((*self.host.relations, *other.host.relations), self.num_tokens)

    def to(self, device: Any, *args: Any, **kwargs: Any) -> "Structure":
        """Its tables on a device, or itself."""
        if not isinstance(device, (torch.device, str, int)) or torch.device(device) == self.device:
            return self
        device = torch.device(device)
        copies = self.host.held
        if device.type == "cpu":
            return self.host
        if device not in copies:
            moved = Structure(tuple(one.mapped(lambda t: t.to(device)) for one in self.host.relations), self.num_tokens)
            moved.held["host"] = self.host
            copies[device] = moved
        return copies[device]

    def cached(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """Memoise what follows from it alone, on its device."""
        if key not in self.held:
            self.held[key] = compute()
        return self.held[key]

    def rows(self) -> list["Structure"]:
        """A structure of each row."""
        if self.batch_size == 1:
            return [self.host]
        return [
            Structure(
                tuple(one.mapped(lambda t, n=n: t[min(n, len(t) - 1)][None]) for one in self.host.relations),  # type: ignore[misc]
                self.num_tokens,
            )
            for n in range(self.batch_size)
        ]

    def with_global(self, number: int) -> "Structure":
        """With so many tokens before its own that see all tokens and are seen by all, such as [CLS]."""
        if number < 0:
            raise ValueError(f"num_global={number}; allowed: an integer from 0 on")
        if not number:
            return self
        padded = self.pad(self.num_tokens + number, "left")
        first_N = torch.arange(padded.num_tokens, device="cpu") < number
        return replace(padded, relations=(*_global(first_N, torch.ones_like(first_N)), *padded.relations))

    def pad(self, num_tokens: int, side: Literal["left", "right"] = "right") -> "Structure":
        """Of that many tokens, of which those added see nothing and are not seen."""
        missing = num_tokens - self.num_tokens
        if missing < 0:
            raise ValueError(f"cannot pad {self!r} to {num_tokens} tokens; allowed: {self.num_tokens} or more")
        if side not in ("left", "right"):
            raise ValueError(f"padding side {side!r}; allowed: 'left', 'right'")
        around = (missing, 0) if side == "left" else (0, missing)
        return Structure(tuple(one.padded(*around) for one in self.host.relations), num_tokens) if missing else self

    def shows(self, reader: Any, q: Any, k: Any) -> Any:
        """Whether queries see keys, for positions in 0..N-1 that broadcast.

        Args:
            reader: as in :mod:`attn_plugins.core.relations`.
        """
        first, *others = self.relations
        seen = first.shows(reader, q, k)
        for one in others:
            seen = seen | one.shows(reader, q, k)
        return seen

    def labels(self, reader: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The label of each pair, -1 for pairs that have none or are not visible."""
        label: torch.Tensor = torch.full((), NO_LABEL, device=q.device)
        for one in reversed(self.relations):
            label = torch.where(one.shows(reader, q, k), one.labels_of(reader, q, k), label)
        return label

    def _only(self, real_N: torch.Tensor) -> "Structure":
        """Without tokens that are not real, of groups in one row."""
        return replace(
            self,
            relations=tuple(one.mapped(lambda t: t.masked_fill(~real_N, -1)) for one in self.relations),
        )


def is_structure(given: Any) -> bool:
    """Whether that is a structure, or one for each row."""
    if isinstance(given, (list, tuple)):
        return len(given) > 0 and all(isinstance(one, Structure) for one in given)
    return isinstance(given, Structure)


def structure_of(given: Any) -> Structure:
    """What a caller gave as ``structure=``: one, or one for each row, to be stacked.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(given, Structure):
        return given
    if is_structure(given):
        return Structure.stack(given)
    if isinstance(given, (list, tuple)):
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in given)) or "nothing"
        raise ValueError(
            f"structure is a {type(given).__name__} of {kinds}; allowed: an attn_plugins.Structure, or a list of them, "
            "one a row (Structure.dense of a row that has none)"
        )
    raise ValueError(
        f"structure is a {type(given).__name__}; allowed: an attn_plugins.Structure, or a list of them, one a row"
    )


def _groups(q_N: torch.Tensor, k_N: torch.Tensor, *, label: int) -> Groups:
    return Groups(q_N.clamp(min=-1)[None], k_N.clamp(min=-1)[None], label)


def _global(token_N: torch.Tensor, all_N: torch.Tensor, label: int = NO_LABEL) -> list[Relation]:
    """Tokens that are seen by all, and that see all."""
    token, every = torch.where(token_N, 0, -1), torch.where(all_N, 0, -1)
    return [_groups(every, token, label=label), _groups(token, every, label=label)]


def _first_of_each(ids_N: torch.Tensor) -> torch.Tensor:
    order = ids_N.argsort(stable=True)
    new = torch.ones_like(ids_N, dtype=torch.bool)
    new[1:] = ids_N[order][1:] != ids_N[order][:-1]
    return torch.zeros_like(new).scatter(0, order, new)


def _integers(name: str, given: Integers) -> torch.Tensor:
    tensor = torch.as_tensor(given, device="cpu").detach()
    if tensor.is_floating_point() and tensor.numel():
        raise ValueError(f"{name} is of dtype {tensor.dtype}; allowed: whole numbers")
    return tensor.long()


def _of_tokens(name: str, given: Integers) -> torch.Tensor:
    tensor = _integers(name, given)
    if tensor.ndim != 1:
        raise ValueError(f"{name} is of shape {tuple(tensor.shape)}; allowed: (N,), a number for each token")
    return tensor
