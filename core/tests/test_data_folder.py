"""People's folders: what is found is used or counted, whatever links lead to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data2vec.core.data.folder import HIDDEN, LOOP, PLAIN, SPECIAL, count_left_out, list_files, unique_key
from data2vec.core.errors import DataError


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def _images(name: str) -> bool:
    return name.endswith(".jpg")


def test_every_file_is_found_or_counted(tmp_path: Path) -> None:
    _touch(tmp_path / "b/2.JPG", tmp_path / "b/1.jpg", tmp_path / "a/x.gif", tmp_path / "a/y.GIF", tmp_path / "notes")
    _touch(tmp_path / ".hidden.jpg", tmp_path / ".cache/3.jpg", tmp_path / ".cache/4.txt")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = list_files(tmp_path, _images)
    assert [path.relative_to(tmp_path).as_posix() for path in found.paths] == ["b/1.jpg", "b/2.JPG"]
    assert found.left_out == {".gif": 2, PLAIN: 1, HIDDEN: 3, SPECIAL: 1}
    assert found.total == 9
    assert count_left_out(found.left_out) == "3 hidden, 2 .gif, 1 no regular file, 1 without an ending"


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    _touch(tmp_path / "store/deep/1.jpg", tmp_path / "store/2.jpg")
    images = tmp_path / "images"
    images.mkdir()
    (images / "cat").symlink_to(tmp_path / "store")
    (images / "dog").symlink_to(tmp_path / "store/deep")
    found = list_files(images, _images)
    assert [path.relative_to(images).as_posix() for path in found.paths] == ["cat/2.jpg", "cat/deep/1.jpg", "dog/1.jpg"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    _touch(tmp_path / "a/1.jpg")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = list_files(tmp_path, _images)
    # A link without a target is a file that cannot be read: whoever reads it says so.
    assert [path.name for path in found.paths] == ["1.jpg", "gone.jpg"]
    assert found.left_out == {LOOP: 1, PLAIN: 1}


def test_folder_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        list_files(tmp_path / "nowhere", _images)


def test_keys_are_unique_and_have_no_dots() -> None:
    taken: set[str] = set()
    paths = [("a", "x.1.jpg"), ("a", "x_1.jpg"), ("__b", "y.jpg")]
    assert [unique_key(parts, taken) for parts in paths] == ["a/x_1", "a/x_1-2", "x__b/y"]
