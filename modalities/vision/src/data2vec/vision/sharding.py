"""The vision command of ``tools/shard.py``: image files become samples.

tools/shard.py vision IMAGES_FOLDER SHARDS --validation 0.1
tools/shard.py vision ImageNet/train SHARDS --max-size 256
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

from data2vec.core.data.shards.source import Source, positive
from data2vec.vision.folder import list_image_folder, read_image_file


def add_arguments(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], Source]:
    """Images in class subfolders, or flat."""
    parser.add_argument("--max-size", type=positive, metavar="N", help="re-encode larger images to a short side of N")
    parser.add_argument("--no-verify", action="store_true", help="do not decode every image to see whether it is one")

    def source(arguments: argparse.Namespace) -> Source:
        found = list_image_folder(arguments.folder)
        encode = partial(read_image_file, verify=not arguments.no_verify, max_size=arguments.max_size)
        settings = f"{arguments.max_size} {arguments.no_verify}"
        return Source("vision", found.images, found.class_names, encode, settings, left_out=found.left_out)

    return source
