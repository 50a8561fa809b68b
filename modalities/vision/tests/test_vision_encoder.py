"""A run as a function from images to features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image

from data2vec.core import Data2Vec, Experiment
from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.settings.fields import TransformerConfig
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.settings.pretraining import TargetsConfig
from data2vec.vision import MaskConfig, Vision, load_encoder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has saved one checkpoint."""
    experiment = Experiment(
        name="tiny",
        modalities={"vision": Vision(image_size=16, patch_size=4, mask=MaskConfig(min_block=2))},
        transformer=TransformerConfig(depth=2, width=16, heads=2),
        targets=TargetsConfig(top_k=2),
    )
    model = Data2Vec.build(experiment)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(experiment))
    checkpoint.save(folder / "checkpoints", 3, checkpoint.Checkpoint({"model": model.own_state()}, {}), keep=1)
    return folder


def test_files_images_and_tensors_give_the_same_features(run: Path, tmp_path: Path) -> None:
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    image.save(tmp_path / "noise.png")
    encoder = load_encoder(run, device="cpu")
    assert encoder.run.update == 3
    from_file = encoder([tmp_path / "noise.png"])
    assert from_file.shape == (1, 16)
    assert from_file.dtype is torch.float32
    torch.testing.assert_close(encoder([image]), from_file)
    torch.testing.assert_close(encoder(encoder.prepare([image])), from_file)
    patches = encoder.patches([image, image])
    assert patches.shape == (2, 4, 4, 16)
    torch.testing.assert_close(patches[1].mean((0, 1)), from_file[0])


def test_one_is_a_batch_of_one_and_none_an_empty_batch(run: Path, tmp_path: Path) -> None:
    image = Image.effect_noise((40, 30), 80).convert("RGB")
    path = tmp_path / "noise.png"
    image.save(path)
    encoder = load_encoder(run, device="cpu")
    right = encoder([image])
    for one in (image, path, str(path), encoder.prepare(image), encoder.prepare(image)[0], (each for each in [image])):
        torch.testing.assert_close(encoder(one), right)
    assert encoder.prepare(str(path)).shape == (1, 3, 16, 16)
    assert encoder.patches(path).shape == (1, 4, 4, 16)
    for none in ([], (), iter([]), encoder.prepare([])):
        assert encoder(none).shape == (0, 16)
    assert encoder.patches([]).shape == (0, 4, 4, 16)
    assert encoder.prepare([]).shape == (0, 3, 16, 16)


def test_files_and_images_are_seen_as_in_training(run: Path, tmp_path: Path) -> None:
    """Upright, on white, and of formats that no shard holds; names do not count."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    picture.putalpha(picture.getchannel("R"))
    path = tmp_path / "phone.jpg"
    picture.save(path, "TIFF", exif=exif)
    encoder = load_encoder(run, device="cpu")
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    right = encoder(on_white.convert("RGB").transpose(Image.Transpose.ROTATE_270))
    torch.testing.assert_close(encoder(path), right)
    with Image.open(path) as opened:
        torch.testing.assert_close(encoder(opened), right)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as cut, pytest.raises(SampleError, match="image 1 of those given is no usable image: "):
        encoder([picture, cut])


def test_teacher_and_student_start_equal_and_layers_differ(run: Path) -> None:
    image = Image.effect_noise((16, 16), 80)
    teacher, student = (load_encoder(run, of=of, device="cpu")([image]) for of in ("teacher", "student"))
    torch.testing.assert_close(teacher, student)
    last = load_encoder(run, layers="last", device="cpu")([image])
    assert not torch.allclose(teacher, last)


def test_unusable_files_are_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    encoder = load_encoder(run, device="cpu")
    with pytest.raises(SampleError, match=r"broken\.png"):
        encoder([tmp_path / "broken.png"])
    with pytest.raises(SampleError, match=r"absent\.png"):
        encoder([tmp_path / "absent.png"])


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there"):
        load_encoder(tmp_path)
