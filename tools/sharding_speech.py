"""The speech command of ``tools/shard.py``: audio files become clips.

tools/shard.py speech LibriSpeech/train-clean-100 SHARDS
tools/shard.py speech COMMANDS SHARDS --validation 0.1
tools/shard.py speech train.tsv SHARDS --transcripts train.wrd
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is used: the other commands need no data2vec.speech
    from data2vec.speech.folder import AudioFile


@dataclass(frozen=True)
class SpeechSource:
    """What ``tools/shard.py`` asks of a source, for speech: see ``Source`` there."""

    items: Sequence[AudioFile]
    class_names: tuple[str, ...]
    encode: Callable[[AudioFile], dict[str, bytes]]
    settings: str
    modality: str = "speech"
    samples: int | None = None
    beside: Mapping[str, bytes] = field(default_factory=dict)
    scratch: Path | None = None
    unit: str = "files"


def add_speech(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], SpeechSource]:
    """Audio (flac, wav, ogg) in class subfolders, flat, in LibriSpeech's layout, or in a manifest FILE.tsv."""
    parser.add_argument(
        "--transcripts",
        type=Path,
        metavar="FILE",
        help="texts of the clips: lines of PATH<tab>TEXT for a folder, one line per clip for a manifest",
    )
    parser.add_argument("--reencode", action="store_true", help="make what is not mono at 16 kHz 16-bit flac that is")
    parser.add_argument("--no-verify", action="store_true", help="read headers only, do not decode every file")

    def source(arguments: argparse.Namespace) -> SpeechSource:
        from data2vec.speech.folder import list_audio, read_audio_file

        found = list_audio(arguments.folder, arguments.transcripts)
        encode = partial(read_audio_file, verify=not arguments.no_verify, reencode=arguments.reencode)
        settings = f"{arguments.no_verify} {arguments.reencode}"
        return SpeechSource(found.clips, found.class_names, encode, settings)

    return source
