"""Audio files as they become shards: folders, LibriSpeech's layout, and manifests.

Flac, wav, ogg, opus and mp3 files become members as they are. Aiff, au, caf, w64 and NIST's sph, which no member is,
become flac.

- A folder whose subfolders are classes, or a flat one.
- A folder with ``*.trans.txt`` files, as LibriSpeech has (``SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac``): a line
  is an utterance, a blank and its text. There are no classes.
- A manifest ``*.tsv``: its first line is the root folder, relative to the manifest; then a path, a tab, and the file's
  number of samples in time (fairseq's format) or its text.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from data2vec.core.data.folder import count_left_out, list_files, unique_key
from data2vec.core.data.plain import decode_text
from data2vec.core.errors import DataError, SampleError
from data2vec.speech.audio import CONTAINERS, CONVERTED, RATE, decode, read_header
from data2vec.speech.containers import complete
from data2vec.speech.loader import EXTENSIONS, audible

_SUFFIXES = {f".{extension}": extension for extension in EXTENSIONS} | {".oga": "ogg", ".wave": "wav"}
_ENDINGS = (*_SUFFIXES, *(ending for endings in CONVERTED.values() for ending in endings))
_TRANSCRIPTS = ".trans.txt"
_READ = "read as transcripts"
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
    """The clips of a set in the order of their paths or lines; ``class_names`` is empty where there are no classes.

    ``left_out``: how many other files a folder holds, by ending or by what they are.
    """

    clips: tuple[AudioFile, ...]
    class_names: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def list_audio(source: Path, transcripts: Path | None = None) -> AudioFolder:
    """The clips of a folder or a manifest; see the top of this file. Links are followed.

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
    return replace(found, clips=clips, left_out=_read_inside(found.left_out, transcripts, source))


def list_audio_folder(folder: Path) -> AudioFolder:
    """The audio files of a folder, at any depth.

    Raises:
        DataError: no such folder, no audio in it, or clips both in the folder itself and in class subfolders.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of audio, and no manifest")
    listing = list_files(folder, lambda name: name.endswith((*_ENDINGS, _TRANSCRIPTS)))
    tables = [path for path in listing.paths if path.name.lower().endswith(_TRANSCRIPTS)]
    paths = [path for path in listing.paths if not path.name.lower().endswith(_TRANSCRIPTS)]
    left_out = dict(listing.left_out) | ({_READ: len(tables)} if tables else {})
    if not paths:
        held = f"; it holds {count_left_out(left_out)}" if left_out else ""
        raise DataError(f"{folder}: has no audio ({', '.join(_ENDINGS)}){held}")
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
        AudioFile(unique_key(part, keys), path, numbers.get(part[0]), texts.get(path.with_suffix("")))
        for path, part in zip(paths, parts, strict=True)
    ]
    return AudioFolder(tuple(clips), class_names, left_out)


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
        frames, text = (int(rest), None) if counted else (None, _text(rest, f"{path}, line {number}"))
        clips.append(AudioFile(unique_key(relative.parts, keys), root / relative, None, text, frames))
    return AudioFolder(tuple(clips))


def read_audio_file(clip: AudioFile, *, verify: bool = True, reencode: bool = False) -> dict[str, bytes]:
    """The members of a sample: the audio as it is, ``cls`` with its class number and ``txt`` with its text.

    Where the header does not say how long the audio is, it does in the member. What the loader does not decode becomes
    flac, as with ``reencode``.

    Args:
        clip: what to read.
        verify: decode it, to see that it is whole and not silent; else only its header is read.
        reencode: store what is not mono at 16 kHz as 16-bit flac that is.

    Raises:
        SampleError: it cannot be read, is no audio, is cut short or silent, or not as long as its manifest says.
    """
    suffix = clip.path.suffix.lower()
    if suffix not in _ENDINGS:
        raise SampleError(f"{clip.path}: is none of {', '.join(_ENDINGS)}")
    try:
        data = complete(clip.path.read_bytes())
        header = read_header(data, converted=True)
        if clip.frames is not None and clip.frames != header.frames:
            raise SampleError(f"holds {header.frames} samples, its manifest says {clip.frames}")
        if header.container in CONVERTED or (reencode and (header.channels, header.rate) != (1, RATE)):
            extension, data = "flac", _flac(data)
        else:
            extension = _SUFFIXES.get(suffix, CONTAINERS[header.container])
        if verify:  # what is stored, as the loader will
            audible(decode(data))
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

    waveform = decode(data, converted=True)
    target = io.BytesIO()
    soundfile.write(target, waveform.clip(-1.0, 1.0), RATE, format="FLAC", subtype="PCM_16")
    return target.getvalue()


def _read_inside(left_out: Mapping[str, int], table: Path, folder: Path) -> Mapping[str, int]:
    """Count a table of texts that lies in the folder itself as read."""
    ending = table.suffix.lower()
    if not table.resolve().is_relative_to(folder.resolve()) or not left_out.get(ending):
        return left_out
    counts = Counter(left_out)
    counts[ending] -= 1
    counts[_READ] += 1
    return dict(+counts)


def _librispeech_texts(tables: Sequence[Path]) -> Mapping[Path, str]:
    """Texts by the path of their clip without its suffix."""
    texts = {}
    for table in tables:
        for number, line in enumerate(_lines(table), start=1):
            name, _, text = line.strip().partition(" ")
            if name:
                texts[table.parent / name] = _text(text, f"{table}, line {number}")
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
        texts[folder / _inside(name.strip(), folder, f"{path}, line {number}")] = _text(text, f"{path}, line {number}")
    return texts


def _with_lines(found: AudioFolder, path: Path) -> AudioFolder:
    lines = _lines(path)
    if len(lines) != len(found.clips):
        raise DataError(f"{path}: has {len(lines)} lines for {len(found.clips)} clips; give one text each, in order")
    texts = [_text(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    clips = tuple(replace(clip, text=text) for clip, text in zip(found.clips, texts, strict=True))
    return replace(found, clips=clips)


def _text(text: str, where: str) -> str:
    if "\0" in text:
        raise DataError(f"{where}: the text holds a zero character; mend or remove the line")
    return text.strip()


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
        lines = decode_text(path.read_bytes()).replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if lines and not lines[-1]:
        lines.pop()
    if any(len(line) > _LONGEST_TEXT for line in lines):
        raise DataError(f"{path}: has a line of more than {_LONGEST_TEXT} characters; it is no list of clips")
    return lines
