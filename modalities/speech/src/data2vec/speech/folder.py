"""Audio files as they become shards: folders, LibriSpeech's layout, and manifests.

- A folder whose subfolders are classes, or a flat one.
- A folder with ``*.trans.txt`` files, as LibriSpeech has (``SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac``): a line
  is an utterance, a blank and its text. There are no classes.
- A manifest ``*.tsv``: its first line is the root folder, relative to the manifest; then a path, a tab, and the file's
  number of samples in time (fairseq's format) or its text.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from data2vec.core.errors import DataError, SampleError
from data2vec.speech.audio import RATE, decode, read_header
from data2vec.speech.loader import EXTENSIONS

_SUFFIXES = {f".{extension}": extension for extension in EXTENSIONS} | {".oga": "ogg"}
_TRANSCRIPTS = ".trans.txt"
_LONGEST_TEXT = 100_000  # characters


@dataclass(frozen=True)
class AudioFile:
    """One clip: its key in a shard (unique in its set, no dots), and what is known of it.

    ``frames``: samples in time that a manifest promises.
    """

    key: str
    path: Path
    label: int | None = None
    text: str | None = None
    frames: int | None = None

    def describe(self) -> str:
        """Changes when the file does."""
        about = f"{self.key} {self.path} {self.label} {self.text} {self.frames}"
        try:
            status = self.path.stat()
        except OSError:
            return f"{about} missing"
        return f"{about} {status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class AudioFolder:
    """The clips of a set in the order of their paths or lines; ``class_names`` is empty where there are no classes."""

    clips: tuple[AudioFile, ...]
    class_names: tuple[str, ...] = ()


def list_audio(source: Path, transcripts: Path | None = None) -> AudioFolder:
    """The clips of a folder or a manifest; see the top of this file. Hidden files and folders are skipped.

    Args:
        source: a folder, or a manifest ``*.tsv``.
        transcripts: texts of the clips. For a folder lines of a path in it, a tab and the text; for a manifest a text
            per line, in its order (fairseq's ``.wrd`` and ``.ltr``).

    Raises:
        DataError: no such folder or file, no audio in it, a manifest with a line that is none or a path outside its
            root, classes that cannot be told, or texts that do not fit.
    """
    if source.is_file():
        found = list_manifest(source)
        return found if transcripts is None else _with_lines(found, transcripts)
    found = list_audio_folder(source)
    if transcripts is None:
        return found
    texts = _read_table(transcripts, source)
    clips = tuple(replace(clip, text=texts.get(clip.path, clip.text)) for clip in found.clips)
    if not any(clip.path in texts for clip in clips):
        raise DataError(f"{transcripts}: none of its {len(texts)} paths is a clip of {source}")
    return replace(found, clips=clips)


def list_audio_folder(folder: Path) -> AudioFolder:
    """The flac, wav and ogg files of a folder, at any depth.

    Raises:
        DataError: no such folder, no audio in it, or clips both in the folder itself and in class subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of audio, and no manifest")
    paths, tables = _walk(folder)
    if not paths:
        raise DataError(f"{folder}: has no audio ({', '.join(_SUFFIXES)})")
    parts = [path.relative_to(folder).parts for path in paths]
    flat = sum(len(part) == 1 for part in parts)
    texts = _librispeech_texts(tables)
    if 0 < flat < len(paths) and not tables:
        raise DataError(
            f"{folder}: has {flat} clips beside class subfolders with {len(paths) - flat}; "
            "move them into a class, or all into one flat folder"
        )
    class_names = () if flat or tables else tuple(sorted({part[0] for part in parts}))
    numbers = {name: number for number, name in enumerate(class_names)}
    keys: set[str] = set()
    clips = [
        AudioFile(_unique_key(part, keys), path, numbers.get(part[0]), texts.get(path.with_suffix("")))
        for path, part in zip(paths, parts, strict=True)
    ]
    return AudioFolder(tuple(clips), class_names)


def list_manifest(path: Path) -> AudioFolder:
    """The clips of a manifest.

    Raises:
        DataError: it cannot be read, names no root folder or no clip, has a line that is none, or a path that leaves
            the root folder.
    """
    lines = _lines(path)
    root = path.parent / lines[0].strip() if lines and lines[0].strip() else None
    if root is None or not root.is_dir():
        shown = repr(lines[0].strip()[:80]) if lines else "nothing"
        raise DataError(f"{path}: its first line must be the folder that its paths start from, not {shown}")
    rows = [(number, *line.partition("\t")) for number, line in enumerate(lines[1:], start=2) if line.strip()]
    if not rows:
        raise DataError(f"{path}: names no clip")
    counted = all(re.fullmatch(r"[0-9]{1,15}", rest.strip()) for *_, rest in rows)
    keys: set[str] = set()
    clips = []
    for number, name, tab, rest in rows:
        if not tab:
            raise DataError(f"{path}, line {number}: no tab between a path and its number of samples or its text")
        relative = _inside(name.strip(), root, f"{path}, line {number}")
        frames, text = (int(rest), None) if counted else (None, rest.strip())
        clips.append(AudioFile(_unique_key(relative.parts, keys), root / relative, None, text, frames))
    return AudioFolder(tuple(clips))


def read_audio_file(clip: AudioFile, *, verify: bool = True, reencode: bool = False) -> dict[str, bytes]:
    """The members of a sample: the audio as it is, ``cls`` with its class number and ``txt`` with its text.

    Args:
        clip: what to read.
        verify: decode it, to see that it is whole; else only its header is read.
        reencode: store what is not mono at 16 kHz as 16-bit flac that is.

    Raises:
        SampleError: it cannot be read, is no audio, or not as long as its manifest says.
    """
    extension = _SUFFIXES.get(clip.path.suffix.lower())
    if extension is None:
        raise SampleError(f"{clip.path}: is none of {', '.join(_SUFFIXES)}")
    try:
        data = clip.path.read_bytes()
        header = read_header(data)
        if clip.frames is not None and clip.frames != header.frames:
            raise SampleError(f"holds {header.frames} samples, its manifest says {clip.frames}")
        if reencode and (header.channels, header.rate) != (1, RATE):
            extension, data = "flac", _flac(data)
        elif verify:
            decode(data)
    except OSError as error:
        raise SampleError(f"{clip.path}: cannot be read ({error.strerror})") from None
    except SampleError as error:
        raise SampleError(f"{clip.path}: {error}") from None
    members = {extension: data}
    if clip.label is not None:
        members["cls"] = str(clip.label).encode()
    if clip.text is not None:
        members["txt"] = clip.text.encode("utf-8", "replace")
    return members


def _flac(data: bytes) -> bytes:
    import soundfile

    waveform = decode(data)
    target = io.BytesIO()
    soundfile.write(target, waveform.clip(-1.0, 1.0), RATE, format="FLAC", subtype="PCM_16")
    return target.getvalue()


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Audio files and LibriSpeech's tables of texts, each in the order of their paths."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    audio, tables = [], []
    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in _SUFFIXES:
                audio.append(Path(root, name))
            elif name.endswith(_TRANSCRIPTS):
                tables.append(Path(root, name))
    return sorted(audio, key=lambda path: path.parts), sorted(tables)


def _librispeech_texts(tables: Sequence[Path]) -> Mapping[Path, str]:
    """Texts by the path of their clip without its suffix."""
    texts = {}
    for table in tables:
        for line in _lines(table):
            name, _, text = line.strip().partition(" ")
            if name:
                texts[table.parent / name] = text.strip()
    return texts


def _read_table(path: Path, folder: Path) -> dict[Path, str]:
    """Texts by path, from lines of a path in ``folder``, a tab and a text."""
    texts = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name, tab, text = line.partition("\t")
        if not tab:
            raise DataError(f"{path}, line {number}: no tab between a path and its text")
        texts[folder / _inside(name.strip(), folder, f"{path}, line {number}")] = text.strip()
    return texts


def _with_lines(found: AudioFolder, path: Path) -> AudioFolder:
    lines = _lines(path)
    if len(lines) != len(found.clips):
        raise DataError(f"{path}: has {len(lines)} lines for {len(found.clips)} clips; give one text each, in order")
    return replace(
        found, clips=tuple(replace(clip, text=line.strip()) for clip, line in zip(found.clips, lines, strict=True))
    )


def _inside(name: str, root: Path, where: str) -> PurePath:
    """The path relative to ``root``.

    Raises:
        DataError: it is empty or leads out of ``root``.
    """
    path = PurePath(name)
    if path.is_absolute() and path.is_relative_to(root):
        path = path.relative_to(root)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise DataError(f"{where}: {name[:80]!r} is no path in {root}; paths must not leave that folder")
    return path


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no text in UTF-8") from None
    if lines and not lines[-1]:
        lines.pop()
    if any(len(line) > _LONGEST_TEXT for line in lines):
        raise DataError(f"{path}: has a line of more than {_LONGEST_TEXT} characters; it is no list of clips")
    return lines


def _unique_key(parts: tuple[str, ...], taken: set[str]) -> str:
    """A key from a relative path: no dots and nothing that a tar file or WebDataset reads in a way of its own."""
    stem = (*parts[:-1], os.path.splitext(parts[-1])[0])
    base = "/".join(re.sub(r"[^\w-]", "_", part) for part in stem)
    if base.startswith("__"):
        base = f"x{base}"
    key, number = base, 2
    while key in taken:
        key, number = f"{base}-{number}", number + 1
    taken.add(key)
    return key
