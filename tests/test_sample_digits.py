"""The sample images, which come with the workspace's demo group and with no package."""

from __future__ import annotations

import tarfile
from dataclasses import replace

from data2vec.core.batch import Sample
from data2vec.vision import Vision
from data2vec.vision.samples import SIDE, _find, _read


def test_the_sample_shards_hold_the_digits(tmp_path, monkeypatch):
    images, labels = (array[::10] for array in _read(_find()))  # 50 of each class
    monkeypatch.setattr("data2vec.vision.samples._read", lambda path: (images, labels))
    monkeypatch.setattr("data2vec.vision.samples._VALIDATION_OF_CLASS", 10)
    vision = replace(Vision(), image_size=SIDE, patch_size=4, channels=1, mean=(0.13,), std=(0.31,))
    vision.exhibit.write_sample_shards(tmp_path)
    found = {"train": [], "validation": []}
    decode = replace(vision, evaluation_crop=1.0).build_decoder(train=False)
    for path in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()}
        for name in sorted(name for name in members if name.endswith(".png")):
            key = name.removesuffix(".png")
            raw = Sample(key, path.name, 0, {"png": members[name], "cls": members[f"{key}.cls"]})
            example = decode(raw, 0)
            assert example.label == labels[int(key)]
            pixels = (example.inputs[0] * 0.31 + 0.13) * 255
            assert (pixels.round().numpy() == images[int(key)]).all()
            found[path.name.split("-")[0]].append(example.label)
    assert sorted(found["validation"]) == sorted(list(range(10)) * 10)
    assert sorted(found["train"]) == sorted(list(range(10)) * 40)
    assert (tmp_path / "index.json").is_file()
