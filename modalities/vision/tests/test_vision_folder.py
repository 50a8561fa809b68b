"""Image folders: classes, keys, and what is no image."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from data2vec.core.errors import DataError, SampleError
from data2vec.vision.folder import list_image_folder, read_image_file


def image(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB", **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path, **settings)
    return path


def test_class_folders_are_sorted_and_nested_files_found(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/a.JPG", "cat/c.webp", ".hidden/x.png", "cat/.x.png"):
        image(tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/read.txt").touch()
    found = list_image_folder(tmp_path)
    assert found.class_names == ("cat", "dog")
    assert [(i.key, i.label) for i in found.images] == [("cat/c", 0), ("cat/deep/a", 0), ("dog/b", 1)]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    path = image(tmp_path / "a.jpeg")
    found = list_image_folder(tmp_path)
    assert (found.class_names, found.images[0].label) == ((), None)
    assert read_image_file(found.images[0]) == {"jpg": path.read_bytes()}


def test_folders_that_are_no_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_image_folder(tmp_path / "gone")
    with pytest.raises(DataError, match="has no images"):
        list_image_folder(tmp_path)
    image(tmp_path / "a.png")
    image(tmp_path / "cat/b.png")
    with pytest.raises(DataError, match="1 images beside class subfolders with 1"):
        list_image_folder(tmp_path)


stems = st.text(st.characters(categories=("L", "N", "P", "Zs"), exclude_characters="/"), min_size=1, max_size=15)


@settings(max_examples=30, deadline=None)
@given(st.sets(stems.filter(lambda s: not s.startswith(".")), min_size=1, max_size=8))
def test_keys_are_unique_and_survive_a_tar_file(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("keys")
    for name in names:
        (folder / f"{name}.png").touch()
        (folder / f"{name}.jpg").touch()
    keys = [found.key for found in list_image_folder(folder).images]
    assert len(set(keys)) == 2 * len(names)
    assert all(base_plus_ext(f"{key}.png") == (key, "png") and not key.startswith("__") for key in keys)


def test_what_is_no_image_is_a_sample_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    (found,) = list_image_folder(tmp_path).images
    with pytest.raises(SampleError, match=r"a\.jpg: is no usable image"):
        read_image_file(found)
    assert read_image_file(found, verify=False) == {"jpg": b"not an image"}


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "RGB"), ("a.png", "RGBA"), ("a.webp", "RGB"), ("a.jpg", "CMYK")])
def test_large_images_shrink_to_the_short_side(tmp_path: Path, name: str, mode: str) -> None:
    path = image(tmp_path / "x" / name, (80, 40), mode)
    (found,) = list_image_folder(tmp_path).images
    (shrunk,) = (data for key, data in read_image_file(found, max_size=20).items() if key != "cls")
    with Image.open(io.BytesIO(shrunk)) as picture:
        assert picture.size == (40, 20)
    assert path.read_bytes() in read_image_file(found, max_size=40).values()


def test_linked_class_folders_are_followed_and_other_files_counted(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "all", tmp_path / "disk"
    image(folder / "cat/a.png")
    image(elsewhere / "b.gif", mode="P")
    (folder / "dog").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(elsewhere)
    for name in ("c.heic", "d.HEIC", "Thumbs.db", ".DS_Store"):
        (folder / "cat" / name).touch()
    found = list_image_folder(folder)
    assert [(each.key, each.label) for each in found.images] == [("cat/a", 0), ("dog/b", 1)]
    assert found.class_names == ("cat", "dog")
    assert found.left_out == {".heic": 2, ".db": 1, "hidden": 1, "link back to a folder above": 1}
    (folder / "cat/a.png").unlink()
    (folder / "dog").unlink()
    with pytest.raises(DataError, match=r"has no images \(.*\); it has 2 \.heic, 1 \.db, 1 hidden"):
        list_image_folder(folder)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    (found,) = list_image_folder(tmp_path).images
    assert "a.jpg" in found.describe()
    with pytest.raises(SampleError, match=r"a\.jpg: cannot be read \(No such file or directory\)"):
        read_image_file(found)
