"""Beam search over words of a lexicon with an n-gram language model (flashlight-text), its weights tuned on clips.

    uv run python -m data2vec.speech.decoding runs/speech_ctc --language-model 4gram.arpa \
        --validation 'dev-other/*.tar' --test 'test-other/*.tar'

The weights are those with the lowest word error rate on the validation clips; the test clips are decoded once.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import torch
from torch import Tensor

from data2vec.core.data.dataset import EvaluationData
from data2vec.core.errors import ConfigError, Data2VecError, DataError
from data2vec.core.files import read_file
from data2vec.core.finetuning.recognition import RecognitionTask
from data2vec.core.finetuning.transcribing import cut, said_in, text_of
from data2vec.core.finetuning.transcripts import BLANK, MEMBER, SPACE, UNKNOWN, Letters, cased
from data2vec.speech.recogniser import Recogniser, load_recogniser

LM_WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
WORD_SCORES = (-2.0, -1.0, 0.0, 1.0)


@dataclass(frozen=True)
class BeamConfig:
    """The weights and the width of the search.

    ``lm_weight``: of the language model's log probability, beside that of the letters. ``word_score``: added for each
    word. ``beam``: hypotheses that are kept. ``threshold``: those that fall so far behind the best are dropped.
    """

    lm_weight: float = 1.5
    word_score: float = -1.0
    beam: int = 100
    threshold: float = 25.0


class BeamDecoder:
    """Finds the words of a lexicon that fit the letters and the language model best.

    Args:
        letters: symbols of the logits.
        words: the lexicon; words with letters outside the symbols are left out.
        language_model: an ARPA file or KenLM's binary form; None: all words are alike.
        config: weights and width.

    Raises:
        ConfigError: flashlight-text is not installed, or no word can be written with the symbols.
        DataError: the language model cannot be read.
    """

    def __init__(
        self, letters: Letters, words: Iterable[str], language_model: Path | None, config: BeamConfig | None = None
    ) -> None:
        if importlib.util.find_spec("flashlight") is None:
            raise ConfigError(["beam search needs flashlight-text; install data2vec-speech[decoder]"])
        from flashlight.lib.text.decoder import ZeroLM
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        self.letters, self.config = letters, config or BeamConfig()
        self._spelt = {
            word: letters.encode(word) for word in dict.fromkeys(words) if word and not letters.outside(word)
        }
        if not self._spelt:
            raise ConfigError(["the lexicon has no word that can be written with letters.symbols; see letters.case"])
        self._words = Dictionary([*self._spelt, UNKNOWN])
        try:
            self._model: Any = KenLM(str(language_model), self._words) if language_model else ZeroLM()
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{language_model}: no language model ({' '.join(str(error).split())[:300]})") from None
        self._trie = self._smeared_trie()

    def _smeared_trie(self) -> Any:
        from flashlight.lib.text.decoder import SmearingMode, Trie

        trie = Trie(len(self.letters), self.letters.symbols.index(SPACE))
        start = self._model.start(False)
        for word, spelling in self._spelt.items():
            number = self._words.get_index(word)
            _, score = self._model.score(start, number)
            trie.insert(spelling, number, score)
        trie.smear(SmearingMode.MAX)
        return trie

    def with_config(self, config: BeamConfig) -> BeamDecoder:
        """The same search with other weights."""
        other = object.__new__(BeamDecoder)
        vars(other).update(vars(self), config=config)
        return other

    def __call__(self, logits: Tensor) -> str:
        """The text of (T, C) logits; where no path of words is found, an empty one."""
        from flashlight.lib.text.decoder import CriterionType, LexiconDecoder, LexiconDecoderOptions

        config = self.config
        options = LexiconDecoderOptions(
            beam_size=config.beam, beam_size_token=len(self.letters), beam_threshold=config.threshold,
            lm_weight=config.lm_weight, word_score=config.word_score, unk_score=-math.inf, sil_score=0.0,
            log_add=False, criterion_type=CriterionType.CTC,
        )  # fmt: skip
        decoder = LexiconDecoder(
            options, self._trie, self._model, self.letters.symbols.index(SPACE), BLANK,
            self._words.get_index(UNKNOWN), [], False,
        )  # fmt: skip
        scores = logits.float().log_softmax(-1).contiguous().cpu()
        found = decoder.decode(scores.data_ptr(), *scores.shape)
        if not found:
            return ""
        return " ".join(self._words.get_entry(number) for number in found[0].words if number >= 0)


def words_of_arpa(path: Path) -> list[str]:
    """The words of an ARPA file.

    Raises:
        DataError: it is none, such as KenLM's binary form, which does not list its words.
    """
    try:
        text = read_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise DataError(f"{path}: cannot be read as an ARPA file; name the words with --lexicon") from None
    words, inside = [], False
    for line in text.splitlines():
        if line.startswith("\\"):
            if inside:
                break
            inside = line.strip() == "\\1-grams:"
        elif inside and line.strip():
            words.append(line.split("\t")[1] if "\t" in line else line.split()[1])
    if not words:
        raise DataError(f"{path}: has no words (\\1-grams:); name the words with --lexicon")
    return [word for word in words if word not in ("<s>", "</s>", UNKNOWN)]


@dataclass(frozen=True)
class Scored:
    """Logits of clips beside what was said."""

    logits: list[Tensor]
    said: list[str]

    @classmethod
    @torch.no_grad()
    def of(cls, recogniser: Recogniser, spec: str, batch: int = 8) -> Scored:
        """Those of a set of shards.

        Raises:
            DataError: shards are missing or broken, or no clip has a transcript.
        """
        run, task = recogniser.encoder.run, recogniser.model
        (modality,) = run.experiment.modalities.values()
        data = EvaluationData.open(
            spec, modality, data=run.experiment.data, seed=run.experiment.train.seed, cache=run.folder / "cache"
        )
        logits: list[Tensor] = []
        said: list[str] = []
        for part in replace(data, keep=(MEMBER,)).evaluation_batches(batch):
            found, frames = task.logits(task.prepare(part, seed=0, update=0).to(run.device))
            texts = said_in(task, part)
            kept = [number for number, text in enumerate(texts) if text]
            clips = list(cut(found.cpu(), frames))
            logits += [clips[number].clone() for number in kept]
            said += [texts[number] for number in kept]
        if not said:
            raise DataError(f"{spec}: no clip has a transcript (member {MEMBER})")
        return cls(logits, said)

    def error_rate(self, decoder: BeamDecoder) -> float:
        """The word error rate of a search."""
        return float(jiwer.wer(self.said, [decoder(one) for one in self.logits]))

    def greedy_error_rate(self, task: RecognitionTask) -> float:
        """The word error rate of the likeliest letters alone."""
        return float(jiwer.wer(self.said, [text_of(task, one) for one in self.logits]))


def tuned(decoder: BeamDecoder, clips: Scored) -> tuple[BeamDecoder, float]:
    """The search with the weights whose word error rate on some clips is lowest, and that rate."""
    rates = {}
    for weight, score in itertools.product(LM_WEIGHTS, WORD_SCORES):
        config = replace(decoder.config, lm_weight=weight, word_score=score)
        rates[config] = clips.error_rate(decoder.with_config(config))
    best = min(rates, key=lambda config: rates[config])
    return decoder.with_config(best), rates[best]


def main(words: Sequence[str] | None = None) -> int:
    """Tune and decode; returns the exit status: 0 done, 2 an error."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="decoding", description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="a run that was fine-tuned for letters")
    parser.add_argument("--language-model", type=Path, metavar="FILE", help="ARPA, or KenLM's binary form")
    parser.add_argument("--lexicon", type=Path, metavar="FILE", help="a word in each line; default: the ARPA file's")
    parser.add_argument("--validation", required=True, metavar="SHARDS", help="clips that the weights are tuned on")
    parser.add_argument("--test", metavar="SHARDS", help="clips that are decoded once, with the tuned weights")
    parser.add_argument("--beam", type=int, default=100, metavar="N", help="hypotheses that are kept; default 100")
    arguments = parser.parse_args(words)
    try:
        recogniser = load_recogniser(arguments.run)
        decoder = _decoder(recogniser, arguments)
        validation = Scored.of(recogniser, arguments.validation)
        print(f"validation, greedy: WER {100 * validation.greedy_error_rate(recogniser.model):.1f} %")
        decoder, rate = tuned(decoder, validation)
        found = decoder.config
        print(f"validation, beam search: WER {100 * rate:.1f} % (LM {found.lm_weight:g}, word {found.word_score:g})")
        if arguments.test is not None:
            test = Scored.of(recogniser, arguments.test)
            print(f"test, greedy: WER {100 * test.greedy_error_rate(recogniser.model):.1f} %")
            print(f"test, beam search: WER {100 * test.error_rate(decoder):.1f} %")
    except Data2VecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _decoder(recogniser: Recogniser, arguments: argparse.Namespace) -> BeamDecoder:
    letters = recogniser.model.letters
    if arguments.lexicon is not None:
        try:
            lines = read_file(arguments.lexicon).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{arguments.lexicon}: cannot be read ({error})") from None
        found = [line.split()[0] for line in lines if line.strip()]
    elif arguments.language_model is not None:
        found = words_of_arpa(arguments.language_model)
    else:
        raise ConfigError(["name the words with --lexicon or --language-model"])
    lexicon = [cased(word, letters.case) for word in found]
    return BeamDecoder(letters, lexicon, arguments.language_model, BeamConfig(beam=arguments.beam))


if __name__ == "__main__":
    sys.exit(main())
