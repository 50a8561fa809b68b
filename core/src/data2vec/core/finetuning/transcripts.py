"""Transcripts: letters as numbers and back, read from shards and settled before training.

Shapes: B clips, S symbols of the longest transcript, T frames.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from data2vec.core.data.dataset import EvaluationData, ShardData, TrainData
from data2vec.core.errors import CheckpointError, ConfigError, DataError
from data2vec.core.settings.finetuning import Case, LetterConfig

_log = logging.getLogger(__name__)
MEMBER = "txt"
BLANK, SPACE = 0, "|"
UNKNOWN = "<unk>"
_FEW_MINUTES = 24  # stream of random numbers
_NAMED = 8  # letters that a message names

D = TypeVar("D", bound=ShardData)


class Letters:
    """Symbols and their numbers.

    Args:
        symbols: the first is the blank; ``|`` stands between words and at the end; those of several characters are none
            that a transcript has.
        case: of the letters that are looked up.
    """

    def __init__(self, symbols: Sequence[str], case: Case) -> None:
        self.symbols, self.case = tuple(symbols), case
        self._numbers = {symbol: number for number, symbol in enumerate(symbols) if number != BLANK}
        self._written = {number: symbol for symbol, number in self._numbers.items() if len(symbol) == 1}

    def words(self, text: str) -> list[str]:
        """The words of a transcript."""
        return cased(text, self.case).split()

    def encode(self, text: str) -> list[int]:
        """The numbers of a transcript's letters, ``|`` after each word; letters that have none become ``<unk>``.

        Where there is no ``<unk>`` they are left out.
        """
        unknown = self._numbers.get(UNKNOWN)
        numbers = [self._numbers.get(letter, unknown) for word in self.words(text) for letter in f"{word}{SPACE}"]
        return [number for number in numbers if number is not None]

    def decode(self, numbers: Sequence[int]) -> str:
        """The text of numbers; symbols that no transcript has are left out."""
        written = "".join(self._written.get(number, "") for number in numbers)
        return " ".join(written.replace(SPACE, " ").split())

    def outside(self, text: str) -> set[str]:
        """The letters of a transcript that have no number."""
        return {letter for word in self.words(text) for letter in word if letter not in self._numbers}

    def __len__(self) -> int:
        return len(self.symbols)


def cased(text: str, case: Case) -> str:
    """The text in upper or lower case, or as it is."""
    return {Case.UPPER: text.upper(), Case.LOWER: text.lower()}.get(case, text)


@dataclass(frozen=True)
class SettledLetters:
    """Letters with all symbols, and the clips that have a transcript."""

    letters: LetterConfig
    train: TrainData
    validation: EvaluationData


def settle_letters(
    config: LetterConfig,
    train: TrainData,
    validation: EvaluationData,
    *,
    seed: int,
    earlier: LetterConfig | None = None,
) -> SettledLetters:
    """Find the symbols, leave out clips without a transcript, and choose the few minutes that are learnt from.

    Args:
        config: as the user set it.
        train, validation: of one modality.
        seed: of the choice of few minutes.
        earlier: the settled letters of the run that is continued.

    Raises:
        DataError: no transcripts, or none that can be read.
        ConfigError: fewer minutes than are asked for.
        CheckpointError: other symbols than the continued run has.
    """
    if earlier is not None:
        if config.symbols and config.symbols != earlier.symbols:
            raise CheckpointError(
                f"letters.symbols has {len(config.symbols)} symbols, and the run that is continued was trained for "
                f"{len(earlier.symbols)}; leave letters.symbols out, or choose another train.folder"
            )
        config = replace(config, symbols=earlier.symbols)
    train, validation = replace(train, keep=(MEMBER,)), replace(validation, keep=(MEMBER,))
    learnt, train = _transcribed(train, config)
    judged, validation = _transcribed(validation, config)
    if not config.symbols:
        found = {letter for texts in learnt for text in texts for word in text.split() for letter in word}
        found = {cased(letter, config.case) for letter in found} - {SPACE}
        config = replace(config, symbols=("<blank>", SPACE, *sorted(found)))
    letters = Letters(config.symbols, config.case)
    for data, texts in ((train, learnt), (validation, judged)):
        _name_letters_outside(data, texts, letters)
    if config.minutes is not None:
        train = _few_minutes(train, config.minutes, seed)
    return SettledLetters(config, train, validation)


def _transcribed(data: D, config: LetterConfig) -> tuple[list[list[str]], D]:
    """The transcripts of each shard's clips that have one, and these clips alone.

    Raises:
        DataError: none has one.
    """
    found: list[list[str | None]] = []
    counts: Counter[str] = Counter()
    for samples in data.annotations(MEMBER):
        texts: list[str | None] = []
        for members in samples:
            text = _read(members.get(MEMBER), config.min_words, counts)
            texts.append(text)
        found.append(texts)
    left = sum(counts.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if left == data.total:
        raise DataError(
            f"{data.shards.spec}: no transcripts to learn from (member {MEMBER}) in its {data.total} clips: {reasons}; "
            "write shards with transcripts (docs/data.md)"
        )
    if left:
        _log.warning("%s: %d of %d clips are left out: %s", data.shards.spec, left, data.total, reasons)
        data = data.chosen_of([[text is not None for text in texts] for texts in found])
    return [[text for text in texts if text is not None] for texts in found], data


def _read(content: bytes | None, least: int, counts: Counter[str]) -> str | None:
    """The text of a transcript; None, and the reason counted, where there is none to be used."""
    if content is None:
        counts["have no transcript"] += 1
        return None
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        counts["are not UTF-8"] += 1
        return None
    if not text:
        counts["have an empty transcript"] += 1
        return None
    if len(text.split()) < least:
        counts[f"have fewer than letters.min_words={least} words"] += 1
        return None
    return text


def _name_letters_outside(data: ShardData, texts: Sequence[Sequence[str]], letters: Letters) -> None:
    """Say which letters have no symbol.

    Raises:
        DataError: no transcript is written with the symbols at all.
    """
    counts: Counter[str] = Counter()
    clips = inside = 0
    for text in (text for own in texts for text in own):
        outside = letters.outside(text)
        counts.update(outside)
        clips += bool(outside)
        inside += any(letter not in outside for word in letters.words(text) for letter in word)
    if not counts:
        return
    named = ", ".join(f"{letter!r} ({count})" for letter, count in counts.most_common(_NAMED))
    more = f" and {len(counts) - _NAMED} more" if len(counts) > _NAMED else ""
    what = f"{clips} transcripts have letters outside letters.symbols: {named}{more}"
    if not inside:
        raise DataError(f"{data.shards.spec}: {what}; set letters.case, or letters.symbols")
    become = f"become {UNKNOWN}" if UNKNOWN in letters.symbols else "are left out of what is learnt"
    _log.warning("%s: %s; these %s", data.shards.spec, what, become)


def _few_minutes(train: TrainData, minutes: float, seed: int) -> TrainData:
    """So many minutes of the clips, drawn at random.

    Raises:
        ConfigError: there are fewer.
        DataError: no index tells the lengths of the clips.
    """
    lengths = train.lengths()
    flat = np.concatenate(lengths)
    wanted = minutes * 60 * train.modality.units_of_second
    if flat.sum() < wanted:
        have = flat.sum() / train.modality.units_of_second / 60
        raise ConfigError([f"letters.minutes={minutes:g}: there are {have:.1f} transcribed; choose at most that"])
    order = np.random.default_rng([seed, _FEW_MINUTES]).permutation(len(flat))
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[order[: int(np.searchsorted(np.cumsum(flat[order]), wanted)) + 1]] = True
    edges = np.cumsum([len(own) for own in lengths])[:-1]
    return train.chosen_of([part.tolist() for part in np.split(chosen, edges)])


def letter_targets(texts: Sequence[bytes | None], letters: Letters) -> tuple[Tensor, Tensor]:
    """(B, S) int64 letters of transcripts, filled up with blanks, and (B,) how many each has."""
    encoded = [letters.encode((text or b"").decode("utf-8", "replace")) for text in texts]
    rows = [torch.tensor(numbers, dtype=torch.int64) for numbers in encoded]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=BLANK)
    return padded, torch.tensor([len(numbers) for numbers in encoded])


def greedy(logits: Tensor) -> list[tuple[int, int, int]]:
    """The likeliest symbol of each frame, repetitions and blanks left out, of (T, C) logits.

    Returns:
        (symbol, first frame, frame behind its last) of each.
    """
    named = logits.argmax(-1).tolist()
    found: list[tuple[int, int, int]] = []
    start = 0
    for frame in range(1, len(named) + 1):
        if frame == len(named) or named[frame] != named[start]:
            if named[start] != BLANK:
                found.append((named[start], start, frame))
            start = frame
    return found
