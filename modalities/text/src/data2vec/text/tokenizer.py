"""From text to token numbers and back, by Hugging Face's ``tokenizers``.

A tokenizer is one file, ``tokenizer.json``: data that is parsed and never executed. Any such file serves whose
vocabulary names the five special tokens of BERT or RoBERTa; :func:`train_bpe` makes a new one, and
:meth:`Tokenizer.bytes` needs no file at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

# Work is spread over processes here. Threads below them would be too many, and the library warns about every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data2vec.core.errors import DataError, SampleError
from data2vec.core.files import read_file

FILE_NAME = "tokenizer.json"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""Special tokens of a tokenizer that is made here, in the order of their ids: begin, padding, end, unknown, mask."""

_STYLES = (SPECIALS, ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"))  # RoBERTa's and BERT's, in the same order
_BYTES = 256
_PIECE = 1 << 18  # characters that are encoded at a time: the library needs over 100 bytes for each


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary and the rules that cut text into its tokens.

    ``vocabulary``: number of ids, so every id is below it. ``bos``, ``pad``, ``eos``, ``unk``, ``mask``: ids of the
    special tokens (begin of a block, padding, end of a document, unknown, masked); ``specials``: all five.
    ``content``: the bytes of ``tokenizer.json``. Instances can be pickled.
    """

    vocabulary: int
    bos: int
    pad: int
    eos: int
    unk: int
    mask: int
    content: bytes = field(repr=False)
    _rules: Any = field(repr=False)  # tokenizers.Tokenizer, which carries no annotations

    @property
    def specials(self) -> frozenset[int]:
        """The ids of the five special tokens."""
        return frozenset((self.bos, self.pad, self.eos, self.unk, self.mask))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a ``tokenizer.json``.

        Raises:
            DataError: no such file, or see :meth:`parse`.
        """
        try:
            content = read_file(Path(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); name a tokenizer.json") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> Self:
        """The tokenizer in the bytes of a ``tokenizer.json``; ``source`` names it in errors.

        Raises:
            DataError: it is none, or its vocabulary lacks a special token.
        """
        try:
            rules = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # the library raises bare exceptions, and panics that derive from no Exception
            raise DataError(
                f"{source}: is no tokenizer ({_one_line(error)}); expected a tokenizer.json of Hugging Face tokenizers"
            ) from None
        rules.no_padding()  # settings of a sentence encoder, which would add tokens to a document or cut it
        rules.no_truncation()
        vocabulary = rules.get_vocab(with_added_tokens=True)
        names = _special_names(vocabulary, source)
        # Special tokens that are only part of the vocabulary would be found in a text that happens to spell them.
        rules.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
        rules.encode_special_tokens = True
        bos, pad, eos, unk, mask = (vocabulary[name] for name in names)
        return cls(max(vocabulary.values()) + 1, bos, pad, eos, unk, mask, content, rules)

    @classmethod
    def bytes(cls) -> Self:
        """The tokenizer that needs no file: the special tokens 0 to 4, then one token for each byte of UTF-8."""
        rules = _byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[], unk_token=None))
        rules.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in SPECIALS])
        return cls.parse(rules.to_str().encode(), "bytes")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens: a text that spells ``<mask>`` gets the tokens of its letters.

        The unknown token may occur where the vocabulary lacks a character; byte-level ones lack none.

        Raises:
            SampleError: the file's rules fail on this text: an unknown token that is not in the vocabulary, a pattern
                that would take too long.
        """
        ids: list[int] = []
        try:
            for piece in _pieces(text):
                ids += self._rules.encode(piece, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # as in :meth:`parse`
            raise SampleError(f"the tokenizer's rules fail on this text ({_one_line(error)}); mend its file") from None
        forbidden = self.specials - {self.unk}
        if forbidden.isdisjoint(ids):
            return ids
        return [self.unk if token in forbidden else token for token in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens left out. For byte-level tokenizers the inverse of :meth:`encode`."""
        specials = self.specials
        kept = [int(token) for token in ids if int(token) not in specials]
        text: str = self._rules.decode(kept, skip_special_tokens=True)
        return text

    def tokens(self, ids: Iterable[int]) -> list[str]:
        r"""List what to show for every id by itself; one after another they read as the text.

        Bytes that are only a part of a character stand as ``\xe2``.
        """
        shown = []
        specials, readable = self.specials, _READABLE.get(type(self._rules.decoder), str)
        for token in ids:
            name = self._rules.id_to_token(int(token))
            if name is None:
                shown.append(f"[{int(token)}]")  # a gap in the vocabulary
            else:
                shown.append(name if int(token) in specials else readable(name))
        return shown

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[Any, str]]:
        return (Tokenizer.parse, (self.content, "pickled tokenizer"))


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level byte pair encoding (Sennrich et al. 2016; Radford et al. 2019) learnt from texts.

    The same texts in the same order give the same bytes. Ids: the special tokens, the 256 bytes, then the merged
    tokens from the commonest on; the number of ids is below ``vocabulary`` where the texts do not give enough pairs.

    Raises:
        DataError: ``vocabulary`` has no room for the special tokens and the bytes, or there is no text.
    """
    least = len(SPECIALS) + _BYTES
    if vocabulary < least:
        raise DataError(
            f"a vocabulary of {vocabulary} tokens: {least} are special tokens and bytes; give {least} or more"
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(_byte_characters()),
        show_progress=False,
    )
    rules = _byte_level(models.BPE(unk_token=None))
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield from _pieces(text)

    rules.train_from_iterator(counted(), trainer=trainer)
    if not seen:
        raise DataError("a tokenizer cannot be trained on no text")
    return Tokenizer.parse(rules.to_str().encode(), "trained tokenizer")


def _byte_level(model: Any) -> Any:
    rules = tokenizers.Tokenizer(model)
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    return rules


def _byte_characters() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary.

    That of Latin-1 where it is printed and no space, else the next one from U+0100 on (Radford et al. 2019).
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(_BYTES)]


def _byte_vocabulary() -> dict[str, int]:
    names = [*SPECIALS, *_byte_characters()]
    return {name: number for number, name in enumerate(names)}


_BYTE_OF = {character: byte for byte, character in enumerate(_byte_characters())}


def _readable(name: str) -> str:
    """The text of a byte-level token's name."""
    if any(character not in _BYTE_OF for character in name):
        return name  # an added token, which stands for itself
    return bytes(_BYTE_OF[character] for character in name).decode("utf-8", "backslashreplace")


def _word_piece(name: str) -> str:
    return name[2:] if name.startswith("##") else f" {name}"


def _metaspace(name: str) -> str:
    return name.replace("\u2581", " ")


# How a decoder writes the names of its tokens, so that they read as text one after another.
_READABLE = {
    decoders.ByteLevel: _readable, decoders.WordPiece: _word_piece, decoders.Metaspace: _metaspace
}  # fmt: skip


def _special_names(vocabulary: dict[str, int], source: str) -> tuple[str, ...]:
    """The names of the five special tokens in the style that fits best."""
    style = max(_STYLES, key=lambda names: sum(name in vocabulary for name in names))
    missing = [name for name in style if name not in vocabulary]
    if missing:
        styles = " or ".join(" ".join(names) for names in _STYLES)
        raise DataError(
            f"{source}: its vocabulary of {len(vocabulary)} tokens lacks {', '.join(missing)}; "
            f"a tokenizer needs the special tokens {styles}"
        )
    return style


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that begin with a space before a word, where every tokenizer's words begin too."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind(" ", start + 1, start + _PIECE)
        cut = cut if cut > 0 else start + _PIECE  # no space in sight: then a word is cut
        yield text[start:cut]
        start = cut
    yield text[start:]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
