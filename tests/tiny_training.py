"""What a training of the filter takes, in little: an encoder, prompts, and a configuration of both."""

import json
import random
from pathlib import Path

import torch

from safety import dataset, fitting, train
from safety.calibrate import Bounds

BAD, GOOD = ("bomb", "poison", "malware"), ("bread", "garden", "music")


def tiny_encoder(folder: Path) -> Path:
    """A BERT of two layers of width 16 that knows the letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,:'"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{c}" for c in letters),
        *BAD,
        *GOOD,
        "how",
        "make",
        "write",
        "unused",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    out: list[dict[str, object]] = []
    for n in range(count):
        word = rng.choice(BAD if n % 2 else GOOD)
        text = f"{rng.choice(('how do i make', 'write about', 'tell me of'))} {word} number {rng.randrange(10**6)}"
        out.append({"text": text, "label": n % 2, **({"categories": ["code_abuse"]} if word == "malware" else {})})
    return out


def config(folder: Path, **changes: object) -> train.Config:
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows(400, 0)))
    pairs, requests, documents = folder / "pairs", folder / "requests.yaml", folder / "documents"
    pairs.mkdir()
    documents.mkdir()
    lines = [{"category": "code_abuse", "sensitive": f"make malware {n}", "harmless": f"make music {n}"} for n in range(60)]
    (pairs / "code_abuse.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests.write_text("words: {}\nframings: {}\nsensitive: {}\nharmless: {}\nattacks: {}\neveryday: []\n")
    data = dataset.Data(own=[str(own)], pairs=str(pairs), requests=str(requests), documents=str(documents), tests=[], holdout=0.3)
    settings = {
        "data": data,
        "linear": fitting.LinearConfig(bits=12, epochs=6, lr=0.2),
        "encoder": fitting.EncoderConfig(
            name=str(tiny_encoder(folder / "encoder")),
            vocabulary=95,
            length=32,
            train_length=32,
            frozen_layers=0,
            runs=2,
            epochs=12,
            batch_tokens=512,
            lr=1e-2,
        ),
        "points": {"strict": Bounds(0.05, 0.1), "balanced": Bounds(0.02, 0.05), "loose": Bounds(0.0, 0.0)},
        "output": str(folder / "weights"),
        "run_dir": str(folder / "run"),
    }
    return train.Config(**{**settings, **changes})  # type: ignore[arg-type]
