"""Agreement with the authors' fine-tuned classifiers: of images (2.0), and of texts (1.0 and 2.0)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from data2vec.core import Batch
from data2vec.core.data.stream.reading import preserved_generators, seed_generators
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.finetuning.labels import one_hot
from data2vec.core.hashing import derive
from data2vec.core.settings.fields import NormOrder, OptimConfig, TransformerConfig
from data2vec.core.settings.finetuning import Classification as Settings
from data2vec.core.settings.finetuning import HeadConfig, LabelConfig, MixConfig, Pool
from data2vec.core.testing import Golden, load_module, relative_error
from data2vec.text import Text
from data2vec.text import published as of_text
from data2vec.vision import PositionKind, Vision
from data2vec.vision import published as of_images
from data2vec.vision.augment import _MIX, ImageMixer

released = load_module("released", Path(__file__).with_name("released.py"))
TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
TINY = TransformerConfig(depth=2, width=32, heads=4, mlp_ratio=3.0, norm_order=NormOrder.POST, norm_eps=1e-6)
CLASSES = tuple("0123456789")


def image_name(name: str) -> str:
    """Our name of one of their parameters."""
    heads = {"fc_norm": "head.norm", "head": "head.projection"}
    part, _, kind = name.rpartition(".")
    if part in heads:
        return f"{heads[part]}.{kind}"
    ours = of_images.our_name(name.removeprefix("model."))
    assert ours is not None
    return ours.replace("student.", "backbone.encoder.")


class TestImages:
    @pytest.fixture
    def golden(self) -> Golden:
        golden: Golden = released.released("image2_classification")[0]
        return golden

    @pytest.fixture
    def task(self) -> ClassificationTask:
        vision = Vision(
            image_size=32, patch_size=8, positions=PositionKind.SINE, blocks=1, input_norm=True, mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )  # fmt: skip
        recipe = Settings(
            modalities={"vision": vision}, transformer=TINY, labels=LabelConfig(classes=CLASSES, smoothing=0.1),
            layer_decay=0.65, layer_decay_embeddings=False,
        )  # fmt: skip
        task = ClassificationTask.build(recipe)
        weights = released.released("image2_classification")[1]
        encoder = {name.removeprefix("model."): v for name, v in weights.items() if name.startswith("model.")}
        head = {image_name(name): v for name, v in weights.items() if not name.startswith("model.")}
        released.loaded(task, of_images.student_state(encoder), head)
        return task

    def test_outputs(self, task: ClassificationTask, golden: Golden) -> None:
        features, _ = task.backbone(golden["input"])
        assert relative_error(features, golden["encoder"]) < TOLERANCE
        assert relative_error(task.logits(golden["input"]), golden["logits"]) < TOLERANCE

    def test_losses(self, task: ClassificationTask, golden: Golden) -> None:
        labels, logits = golden["labels"].long(), task.logits(golden["input"])
        assert relative_error(task.losses(logits, one_hot(labels, 10)), golden["loss_eval"]) < TOLERANCE
        batch = Batch("vision", golden["input"], torch.arange(4), labels)
        prepared = task.prepare(batch, seed=0, update=0)
        assert relative_error(task.losses(logits, prepared.targets), golden["loss_smoothed"]) < TOLERANCE
        step = task(prepared)
        assert relative_error(step.total, golden["loss_smoothed"].sum()) < TOLERANCE

    @pytest.mark.parametrize("case", [0, 1, 2])
    def test_mixed_samples(self, task: ClassificationTask, golden: Golden, case: int) -> None:
        """The loss of their mixed images and labels."""
        targets = golden[f"mixup_{case}/labels"]
        logits = task.logits(golden[f"mixup_{case}/input"])
        assert relative_error(task.losses(logits, targets), golden[f"mixup_{case}/loss"]) < TOLERANCE

    def test_mixtures(self, golden: Golden) -> None:
        """The mixer gives what timm's Mixup gives with labels, for the same draws."""
        mixer = ImageMixer(MixConfig(0.7, 1.0, 0.9, 0.5))
        whole = Mixup(0.7, 1.0, None, 0.9, 0.5, label_smoothing=0.1, num_classes=10)
        labels, inputs = golden["labels"].long(), golden["input"]
        kinds = set()
        for update in range(40):
            mixed, targets = mixer(inputs, one_hot(labels, 10, 0.1), torch.arange(4), seed=3, update=update)
            with preserved_generators():
                seed_generators(derive(3, update, 0, _MIX))
                theirs, wanted = whole(inputs.clone(), labels)
            assert torch.equal(mixed, theirs)
            torch.testing.assert_close(targets, wanted)
            kinds.add("none" if torch.equal(mixed, inputs) else "mixed")
        assert kinds == {"none", "mixed"}

    def test_gradients(self, task: ClassificationTask, golden: Golden) -> None:
        batch = Batch("vision", golden["input"], torch.arange(4), golden["labels"].long())
        task(task.prepare(batch, seed=0, update=0)).loss.backward()
        errors = released.gradient_errors(task, golden, lambda name: (image_name(name), slice(None)))
        assert len(errors) == 45
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors

    def test_rates_and_decays(self, task: ClassificationTask, golden: Golden) -> None:
        groups = {
            id(parameter): group
            for group in task.groups(OptimConfig(weight_decay=0.05))
            for parameter in group.parameters
        }
        ours = dict(task.named_parameters())
        rates, decays = golden.meta["lr_scale"], golden.meta["weight_decay_scale"]
        still = set(golden.meta["no_gradient"])
        for name, rate in rates.items():
            if name in still:
                continue
            group = groups[id(ours[image_name(name)])]
            assert group.lr_scale == pytest.approx(rate, abs=1e-12), name
            assert group.weight_decay == pytest.approx(0.05 * decays[name]), name


def text_name(name: str) -> tuple[str, int | None]:
    """Our name of one of their parameters, and which third of it is meant."""
    head = "classification_heads.sentence_classification_head."
    if name.startswith(head):
        part, _, kind = name.removeprefix(head).rpartition(".")
        return f"head.{ {'dense': 'hidden', 'out_proj': 'projection'}[part] }.{kind}", None
    place = of_text.our_place(name.removeprefix("model."))
    assert place is not None, name
    return place.name.replace("student.", "backbone.encoder."), place.part


@pytest.mark.parametrize("name", ["text1_classification", "text2_classification"])
class TestTexts:
    @pytest.fixture
    def golden(self, name: str) -> Golden:
        golden: Golden = released.released(name)[0]
        return golden

    @pytest.fixture
    def task(self, name: str) -> ClassificationTask:
        weights = released.released(name)[1]
        embedding = next(value for key, value in weights.items() if key.endswith("embed_tokens.weight"))
        ratio = 1.5 if name == "text1_classification" else 3.0
        recipe = Settings(
            modalities={"text": Text(vocabulary=len(embedding), block=48, dropout=0.0)},
            transformer=replace(TINY, mlp_ratio=ratio, norm_eps=1e-5),
            labels=LabelConfig(classes=tuple("abc")),
            head=HeadConfig(pool=Pool.FIRST, norm=False, hidden=True),
        )  # fmt: skip
        task = ClassificationTask.build(recipe)
        heads = {text_name(key)[0]: v for key, v in weights.items() if key.startswith("classification_heads")}
        encoder = {key.removeprefix("model."): v for key, v in weights.items() if not key.startswith("classification")}
        released.loaded(task, of_text.student_state(encoder), heads)
        return task

    @staticmethod
    def batch(golden: Golden) -> Batch:
        tokens = golden["tokens"].long()
        return Batch("text", tokens, torch.arange(4), golden["labels"].long(), (tokens != golden.meta["pad"]).sum(1))

    def test_outputs(self, task: ClassificationTask, golden: Golden, name: str) -> None:
        batch = self.batch(golden)
        features, padding = task.backbone(batch.inputs, batch.lengths)
        valid: Tensor = torch.ones(features.shape[:2], dtype=torch.bool) if padding is None else ~padding
        assert relative_error(features[valid], golden["encoder"][valid]) < TOLERANCE
        logits = task.logits(batch.inputs, batch.lengths)
        assert relative_error(logits, golden["logits"]) < TOLERANCE
        assert relative_error(task.losses(logits, one_hot(batch.labels, 3)), golden["loss"]) < TOLERANCE

    def test_gradients(self, task: ClassificationTask, golden: Golden, name: str) -> None:
        task(task.prepare(self.batch(golden), seed=0, update=0)).total.backward()

        def part(theirs: str) -> tuple[str, slice]:
            ours, third = text_name(theirs)
            return ours, slice(None) if third is None else slice(32 * third, 32 * third + 32)

        errors = released.gradient_errors(task, golden, part)
        assert len(errors) >= 30
        # A key bias changes no softmax, so that its gradient is rounding alone.
        errors = {key: error for key, error in errors.items() if not key.endswith("k_proj.bias")}
        assert max(errors.values()) < GRADIENT_TOLERANCE, errors
