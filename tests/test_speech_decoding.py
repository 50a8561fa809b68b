"""Beam search over a lexicon: the language model decides where the letters do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data2vec.core.errors import ConfigError, DataError
from data2vec.core.finetuning.transcripts import Letters
from data2vec.core.settings.finetuning import Case
from data2vec.speech.decoding import BeamConfig, BeamDecoder, Scored, tuned, words_of_arpa

LETTERS = Letters(("_", "|", *"abc"), Case.KEEP)
ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<s>\t-0.1
-1.0\t</s>
-2.5\tab\t-0.1
-0.3\tac\t-0.1
-1.0\tb\t-0.1

\\2-grams:
-0.1\tb ab
-2.0\tb ac

\\end\\
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA)
    return path


def logits(text: str, doubtful: dict[int, str] | None = None) -> torch.Tensor:
    """Letters that are sure, but for some places where another is as likely."""
    rows = []
    for place, letter in enumerate(text):
        row = torch.full((5,), -9.0)
        for one in letter + (doubtful or {}).get(place, ""):
            row[LETTERS.symbols.index(one)] = 0.0
        rows.append(row)
    return torch.stack(rows)


def test_sure_letters_are_read(model: Path) -> None:
    decoder = BeamDecoder(LETTERS, words_of_arpa(model), model, BeamConfig(lm_weight=0.5, word_score=0.0))
    assert decoder(logits("b|_ab|")) == "b ab"
    assert decoder(logits("ac|b|")) == "ac b"


def test_the_model_decides_what_letters_leave_open(model: Path) -> None:
    decoder = BeamDecoder(LETTERS, words_of_arpa(model), model, BeamConfig(lm_weight=2.0, word_score=0.0))
    assert decoder(logits("ab|", {1: "c"})) == "ac"  # the commoner word
    assert decoder(logits("b|ab|", {3: "c"})) == "b ab"  # but not after this one
    assert decoder(logits("aa|", {1: "b"})) == "ab"  # no other word fits


def test_weights_are_tuned_on_clips(model: Path) -> None:
    decoder = BeamDecoder(LETTERS, words_of_arpa(model), model, BeamConfig(lm_weight=0.0))
    nearly = logits("ab|")
    nearly[1, LETTERS.symbols.index("c")] = -0.5  # a little less likely than b
    clips = Scored([nearly, logits("b|ab|")], ["ac", "b ab"])
    assert clips.error_rate(decoder) == pytest.approx(1 / 3)
    best, rate = tuned(decoder, clips)
    assert rate == 0.0
    assert best.config.lm_weight > 0


def test_without_a_language_model() -> None:
    decoder = BeamDecoder(LETTERS, ["ab", "b"], None)
    assert decoder(logits("b|ab|")) == "b ab"
    with pytest.raises(ConfigError, match="no word that can be written with"):
        BeamDecoder(LETTERS, ["xyz"], None)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(DataError, match="name the words with --lexicon"):
        words_of_arpa(path)
    with pytest.raises(DataError, match="no language model"):
        BeamDecoder(LETTERS, ["ab"], path)
    path.write_text("nothing")
    with pytest.raises(DataError, match="has no words"):
        words_of_arpa(path)
