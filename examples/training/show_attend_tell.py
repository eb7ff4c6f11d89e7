"""Captions of pictures by an LSTM that looks at their patches at each word (Xu et al. 2015, arXiv:1502.03044).

    python examples/training/show_attend_tell.py --encoder facebook/dinov2-small --data data/captions \\
        --out runs/captions --attention none --attention softmax --attention additive --seed 0 --seed 1 --seed 2

The encoder of pictures is frozen, so that each picture is encoded once. The decoder is a `recurrent_decoder` whose
state asks for the patches that the next word is of, by any attention with cross-attention; `none` has the mean of the
patches for its first state and no more. With `--place bahdanau` the state before a word asks, as in the paper, a step
at a time; with `luong`, which is the default and many times faster, the state after it.

The data are train.jsonl and validation.jsonl with the path of a picture (`image`) and its caption (`caption`).
OUT/results.jsonl gets a line for each run, and each has a folder that `attn-plugins evaluate --task captioning` takes.
`--look PICTURE` draws into it where the model looks at each word.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from PIL import Image
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import attn_plugins as ap
from attn_plugins.data.pictures import rgb
from attn_plugins.inspection.overlays import caption, seen
from attn_plugins.tasks.captioning import METRICS
from attn_plugins.tasks.metrics import compute_metrics

BATCH, LENGTH = 32, 24
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def rows_of(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf8").splitlines()]


def tokenizer_of(captions: list[str], size: int) -> Any:
    """Pieces of words that are frequent in these captions."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = list(SPECIAL.values())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(captions, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL)


def labels_of(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """(captions, tokens): each with its end, -100 where it is over."""
    ids = tokenizer(captions, truncation=True, max_length=LENGTH - 1)["input_ids"]
    rows = [torch.tensor([*one, tokenizer.eos_token_id]) for one in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


@torch.no_grad()
def encoded(encoder: Any, images: Any, folder: Path, rows: list[dict[str, str]]) -> torch.Tensor:
    """(rows, tokens, size): what the encoder makes of each picture."""
    found = []
    for start in range(0, len(rows), BATCH):
        pictures = [rgb({"path": str(folder / row["image"]), "bytes": None}) for row in rows[start : start + BATCH]]
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        found.append(encoder(pixels, interpolate_pos_encoding=True).last_hidden_state)
    return torch.cat(found)


def captioner(encoder: Any, tokenizer: Any, attention: str, place: str, sizes: dict[str, Any]) -> Any:
    """The encoder with a new decoder, whose cross-attention is of this name."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.AutoConfig.for_model(
        "recurrent_decoder",
        vocab_size=len(tokenizer),
        attention="none" if attention == "none" else place,
        cross_attention_hidden_size=encoder.config.hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        **ids,
        **sizes,
    )
    decoder = transformers.AutoModelForCausalLM.from_config(config)
    model: Any = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for one in (model.config, model.generation_config):
        for name, number in {**ids, "decoder_start_token_id": tokenizer.bos_token_id}.items():
            setattr(one, name, number)
    return model if attention == "none" else ap.swap_attention(model, attention, roles=["cross"])


def train(model: Any, memory: torch.Tensor, labels: torch.Tensor, *, epochs: int, rate: float) -> list[float]:
    """Mean losses of the epochs."""
    steps = epochs * -(-len(labels) // BATCH)
    learned = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    model.decoder.train()
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(labels)).split(BATCH):
            most = int((labels[batch] != -100).sum(dim=1).max())
            given = {"encoder_outputs": BaseModelOutput(memory[batch]), "labels": labels[batch, :most]}
            loss = model(**given, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(labels))
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model: Any, memory: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the tokens of captions that were not trained on."""
    total, tokens = 0.0, 0
    for states, wanted in zip(memory.split(BATCH), labels.split(BATCH), strict=True):
        number = int((wanted != -100).sum())
        out = model(encoder_outputs=BaseModelOutput(states), labels=wanted, use_cache=False)
        total, tokens = total + float(out.loss) * number, tokens + number
    return total / tokens


@torch.no_grad()
def written(model: Any, tokenizer: Any, memory: torch.Tensor) -> list[str]:
    found = []
    for part in memory.split(BATCH):
        ids = model.generate(encoder_outputs=BaseModelOutput(part), max_new_tokens=LENGTH, do_sample=False, num_beams=1)
        found += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return found


@torch.no_grad()
def look(model: Any, tokenizer: Any, images: Any, paths: list[Path], file: Path) -> None:
    """A picture of where a model looks at each word that it writes, one caption below the other."""
    panels = []
    for path in paths:
        pixels = images([rgb({"path": str(path), "bytes": None})], return_tensors="pt")["pixel_values"]
        ids = model.generate(pixel_values=pixels, max_new_tokens=LENGTH, do_sample=False, num_beams=1)
        out = model(pixel_values=pixels, decoder_input_ids=ids[:, :-1], output_attentions=True)
        words = [tokenizer.decode([number]) for number in ids[0, 1:].tolist()]
        said = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        shares = {"where it looks": out.cross_attentions[-1][0].mean(dim=0)}
        drawn, figure = io.BytesIO(), caption(shares, seen(model, images, pixels), words, f"{path.stem}: {said}")
        figure.savefig(drawn, dpi=70)
        panels.append(Image.open(drawn).convert("RGB"))
    whole = Image.new("RGB", (max(one.width for one in panels), sum(one.height for one in panels)), "white")
    for number, one in enumerate(panels):
        whole.paste(one, (0, sum(before.height for before in panels[:number])))
    whole.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="a folder or a name on the hub: DINOv2, ViT")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attention", action="append", required=True, help="none, or an attention by its name")
    parser.add_argument("--place", choices=("luong", "bahdanau"), default="luong", help="default: luong")
    parser.add_argument("--seed", action="append", type=int, help="default: 0")
    parser.add_argument("--image-size", type=int, default=168, help="pixels that pictures get; default: 168")
    parser.add_argument("--epochs", type=int, default=15, help="default: 15")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="default: 2e-3")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the LSTM; default: 256")
    parser.add_argument("--vocabulary", type=int, default=1000, help="tokens; default: 1000")
    parser.add_argument(
        "--look", action="append", type=Path, default=[], help="a picture, below the folder of the data"
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    encoder = transformers.AutoModel.from_pretrained(args.encoder).eval().requires_grad_(False)
    sides = {"height": args.image_size, "width": args.image_size}
    images = AutoImageProcessor.from_pretrained(args.encoder, size=sides, crop_size=sides)
    splits = {split: rows_of(args.data, split) for split in ("train", "validation")}
    held = args.out / f"encoded_{args.image_size}.pt"
    if not held.exists():
        torch.save({split: encoded(encoder, images, args.data, rows) for split, rows in splits.items()}, held)
    memory = torch.load(held)
    # A few features of its states are large, and new layers learn at one rate: each gets mean 0 and variance 1, in the
    # encoder's last norm, so that the model which is saved does the same.
    ratio, middle = 1 / memory["train"].std(dim=(0, 1)), memory["train"].mean(dim=(0, 1))
    memory = {split: (states - middle) * ratio for split, states in memory.items()}
    with torch.no_grad():
        encoder.layernorm.weight.mul_(ratio)
        encoder.layernorm.bias.sub_(middle).mul_(ratio)
    tokenizer = tokenizer_of([row["caption"] for row in splits["train"]], args.vocabulary)
    labels = {split: labels_of(tokenizer, [row["caption"] for row in rows]) for split, rows in splits.items()}
    wanted = [row["caption"] for row in splits["validation"]]

    for attention in args.attention:
        for seed in args.seed or [0]:
            torch.manual_seed(seed)
            model = captioner(
                encoder, tokenizer, attention, args.place, {"hidden_size": args.hidden_size, "dropout": 0.5}
            )
            start = time.perf_counter()
            losses = train(model, memory["train"], labels["train"], epochs=args.epochs, rate=args.learning_rate)
            seconds = time.perf_counter() - start
            held_out = held_out_loss(model, memory["validation"], labels["validation"])
            texts = written(model, tokenizer, memory["validation"])
            record = {
                "attention": attention,
                "seed": seed,
                "figures": {"loss": held_out, **compute_metrics(METRICS, texts, wanted)},
                "losses": losses,
                "seconds": round(seconds, 1),
                "settings": {
                    name: str(value) for name, value in vars(args).items() if name not in ("attention", "seed")
                },
                "torch": torch.__version__,
                "written": [
                    {"image": row["image"], "written": text, "caption": row["caption"]}
                    for row, text in zip(splits["validation"], texts, strict=True)
                ],
            }
            with open(args.out / "results.jsonl", "a", encoding="utf8") as file:
                file.write(json.dumps(record) + "\n")
            folder = args.out / f"{attention}-{seed}"
            model.save_pretrained(folder)
            transformers.TrOCRProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
            told = ", ".join(f"{name} {value:.3f}" for name, value in record["figures"].items())
            if args.look and attention != "none":
                look(model, tokenizer, images, [args.data / path for path in args.look], folder / "looks.png")
            print(f"{folder}: trained from {losses[0]:.2f} to {losses[-1]:.2f}, {told}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
