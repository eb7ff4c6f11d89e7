"""Questions about tables, by TAPAS whose cells see their row, their column, the headers and the question.

    python examples/structures/table_questions.py
    python examples/structures/table_questions.py --rows 200

A row and a column carry the word that the question asks for, in the first cell and in the header; the answer is the
cell where they meet. A small TapasForQuestionAnswering learns from scratch to select it: with the structure that its
token types tell (Structure.table_from_tapas) and a bias for each relation, and with its own dense attention, which has
to learn from embeddings of rows and columns what belongs together. Then both read one large table, on one thread.
"""

import argparse
import time

import torch
from transformers import TapasConfig, TapasForQuestionAnswering

import attn_plugins as ap

QUESTION = 2  # [CLS] and the word that is asked for
ASKED = 1
WORDS = 40


def table(rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tokens, types as TAPAS's tokenizer makes them, and labels, of one question about one table."""
    cells = 2 + torch.randint(WORDS, (rows + 1, columns), generator=generator)
    row, column = (1 + int(torch.randint(most - 1, (), generator=generator)) for most in (rows + 1, columns))
    cells[row, 0] = cells[0, column] = ASKED
    ids = torch.cat([torch.tensor([0, ASKED]), cells.flatten()])
    types = torch.zeros(len(ids), 7, dtype=torch.long)
    places = torch.cartesian_prod(torch.arange(rows + 1), torch.arange(1, columns + 1))
    types[QUESTION:, 0], types[QUESTION:, 1], types[QUESTION:, 2] = 1, places[:, 1], places[:, 0]
    labels = torch.zeros(len(ids), dtype=torch.long)
    labels[QUESTION + row * columns + column] = 1
    return {"input_ids": ids, "token_type_ids": types, "labels": labels}


def batch(number: int, rows: int, columns: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = [table(rows, columns, generator) for _ in range(number)]
    return {name: torch.stack([one[name] for one in made]) for name in made[0]}


def model_of(rule: dict | None, longest: int) -> TapasForQuestionAnswering:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = TapasConfig(
        vocab_size=2 + WORDS, max_position_embeddings=longest, type_vocab_sizes=[3, 256, 256, 2, 256, 256, 10],
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_num_rows=256, **sizes,
    )  # fmt: skip
    model = TapasForQuestionAnswering(config)
    if rule is not None:
        ap.swap_attention(model, rule)
    return model


def asked(model: TapasForQuestionAnswering, given: dict[str, torch.Tensor], structured: bool):
    """What the model says; rows of a batch have tables of the same shape, so one structure serves all."""
    beside = {"structure": ap.Structure.table_from_tapas(given["token_type_ids"][:1])} if structured else {}
    return model(**given, **beside)


def learn(model: TapasForQuestionAnswering, structured: bool, steps: int, sizes: tuple[int, int]) -> float:
    """Share of new questions whose cell is selected."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 30)
        given = batch(32, *sizes, generator)
        loss = asked(model, given, structured).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        given = batch(256, *sizes, torch.Generator().manual_seed(1))
        chosen = asked(model.eval(), given, structured).logits.argmax(dim=1)
    return (chosen == given["labels"].argmax(dim=1)).float().mean().item()


def read(model: TapasForQuestionAnswering, structured: bool, given: dict[str, torch.Tensor]) -> float:
    """Seconds to read one large table, the best of two."""
    best = float("inf")
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            asked(model, given, structured)
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=200, help="of the large table (default %(default)s, 255 at most)")
    parser.add_argument("--columns", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    longest = QUESTION + (args.rows + 1) * args.columns
    large = batch(1, args.rows, args.columns, torch.Generator().manual_seed(2))
    print(f"| attention | questions right | {longest} tokens, s |\n|---|---|---|")
    ours = {"type": "graph", "num_labels": 4, "required": True}
    for name, rule in (("rows, columns, headers, question", ours), ("all pairs, the model's own", None)):
        model = model_of(rule, max(longest, 512))
        right = learn(model, rule is not None, args.steps, (4, 4))
        print(f"| {name} | {right:.1%} | {read(model, rule is not None, large):.2f} |", flush=True)


if __name__ == "__main__":
    main()
