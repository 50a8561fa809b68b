"""The speech command of ``tools/shard.py``: audio files become clips.

tools/shard.py speech LibriSpeech/train-clean-100 SHARDS
tools/shard.py speech COMMANDS SHARDS --validation 0.1
tools/shard.py speech train.tsv SHARDS --transcripts train.wrd
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data2vec.core.data.shards.source import Source
from data2vec.speech.folder import list_audio, read_audio_file


def add_arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Source]:
    """Audio files, in class subfolders, flat, in LibriSpeech's layout, or in a manifest FILE.tsv."""
    parser.add_argument(
        "--transcripts",
        type=Path,
        metavar="FILE",
        help="texts of the clips: lines of PATH<tab>TEXT for a folder, one line per clip for a manifest",
    )
    parser.add_argument("--reencode", action="store_true", help="make what is not mono at 16 kHz 16-bit flac that is")
    parser.add_argument("--no-verify", action="store_true", help="read headers only, do not decode every file")

    def source(arguments: argparse.Namespace) -> Source:
        found = list_audio(arguments.folder, arguments.transcripts)
        encode = partial(read_audio_file, verify=not arguments.no_verify, reencode=arguments.reencode)
        settings = f"{arguments.no_verify} {arguments.reencode}"
        return Source("speech", found.clips, found.class_names, encode, settings, left_out=found.left_out)

    return source
