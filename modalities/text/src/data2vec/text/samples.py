"""Sample data: the documentation strings of Python's standard library and of four packages that come with torch.

They are read from the source files, which are parsed and never imported. The class of a text is the library that it
documents.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data2vec.core.data.shards.writer import ShardWriter
from data2vec.core.data.stream.order import permutation
from data2vec.core.errors import DataError
from data2vec.core.files import write_atomically
from data2vec.text.loader import pack_ids
from data2vec.text.packing import Ids, Packing, pack
from data2vec.text.tokenizer import FILE_NAME, Tokenizer, train_bpe

LIBRARIES = ("python", "torch", "numpy", "sympy", "networkx")
BLOCK = 128  # tokens
VOCABULARY = 4096
_LIBRARY_CHARACTERS = 800_000  # of each library: reading takes seconds, and the classes are of like size
_LEAST_CHARACTERS = 200  # shorter ones say little
_LEAST_SHARE = 0.3  # of a file that stands in triple quotes: parsing the others finds little
_HELD_OUT = 0.2  # of the files
_LABELLED = {"train": 400, "validation": 150}  # texts of each class that carry their label
_ORDERS = ("in order", "swapped")
_PROSE = re.compile(r"[A-Z`'\"][^\n>=|*]{18,228}[.!?:]")  # short enough that a pair fits into a block
_SENTENCE_END = re.compile(r"(?<=[.!?]) (?=[A-Z])")
_SAMPLES_PER_SHARD = 1_000
_SKIPPED_FOLDERS = frozenset({"site-packages", "tests", "test", "testing", "__pycache__", "idle_test", "lib2to3"})
_QUOTED = re.compile(rb'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """One documentation string: ``module`` is the file it stands in, ``held_out`` is one for all of a file."""

    library: str
    module: str
    number: int  # in its file
    text: str
    held_out: bool

    @property
    def key(self) -> str:
        """Unique, without dots."""
        return f"{self.library}/{self.module}-{self.number:04d}"


def write_text_shards(folder: Path) -> None:
    """Write ``train-*.tar``, ``validation-*.tar``, their index, and ``tokenizer.json`` (byte-level, 4,096 tokens).

    A share of the files is held out; the tokenizer and the training shards know nothing of them. Of some texts of
    each library the first 128 tokens make a sample with its label. All other training text, the rest of these texts
    included, is packed into blocks of 128 tokens without labels, so no token is read twice in an epoch.

    Raises:
        DataError: a library is not installed with its source, or the folder cannot be written to.
    """
    passages = read_passages()
    tokenizer = train_bpe((one.text for one in passages if not one.held_out), VOCABULARY)
    for prefix, held_out in (("train", False), ("validation", True)):
        samples = _samples([one for one in passages if one.held_out is held_out], tokenizer, prefix)
        with ShardWriter(folder, prefix, "text", samples_per_shard=_SAMPLES_PER_SHARD, class_names=LIBRARIES) as writer:
            for number in permutation(len(samples), 0).tolist():
                writer.write(*samples[number])
    try:
        write_atomically(folder / FILE_NAME, tokenizer.content)
    except OSError as error:
        raise DataError(f"{folder / FILE_NAME}: cannot be written ({error.strerror})") from None


def write_order_shards(folder: Path) -> None:
    """Write the first two sentences of texts, each pair in its order (class 0) and swapped (class 1).

    What a bag of words sees of a pair is the same for both classes. The sentences of the held-out files validate.
    Shards hold the texts (``txt``, ``pair``), with the tokenizer of :func:`write_text_shards` beside them.

    Raises:
        DataError: a library is not installed with its source, or the folder cannot be written to.
    """
    passages = read_passages()
    tokenizer = train_bpe((one.text for one in passages if not one.held_out), VOCABULARY)
    for prefix, held_out in (("train", False), ("validation", True)):
        pairs = [(one.key, *_first_pair(one)) for one in passages if one.held_out is held_out and _first_pair(one)]
        with ShardWriter(folder, prefix, "text", samples_per_shard=_SAMPLES_PER_SHARD, class_names=_ORDERS) as writer:
            for number in permutation(2 * len(pairs), 1).tolist():
                key, first, second = pairs[number // 2]
                swapped = number % 2
                texts = (second, first) if swapped else (first, second)
                writer.write(f"{key}-{swapped}", {"txt": texts[0], "pair": texts[1], "cls": str(swapped).encode()})
    try:
        write_atomically(folder / FILE_NAME, tokenizer.content)
    except OSError as error:
        raise DataError(f"{folder / FILE_NAME}: cannot be written ({error.strerror})") from None


def _first_pair(passage: Passage) -> tuple[bytes, ...]:
    """The first two sentences of a passage's paragraphs of prose; none where it has fewer."""
    paragraphs = (" ".join(part.split()) for part in passage.text.split("\n\n"))
    sentences = [one for part in paragraphs for one in _SENTENCE_END.split(part) if _PROSE.fullmatch(one)]
    return tuple(one.encode() for one in sentences[:2]) if len(sentences) > 1 else ()


def read_passages() -> list[Passage]:
    """The documentation strings of all libraries, no text twice; the same ones for the same versions.

    Raises:
        DataError: a library is not installed with its source.
    """
    seen: set[str] = set()
    passages: list[Passage] = []
    for library in LIBRARIES:
        characters = 0
        for name, path in _shuffled_files(library):
            if characters >= _LIBRARY_CHARACTERS:
                break
            held_out = _number(f"split {library}/{name}") < _HELD_OUT
            for number, text in enumerate(_docstrings(path)):
                if text not in seen:
                    seen.add(text)
                    characters += len(text)
                    passages.append(Passage(library, name, number, text, held_out))
        if not characters:
            raise DataError(
                f"the sample texts are the documentation of installed libraries, and {library} has no source files "
                "with any; install it, or name your own shards with data.train"
            )
    return passages


def _samples(passages: list[Passage], tokenizer: Tokenizer, prefix: str) -> list[tuple[str, dict[str, bytes]]]:
    """(key, members) of the labelled passages, and for training of blocks that hold what remains."""
    left = dict.fromkeys(LIBRARIES, _LABELLED[prefix])
    samples: list[tuple[str, dict[str, bytes]]] = []
    rest: list[Ids] = []
    for one in passages:
        ids = np.array(tokenizer.encode(one.text), dtype=np.int64)
        if left[one.library]:
            left[one.library] -= 1
            label = str(LIBRARIES.index(one.library)).encode()
            first = pack([ids[: BLOCK - 2]], Packing.WITHIN, block=BLOCK, bos=tokenizer.bos, eos=tokenizer.eos)
            samples.append((one.key, {"tokens": pack_ids(first[0], tokenizer.vocabulary), "cls": label}))
            ids = ids[BLOCK - 2 :]
        rest.append(ids)
    if prefix == "train":
        blocks = pack(rest, Packing.ACROSS, block=BLOCK, bos=tokenizer.bos, eos=tokenizer.eos)
        packed = (pack_ids(ids, tokenizer.vocabulary) for ids in blocks)
        samples += [(f"packed/{number:06d}", {"tokens": ids}) for number, ids in enumerate(packed)]
    return samples


def _shuffled_files(library: str) -> list[tuple[str, Path]]:
    """Name and path of a library's source files, in an order that depends on the names alone."""
    root = _root(library)
    if root is None:
        return []
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                relative = path.relative_to(root).with_suffix("").as_posix()
                files.append((re.sub(r"[^\w-]", "-", relative), path))
    return sorted(files, key=lambda file: (_number(f"order {library}/{file[0]}"), file[0]))


def _root(library: str) -> Path | None:
    """Find where a library's source lies, without importing it."""
    if library == "python":
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(library)
    locations = list(found.submodule_search_locations or ()) if found else []
    return Path(locations[0]) if locations else None


def _docstrings(path: Path) -> Iterator[str]:
    """The documentation strings of a file that are long enough; none of a file that has few or cannot be parsed."""
    try:
        source = path.read_bytes()
        quoted = sum(match.end() - match.start() for match in _QUOTED.finditer(source))
        if quoted < max(_LEAST_CHARACTERS, _LEAST_SHARE * len(source)):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are not valid
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= _LEAST_CHARACTERS and not any("\ud800" <= character <= "\udfff" for character in text):
                yield text


def _number(name: str) -> float:
    """A number in [0, 1) that a name alone decides."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=6).digest()) / 2**48
