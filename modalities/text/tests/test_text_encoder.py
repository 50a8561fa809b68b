"""A run as a function from texts to features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data2vec.core import Data2Vec, Experiment
from data2vec.core.checkpoints import checkpoint
from data2vec.core.errors import CheckpointError, SampleError
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.overrides import to_yaml
from data2vec.core.settings.pretraining import TargetsConfig
from data2vec.text import Text, Tokenizer, load_encoder
from data2vec.text.tokenizer import FILE_NAME, train_bpe

TEXTS = ["the cat sat on the mat", "the dog", "a mat"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS * 20, 280)


@pytest.fixture
def run(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """The folder of a run that has saved one checkpoint, and its tokenizer."""
    experiment = Experiment(
        name="tiny",
        modalities={"text": Text(vocabulary=280, block=16)},
        transformer=TransformerConfig(depth=2, width=16, heads=2, norm_order=NormOrder.POST),
        targets=TargetsConfig(top_k=2),
    )
    model = Data2Vec.build(experiment)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(experiment))
    (folder / FILE_NAME).write_bytes(tokenizer.content)
    checkpoint.save(folder / "checkpoints", 3, checkpoint.Checkpoint({"model": model.own_state()}, {}), keep=1)
    return folder


def test_texts_and_their_tokens_give_the_same_features(run: Path) -> None:
    encoder = load_encoder(run, device="cpu")
    assert encoder.run.update == 3
    features = encoder(TEXTS)
    assert features.shape == (3, 16)
    assert features.dtype is torch.float32
    torch.testing.assert_close(encoder(encoder.prepare(TEXTS)), features)
    for index, text in enumerate(TEXTS):  # whatever else is in the batch
        torch.testing.assert_close(encoder([text])[0], features[index])


def test_the_runs_tokenizer_is_used_and_texts_are_cut_to_a_block(run: Path, tokenizer: Tokenizer) -> None:
    encoder = load_encoder(run, device="cpu")
    batch = encoder.prepare([TEXTS[1], "the cat " * 50])
    ids = tokenizer.encode(TEXTS[1])
    assert batch.inputs.shape == (2, 16)
    assert batch.lengths is not None
    assert batch.lengths.tolist() == [len(ids) + 2, 16]
    assert batch.inputs[0].tolist() == [0, *ids, 2, *[1] * (14 - len(ids))]
    assert batch.inputs[1, [0, -1]].tolist() == [0, 2]


def test_one_vector_for_each_token_and_their_mean(run: Path) -> None:
    encoder = load_encoder(run, device="cpu")
    tokens = encoder.tokens(TEXTS[:2])
    assert tokens.padding is not None
    valid = (~tokens.padding).sum(1).tolist()
    for index, length in enumerate(valid):
        torch.testing.assert_close(encoder(TEXTS[:2])[index], tokens.x[index, :length].mean(0))


def test_teacher_and_student_start_equal_and_layers_differ(run: Path) -> None:
    teacher, student = (load_encoder(run, of=of, device="cpu")(TEXTS) for of in ("teacher", "student"))
    torch.testing.assert_close(teacher, student)
    assert not torch.allclose(teacher, load_encoder(run, layers="last", device="cpu")(TEXTS))


def test_unusable_texts_are_named(run: Path) -> None:
    encoder = load_encoder(run, device="cpu")
    with pytest.raises(SampleError, match="text 1: "):
        encoder(["the cat", "  "])
    for wrong in (b"bytes", 3, None, [b"bytes"], ["text", 3]):
        with pytest.raises(SampleError, match="a text is a str, not "):
            encoder(wrong)  # type: ignore[arg-type]


def test_one_text_is_a_batch_of_one_and_none_a_batch_of_none(run: Path) -> None:
    encoder = load_encoder(run, device="cpu")
    torch.testing.assert_close(encoder("the dog"), encoder(["the dog"]))
    torch.testing.assert_close(encoder.tokens("the dog").x, encoder.tokens(["the dog"]).x)
    assert torch.equal(encoder.prepare("the dog").inputs, encoder.prepare(["the dog"]).inputs)
    torch.testing.assert_close(encoder(text for text in TEXTS), encoder(TEXTS))
    assert encoder([]).shape == (0, 16)
    assert encoder.tokens([]).x.shape == (0, 0, 16)
    assert len(encoder.prepare([])) == 0


def test_no_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run there"):
        load_encoder(tmp_path)
