"""Which community is a node of? A BERT whose tokens are the nodes of a graph, by what its attention sees.

    python examples/structures/nodes.py
    python examples/structures/nodes.py --nodes 4000 --steps 40

The graph is drawn from a stochastic block model, as citation graphs are clustered: most edges lie within a class, and
a node's own features say little of it. A tenth of the nodes has labels. Attention to all pairs, to neighbours, and to
nodes within two steps with a bias a distance (Graphormer's spatial encoding) learn from the same start.
"""

import argparse
import time

import torch
from torch import nn
from transformers import BertConfig, BertModel

import attn_plugins as ap

FEATURES = 16


def draw(nodes: int, classes: int, seed: int = 0, degree: int = 8, within: float = 0.85, signal: float = 0.5):
    """(edges (E, 2), features (N, FEATURES), classes (N,)) of a stochastic block model."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.randint(classes, (nodes,), generator=generator)
    members = [(label_N == one).nonzero().flatten() for one in range(classes)]
    first_E = torch.randint(nodes, (nodes * degree // 2,), generator=generator)
    second_E = torch.randint(nodes, first_E.shape, generator=generator)
    inside_E = torch.rand(first_E.shape, generator=generator) < within
    for edge in inside_E.nonzero().flatten().tolist():
        own = members[int(label_N[first_E[edge]])]
        second_E[edge] = own[int(second_E[edge]) % len(own)]
    features = torch.randn(nodes, FEATURES, generator=generator)
    features[:, :classes] += signal * nn.functional.one_hot(label_N, classes)
    return torch.stack([first_E, second_E], dim=1), features, label_N


class NodeClassifier(nn.Module):
    """A BERT over nodes, which have no order: all are at position 0."""

    def __init__(self, classes: int, rule: dict | None):
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0}
        torch.manual_seed(0)
        self.embed = nn.Linear(FEATURES, 64)
        self.bert = BertModel(BertConfig(vocab_size=2, **sizes, **dropout), add_pooling_layer=False)
        self.classify = nn.Linear(64, classes)
        if rule is not None:
            ap.swap_attention(self.bert, rule)

    def forward(self, features: torch.Tensor, structure: ap.Structure | None) -> torch.Tensor:
        positions = torch.zeros(1, len(features), dtype=torch.long)
        beside = {} if structure is None else {"structure": structure}
        nodes = self.bert(inputs_embeds=self.embed(features)[None], position_ids=positions, **beside)
        return self.classify(nodes.last_hidden_state[0])


def learn(model: NodeClassifier, features, label_N, structure, steps: int) -> tuple[float, float]:
    """(Accuracy on nodes without labels in training, seconds of a step)."""
    generator = torch.Generator().manual_seed(1)
    known = torch.rand(len(label_N), generator=generator) < 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        loss = nn.functional.cross_entropy(model(features, structure)[known], label_N[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    with torch.no_grad():
        right = model.eval()(features, structure).argmax(dim=1) == label_N
    return right[~known].float().mean().item(), sorted(seconds)[len(seconds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    edges, features, label_N = draw(args.nodes, args.classes)
    near = ap.Structure.graph(edges, args.nodes)
    far = ap.Structure.graph(edges, args.nodes, max_distance=2)
    rows = {
        "all pairs, the model's own": (None, None),
        "neighbours": ({"type": "graph", "required": True}, near),
        "two steps, a bias a distance": ({"type": "graph", "required": True, "num_labels": 3}, far),
    }
    print("| attention | pairs | accuracy | seconds a step |\n|---|---|---|---|")
    for name, (rule, structure) in rows.items():
        accuracy, seconds = learn(NodeClassifier(args.classes, rule), features, label_N, structure, args.steps)
        pairs = args.nodes**2 if structure is None else structure.num_pairs
        print(f"| {name} | {pairs:,} | {accuracy:.1%} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
