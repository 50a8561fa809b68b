"""Agreement with the fine-tuned models of Hugging Face's transformers, randomly initialised: logits and CTC losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    Data2VecTextForSequenceClassification,
    Data2VecVisionForImageClassification,
)

from data2vec.core import Data2Vec
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.finetuning.recognition import RecognitionTask, Transcribed
from data2vec.core.finetuning.transcripts import Letters
from data2vec.core.settings.finetuning import Case, HeadConfig, LabelConfig, Pool
from data2vec.core.testing import load_module, relative_error
from data2vec.speech.published import load_transformers as load_speech
from data2vec.text.published import load_transformers as load_text
from data2vec.vision.published import load_transformers as load_images

HERE = Path(__file__).parent
images, clips, texts = (
    load_module(f"transformers_{name}_of_heads", HERE / f"test_transformers_{name}.py")
    for name in ("vision", "audio", "text")
)
TOLERANCE = 1e-5
CLASSES = tuple("abcde")


def with_head(
    model: Data2Vec, modality: str, reference: Any, config: HeadConfig, names: dict[str, str]
) -> ClassificationTask:
    """Our classifier with the encoder of a model and the head of theirs."""
    encoder = model.own_state()
    task = ClassificationTask(model.student.single(modality), LabelConfig(classes=CLASSES), config)
    theirs = reference.state_dict()
    head = {
        f"head.{ours}.{kind}": theirs[f"{name}.{kind}"] for ours, name in names.items() for kind in ("weight", "bias")
    }
    task.load_own_state({**task.own_state(), **head})
    task.start_from(encoder)
    return task.eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", images.SHAPES)
def test_images(changes: dict[str, Any]) -> None:
    config = images.configuration(**{**changes, "use_mean_pooling": True, "layer_norm_eps": 1e-6, "num_labels": 5})
    reference = images.randomised(Data2VecVisionForImageClassification(config))
    model = images.ours(config)
    load_images(model, reference.state_dict())
    names = {"norm": "data2vec_vision.pooler.layernorm", "projection": "classifier"}
    task = with_head(model, "vision", reference, HeadConfig(), names)
    pixels = images.pictures(config)
    assert relative_error(task.logits(pixels), reference(pixels).logits) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("shape", texts.SHAPES)
@pytest.mark.parametrize("lengths", [[12, 12], [12, 1, 7], [3]])
def test_texts(shape: Any, lengths: list[int]) -> None:
    torch.manual_seed(0)
    config = texts.theirs(shape)
    config.num_labels = 5
    reference, model = texts.randomised(Data2VecTextForSequenceClassification(config)), texts.ours(shape)
    load_text(model, reference.state_dict())
    head = HeadConfig(pool=Pool.FIRST, norm=False, hidden=True)
    task = with_head(
        model, "text", reference, head, {"hidden": "classifier.dense", "projection": "classifier.out_proj"}
    )
    batch, valid = texts.batch(shape[4], lengths)
    logits = reference(batch.inputs, attention_mask=valid.long()).logits
    assert relative_error(task.logits(batch.inputs, batch.lengths), logits) < TOLERANCE


def recogniser(changes: dict[str, Any]) -> tuple[Data2VecAudioForCTC, RecognitionTask]:
    base = clips.theirs(**changes)
    config: Data2VecAudioConfig = base.config
    config.vocab_size, config.pad_token_id, config.ctc_zero_infinity, config.ctc_loss_reduction = 7, 0, True, "sum"
    torch.manual_seed(3)
    reference = Data2VecAudioForCTC(config)
    reference.data2vec_audio.load_state_dict(base.state_dict())
    model = clips.ours(config)
    load_speech(model, base.state_dict())
    task = RecognitionTask(model.student.single("speech"), Letters(("_", "|", *"abcde"), Case.KEEP))
    head = {f"projection.{kind}": getattr(reference.lm_head, kind) for kind in ("weight", "bias")}
    task.load_own_state({**task.own_state(), **head})
    return reference.eval(), task.eval()


@torch.no_grad()
@pytest.mark.parametrize("changes", clips.SHAPES)
def test_letters(changes: dict[str, Any]) -> None:
    """Each clip alone: padding reaches the clips of transformers."""
    reference, task = recogniser(changes)
    for length, target in ((3_000, [2, 3, 3, 4, 1]), (5_000, [6, 1]), (300, [2, 3, 4, 5, 6] * 30)):
        inputs = torch.randn(1, length, generator=torch.Generator().manual_seed(length))
        targets = torch.tensor([target])
        prepared = Transcribed(inputs, targets, torch.tensor([len(target)]))
        logits, frames = task.logits(prepared)
        theirs = reference(inputs, labels=targets)
        assert relative_error(logits, theirs.logits) < TOLERANCE
        loss: Tensor = task.losses(logits, frames, prepared).sum()
        assert float(loss) == pytest.approx(float(theirs.loss), rel=TOLERANCE)
        assert (float(loss) == 0.0) == (length == 300)  # a transcript longer than its clip
