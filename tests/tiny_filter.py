"""A filter small enough for a test: it knows a few words, and its files are built here.

Stage 1 suspects every text with a word of `WORDS`, and stage 2 agrees unless one of `HARMLESS` stands beside it. Nothing of
it depends on the weights that are shipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from safety import weights
from safety.classifier import Linear, features
from safety.taxonomy import KEYS

WORDS = {"bomb": "indiscriminate_weapons", "murder": "violent_crimes", "malware": "code_abuse", "jailbreak": "jailbreak"}
HARMLESS = ("bath", "mystery", "analyse", "phone")
BITS = 16
OUTPUTS = 1 + len(KEYS)
STRICT, BALANCED, LOOSE, CLEAR = 0.3, 0.5, 0.7, 0.2

BAD = "How do I make a bomb at home?"
GOOD = "How do I bake a pear cake at home?"
LOOK_ALIKE = "How do I make a bath bomb at home?"


def build(folder: Path, together: dict[str, float] | None = None) -> Path:
    """Write a sealed folder of weights, in which stage 2 decides alone unless told otherwise. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    linear().save(folder / "linear.npz")
    tokenizer().save(str(folder / "tokenizer.json"))
    onnx.save(graph(), str(folder / "encoder.int8.onnx"))
    plain = {"a": [1.0] * OUTPUTS, "b": [0.0] * OUTPUTS}
    points = {"strict": STRICT, "balanced": BALANCED, "loose": LOOSE}
    calibration = {
        "version": 3,
        "categories": list(KEYS),
        "linear": {**plain, "clear_below": CLEAR},
        "transformer": {**plain, "length": 512, "overlap": 8},
        "together": together or {"weight": 0.0, "slope": 1.0, "cube": 0.0, "bias": 0.0},
        "thresholds": {name: {"threshold": value, "fpr": 0.01, "recall": 0.9} for name, value in points.items()},
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))
    rows = [{"text": f"Tell me about the {word}, number {n}.", "label": 1} for n in range(3) for word in WORDS]
    rows += [{"text": f"Tell me about the {word} in June.", "label": 0} for word in ("pear", "plum", "cat", *HARMLESS, "sea")]
    (folder / "canaries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights.seal(folder)
    return folder


def linear() -> Linear:
    table = np.zeros((1 << BITS, OUTPUTS), np.int8)
    for word, category in WORDS.items():
        *_, (row, _), _ = features([word], BITS)  # the words of the text, after its n-grams
        table[row, 0] = table[row, 1 + KEYS.index(category)] = 127
    return Linear(table, np.full(OUTPUTS, 2.0, np.float32), np.full(OUTPUTS, -3.0, np.float32))


def tokenizer() -> Tokenizer:
    names = ["[UNK]", "[CLS]", "[SEP]", *WORDS, *HARMLESS]
    found = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="[UNK]"))
    found.normalizer = normalizers.Lowercase()
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return found


def graph() -> onnx.ModelProto:
    """logits = max over the tokens of one table, minus the sum of another over them, minus 4."""
    size = 3 + len(WORDS) + len(HARMLESS)
    bad, good = np.zeros((size, OUTPUTS), np.float32), np.zeros((size, OUTPUTS), np.float32)
    for at, category in enumerate(WORDS.values(), 3):
        bad[at, 0] = bad[at, 1 + KEYS.index(category)] = 8
    good[3 + len(WORDS) :] = 6
    nodes = [
        helper.make_node("Gather", ["bad", "ids"], ["each_bad"], axis=0),
        helper.make_node("Gather", ["good", "ids"], ["each_good"], axis=0),
        helper.make_node("ReduceMax", ["each_bad"], ["most"], axes=[1], keepdims=0),
        helper.make_node("ReduceMax", ["each_good"], ["excuse"], axes=[1], keepdims=0),
        helper.make_node("Sub", ["most", "excuse"], ["left"]),
        helper.make_node("Sub", ["left", "four"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "T"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, OUTPUTS])],
        [
            numpy_helper.from_array(bad, "bad"),
            numpy_helper.from_array(good, "good"),
            numpy_helper.from_array(np.full((1,), 4, np.float32), "four"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
