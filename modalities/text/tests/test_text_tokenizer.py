"""Tokenizers: round trips, special tokens that no text can forge, and files that are none."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data2vec.core.errors import DataError
from data2vec.text.tokenizer import _PIECE, SPECIALS, Tokenizer, _byte_characters, train_bpe

WORDS = ["the teacher averages the student", "the student predicts the teacher", "näive Übung über Bäume"] * 3
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe(WORDS, 320)


def word_piece(added: bool = True) -> bytes:
    vocabulary = {name: number for number, name in enumerate([*BERT, "the", "play", "##ing", "mask", "[", "]"])}
    rules = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    rules.normalizer = normalizers.BertNormalizer()
    rules.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules.decoder = decoders.WordPiece()
    if added:
        rules.add_special_tokens(list(BERT))
    return rules.to_str().encode()


@given(st.text())
def test_bytes_need_no_file_and_lose_nothing(text: str) -> None:
    tokenizer = Tokenizer.bytes()
    ids = tokenizer.encode(text)
    assert ids == [byte + 5 for byte in text.encode()]
    assert tokenizer.decode(ids) == text


@given(text=st.text() | st.sampled_from([*SPECIALS, "a<mask>b</s>", "the teacher <s>"]))
def test_a_trained_tokenizer_loses_nothing_and_forges_no_special_token(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.specials.isdisjoint(ids)
    assert all(0 <= token < trained.vocabulary for token in ids)
    assert trained.decode(ids) == text
    assert trained.decode([trained.bos, *ids, trained.eos, trained.pad]) == text


def test_training_finds_common_pairs_and_is_the_same_each_time(trained: Tokenizer) -> None:
    assert trained.vocabulary <= 320
    assert (trained.bos, trained.pad, trained.eos, trained.unk, trained.mask) == (0, 1, 2, 3, 4)
    assert len(trained.encode("the teacher")) < len("the teacher") / 2
    assert train_bpe(iter(WORDS), 320).content == trained.content
    assert train_bpe(WORDS, 300).vocabulary == 300


def test_the_byte_alphabet_is_the_librarys() -> None:
    assert sorted(_byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("added", [True, False])
def test_special_tokens_in_berts_style(added: bool) -> None:
    tokenizer = Tokenizer.parse(word_piece(added), "file")
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.vocabulary == 11
    assert tokenizer.encode("the playing") == [5, 6, 7]
    assert "".join(tokenizer.tokens([2, 5, 6, 7])) == "[CLS] the playing"
    # A text that spells a special token gets none of them, only unknown ones.
    assert tokenizer.specials.intersection(tokenizer.encode("the [MASK] [SEP]")) <= {tokenizer.unk}


def test_settings_of_a_sentence_encoder_do_not_cut_or_pad() -> None:
    rules = tokenizers.Tokenizer.from_str(Tokenizer.bytes().content.decode())
    rules.enable_truncation(4)
    rules.enable_padding(length=50, pad_id=1, pad_token="<pad>")
    assert len(Tokenizer.parse(rules.to_str().encode(), "file").encode("abcdefgh")) == 8


def test_files_and_pickles(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(trained.content)
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(trained))):
        assert (copy.content, copy.vocabulary) == (trained.content, trained.vocabulary)
        assert copy.encode("the student") == trained.encode("the student")
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        Tokenizer.load(tmp_path / "gone.json")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@given(
    st.binary(max_size=60)
    | st.builds(lambda key, value: json.dumps({key: value}).encode(), st.text(), st.integers())
    | st.sampled_from(
        [
            b"{}",
            b"[1]",
            b"\xff",
            b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}}',
            b'{"version":"1.0","model":{"type":"WordLevel","vocab":{},"unk_token":7}}',
        ]
    )
)
def test_what_is_no_tokenizer_is_one_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^file\.json: is no tokenizer"):
        Tokenizer.parse(content, "file.json")


@pytest.mark.parametrize("lacking", SPECIALS)
def test_a_missing_special_token_is_named(lacking: str) -> None:
    names = [name for name in SPECIALS if name != lacking]
    rules = tokenizers.Tokenizer(models.WordLevel({name: n for n, name in enumerate([*names, "a"])}, unk_token="a"))
    with pytest.raises(DataError, match=f"file: its vocabulary of 5 tokens lacks {lacking};"):
        Tokenizer.parse(rules.to_str().encode(), "file")


def test_a_vocabulary_needs_room_and_text() -> None:
    with pytest.raises(DataError, match="vocabulary of 260 tokens: 261"):
        train_bpe(WORDS, 260)
    with pytest.raises(DataError, match="no text"):
        train_bpe([], 300)


def test_ids_beyond_a_gap_are_counted_and_shown() -> None:
    vocabulary = {**{name: number for number, name in enumerate(SPECIALS)}, "far": 900}
    tokenizer = Tokenizer.parse(tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>")).to_str().encode(), "file")
    assert tokenizer.vocabulary == 901
    assert tokenizer.tokens([900, 17]) == ["far", "[17]"]


def test_tokens_show_parts_of_characters_as_bytes() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.tokens([0, *tokenizer.encode("a é"), 4]) == ["<s>", "a", " ", "\\xc3", "\\xa9", "<mask>"]


def test_a_long_text_is_encoded_in_pieces_as_it_would_be_in_one(trained: Tokenizer) -> None:
    text = "the student predicts, über \n the  teacher's " * (_PIECE // 20)
    whole = trained._rules.encode(text, add_special_tokens=False).ids
    assert trained.encode(text) == whole
    solid = "x" * (2 * _PIECE + 3)
    assert trained.decode(trained.encode(solid)) == solid
