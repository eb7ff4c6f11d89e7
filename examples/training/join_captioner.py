"""Make a captioner of two pretrained models: an encoder of pictures, and a decoder of text that attends to them.

    python examples/training/join_captioner.py --encoder facebook/dinov2-small --decoder openai-community/gpt2 \\
        --out models/captioner
    attn-plugins finetune --config configs/train/captioning.yaml --model models/captioner

The decoder is of a family that has cross-attention, such as GPT-2, BERT or RoBERTa; its layers of cross-attention are
new, and of a BERT without one its head, so that the whole has to be trained before it says anything.
"""

import argparse

import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, help="a folder or a name on the hub: ViT, DINOv2, Swin, ...")
    parser.add_argument("--decoder", required=True, help="a folder or a name on the hub: GPT-2, BERT, RoBERTa, ...")
    parser.add_argument("--out", required=True, help="folder of the captioner")
    parser.add_argument("--image-size", type=int, help="pixels that pictures get; default: the image processor's")
    args = parser.parse_args()

    encoder = transformers.AutoModel.from_pretrained(args.encoder)
    config = transformers.AutoConfig.from_pretrained(args.decoder)
    config.is_decoder = config.add_cross_attention = True
    decoder = transformers.AutoModelForCausalLM.from_pretrained(args.decoder, config=config)
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.decoder)
    if args.image_size:
        sides = {"height": args.image_size, "width": args.image_size}
        images = AutoImageProcessor.from_pretrained(args.encoder, size=sides, crop_size=sides)
    else:
        images = AutoImageProcessor.from_pretrained(args.encoder)

    # GPT-2 has one special token for everything; of BERT a text stands between [CLS] and [SEP].
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for config in (model.config, model.config.decoder, model.generation_config):
        for name, number in {**ids, "decoder_start_token_id": start}.items():
            setattr(config, name, number)

    model.save_pretrained(args.out)
    transformers.TrOCRProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(args.out)
    trained = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {type(model.encoder).__name__} + {type(model.decoder).__name__}, {trained:,} parameters")


if __name__ == "__main__":
    main()
