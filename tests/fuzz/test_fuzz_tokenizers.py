"""Mutated tokenizer files: a tokenizer that works, one clear error, or a text that is skipped, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from data2vec.core.batch import Sample
from data2vec.core.errors import DataError, SampleError
from data2vec.core.testing import load_module
from data2vec.text.loader import TextDecoder
from data2vec.text.tokenizer import SPECIALS, Tokenizer, train_bpe

HERE = Path(__file__).parent
guard = load_module("fuzz_guard", HERE / "guard.py")
mutations = load_module("fuzz_mutations", HERE / "mutations.py")
material = load_module("fuzz_material", HERE / "material.py")

Rng = np.random.Generator
Place, fuzz, pick = material.Place, material.fuzz, material.pick

TEXT = f"hello words <mask> [MASK] \u0663 \U0001f600 {'a' * 60}!  the end\n\t"
TOKENS = (
    '"(a+)+$"', '{"Regex":"(a+)+$"}', '"id": -1,', '"id": 4294967295', '"id": 99999999999', "null", "true", "[",
    "1e999",
    '{"a":' * 3000, '"type":"Sequence"', '"type":"Split"', '"type":"Precompiled"', '"byte_fallback": true',
    '"ignore_merges": true', '"dropout": 0.5', '"dropout": 2.0', '"unk_token": "x"', '"fuse_unk":true',
    '"special":false', '"normalized":true', '"lstrip":true', "\ud800", "\0", "!!python/name:os.system",
)  # fmt: skip


def word_piece() -> str:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##a", "##b", "hello", "word", "##s"]
    rules = tokenizers.Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    rules.normalizer, rules.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    rules.decoder = decoders.WordPiece()
    rules.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    rules.enable_truncation(128)
    return str(rules.to_str())


def unigram() -> str:
    pieces = [*((name, 0.0) for name in SPECIALS), ("\u2581he", -2.0), ("llo", -3.0), ("a", -1.5)]
    rules = tokenizers.Tokenizer(models.Unigram(pieces, SPECIALS.index("<unk>")))
    spaces = normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    rules.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces])
    rules.pre_tokenizer, rules.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return str(rules.to_str())


def byte_pairs() -> str:
    return train_bpe(["hello words and other words, hello"] * 20, 280).content.decode()


def mutate(rng: Rng, text: str) -> bytes:
    match int(rng.integers(4)):
        case 0:
            return pick(rng, mutations.BYTES)(rng, text.encode())  # type: ignore[no-any-return]
        case 1:
            return mutations.text_mutation(rng, text, TOKENS).encode("utf-8", "surrogatepass")
        case 2:
            return json.dumps(mutations.change(rng, json.loads(text))).encode()
    tree = json.loads(text)  # only how a text is cut, which leaves the vocabulary whole
    part = pick(rng, [key for key in tree if key not in ("version", "model", "added_tokens") and tree[key]])
    tree[part] = mutations.change(rng, tree[part])
    if rng.random() < 0.3:
        tree["model"].pop(pick(rng, [key for key in tree["model"] if key != "vocab"]))
    return json.dumps(tree).encode()


def use(path: Path) -> int:
    """Everything that a run does with a tokenizer's file; the number of tokens."""
    tokenizer = Tokenizer.load(path)
    again, (content, source) = tokenizer.__reduce__()  # a loader's workers get it pickled
    assert again(content, source).vocabulary == tokenizer.vocabulary
    example = TextDecoder(str(path), block=200, train=False)(Sample("a", "train.tar", 1, {"txt": TEXT.encode()}), 0)
    ids = example.inputs.tolist()
    assert all(0 <= number < tokenizer.vocabulary for number in ids)
    assert len(tokenizer.tokens(ids)) == len(ids)
    tokenizer.decode(ids)
    return len(ids)


def test_tokenizers(request: pytest.FixtureRequest, place: Any) -> None:
    texts = [word_piece(), unigram(), byte_pairs()]

    def case(rng: Rng) -> Any:
        place.fresh()
        path = place.run / "tokenizer.json"
        material.put(rng, path, mutate(rng, pick(rng, texts)), place.evil)
        return guard.guarded(lambda: use(path), place.run, (DataError, SampleError))

    outcomes = fuzz(request, "tokenizers", place, case)
    if len(outcomes) >= 100:
        assert 0.05 < sum(outcome.error is None for outcome in outcomes) / len(outcomes) < 0.9


# What was found, each case alone.


def test_a_text_that_the_rules_fail_on(place: Any) -> None:
    tree = json.loads(unigram())
    tree["model"]["unk_id"] = None
    path = place.run / "tokenizer.json"
    path.write_text(json.dumps(tree))
    outcome = guard.guarded(lambda: use(path), place.run, (SampleError,))
    assert "the tokenizer's rules fail on this text" in str(outcome.error)


def test_a_pattern_that_takes_too_long(place: Any) -> None:
    """The library panics, which is no Exception."""
    tree = json.loads(byte_pairs())
    tree["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path = place.run / "tokenizer.json"
    path.write_text(json.dumps(tree))
    outcome = guard.guarded(lambda: use(path), place.run, (SampleError,))
    assert "the tokenizer's rules fail on this text" in str(outcome.error)


def test_a_pipe_for_a_tokenizer(place: Any) -> None:
    path = place.run / "tokenizer.json"
    os.mkfifo(path)
    outcome = guard.guarded(lambda: use(path), place.run, (DataError,))
    assert f"{path}: cannot be read (is no regular file)" in str(outcome.error)
