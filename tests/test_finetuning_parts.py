"""The parts of fine-tuning: what learns and how fast, where weights come from, letters, scores, choices."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from data2vec.core import Batch, Data2Vec
from data2vec.core.errors import CheckpointError, ConfigError
from data2vec.core.finetuning.classification import ClassificationTask
from data2vec.core.finetuning.recognition import required_frames
from data2vec.core.finetuning.scores import Predictions, scores
from data2vec.core.finetuning.transcribing import Transcript, error_rates
from data2vec.core.finetuning.transcripts import Letters, greedy
from data2vec.core.run.choices import Choices
from data2vec.core.settings.fields import OptimConfig
from data2vec.core.settings.finetuning import Case, Freeze, LabelKind, Weights
from data2vec.core.settings.finetuning import Classification as Settings
from data2vec.core.testing import load_module

scenarios = load_module("scenarios_of_parts", Path(__file__).with_name("scenarios.py"))
BATCH = Batch("vision", torch.randn(4, 3, 16, 16), torch.arange(4), torch.tensor([0, 1, 2, 0]))


def task_of(name: str = "vision_v2", **changes: Any) -> ClassificationTask:
    network = scenarios.scenario(name)
    recipe = Settings(modalities=network.modalities, transformer=network.transformer)
    return ClassificationTask.build(recipe.replace(labels={"classes": ("a", "b", "c")}).replace(**changes))


def with_gradient(task: ClassificationTask, update: int = 0) -> set[str]:
    """The parameters that an update gives a gradient that is not zero."""
    task.train()
    task(task.prepare(BATCH, seed=0, update=update), update=update).loss.backward()
    return {name for name, p in task.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_what_never_learns() -> None:
    everything = with_gradient(task_of(transformer={"layer_drop": 0.0}))
    head = {name for name in everything if name.startswith("head.")}
    quiet: dict[str, Any] = {"transformer": {"layer_drop": 0.0}}
    assert with_gradient(task_of(freeze=Freeze.ALL, **quiet)) == head
    extractor = {name for name in everything if ".extractor." in name}
    assert extractor
    assert with_gradient(task_of(freeze=Freeze.EXTRACTOR, **quiet)) == everything - extractor
    two = with_gradient(task_of(freeze=Freeze.LAYERS, freeze_layers=2, **quiet))  # the modality's block, and the first
    assert {name for name in two if ".blocks." in name} == {
        name for name in everything if ".transformer.blocks.1." in name or ".transformer.blocks.2." in name
    }
    assert not [name for name in two if "frontends" in name]
    with pytest.raises(ConfigError, match="there are 4 blocks"):
        task_of(freeze=Freeze.LAYERS, freeze_layers=5)


def test_a_frozen_encoder_drops_nothing() -> None:
    task = task_of(freeze=Freeze.ALL, transformer={"dropout": 0.5, "drop_path": 0.5, "layer_drop": 0.9}).train()
    prepared = task.prepare(BATCH, seed=0, update=0)
    assert torch.equal(task(prepared).total, task(prepared).total)
    assert task.head.training


def test_the_encoder_may_begin_later() -> None:
    task = task_of(freeze_updates=3, transformer={"layer_drop": 0.0})
    assert {name.split(".")[0] for name in with_gradient(task, update=2)} == {"head"}
    task.zero_grad()
    assert {name.split(".")[0] for name in with_gradient(task, update=3)} == {"head", "backbone"}
    starts = {group.starts for group in task.groups(OptimConfig())}
    assert starts == {0, 3}


def test_rates_by_height() -> None:
    """BEiT's: embeddings at decay^5 under four blocks, the attention bias and the head at the full rate."""
    task = task_of("vision", layer_decay=0.5, transformer={"layer_drop": 0.0})
    rates = {id(p): group.lr_scale for group in task.groups(OptimConfig()) for p in group.parameters}
    named = {name: rates[id(p)] for name, p in task.named_parameters()}
    assert {named[f"backbone.encoder.transformer.blocks.{n}.norm1.weight"] for n in range(3)} == {0.125, 0.25, 0.5}
    assert named["backbone.encoder.frontends.vision.extractor.embed.proj.weight"] == 0.0625
    assert named["backbone.encoder.frontends.vision.prefix"] == 0.0625
    assert named["backbone.encoder.frontends.vision.bias.table"] == 1.0
    assert named["head.projection.weight"] == 1.0
    decays = {
        id(p): group.weight_decay for group in task.groups(OptimConfig(weight_decay=0.1)) for p in group.parameters
    }
    assert {decays[id(p)] for name, p in task.named_parameters() if name.endswith((".bias", ".prefix"))} == {0.0}


@pytest.mark.parametrize("name", ["vision", "vision_v2", "speech", "speech_v2", "text", "text_v2"])
@pytest.mark.parametrize("weights", [Weights.STUDENT, Weights.TEACHER])
def test_where_weights_come_from(name: str, weights: Weights) -> None:
    torch.manual_seed(1)
    model = Data2Vec.build(scenarios.scenario(name))
    with torch.no_grad():
        for parameter in model.teacher.encoder.transformer.parameters():
            parameter.add_(1.0)  # away from the student
    task = task_of(name, weights=weights)
    before = task.head.projection.weight.clone()
    assert task.start_from(model.own_state()) == []
    modality = task.backbone.modality
    encoder = model.encoders()[weights.value].single(modality).state_dict()
    own = task.backbone.state_dict()
    assert [key for key, value in own.items() if not torch.equal(value, encoder[key])] == []
    assert torch.equal(task.head.projection.weight, before)
    again = task_of(name)  # a fine-tuned run is a start as well
    assert again.start_from(task.own_state()) == []
    assert torch.equal(
        again.backbone.encoder.transformer.blocks[0].norm1.weight, own["encoder.transformer.blocks.0.norm1.weight"]
    )


def test_adapters() -> None:
    """At first they change nothing; then they and the head alone learn."""
    model = Data2Vec.build(scenarios.scenario("vision_v2"))
    quiet = {"transformer": {"layer_drop": 0.0}}
    plain, adapted = task_of(**quiet), task_of(adapters={"rank": 2}, **quiet)
    for task in (plain, adapted):
        assert task.start_from(model.own_state()) == []
    head = {name: value for name, value in plain.own_state().items() if name.startswith("head.")}
    adapted.load_own_state({**adapted.own_state(), **head})
    inputs = BATCH.inputs
    torch.testing.assert_close(adapted.eval().logits(inputs), plain.eval().logits(inputs))
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name for name in learning if not name.startswith("head.")} == {
        name for name, _ in adapted.named_parameters() if ".lora_" in name
    }
    assert len([name for name in learning if ".lora_A." in name]) == 4 * len(adapted.layers)
    assert {id(p) for group in adapted.groups(OptimConfig()) for p in group.parameters} == {
        id(p) for p in adapted.parameters() if p.requires_grad
    }


def test_starts_that_do_not_fit() -> None:
    task = task_of()
    before = {name: value.clone() for name, value in task.own_state().items()}
    with pytest.raises(CheckpointError, match="hold no encoder"):
        task.start_from({"other": torch.zeros(1)})
    narrow = scenarios.scenario("vision_v2").replace(transformer={"width": 16})
    with pytest.raises(CheckpointError, match="there and"):
        task.start_from(Data2Vec.build(narrow).own_state())
    with pytest.raises(CheckpointError, match="weights=teacher: the saved weights hold no teacher"):
        task_of(weights=Weights.TEACHER).start_from(task.own_state())
    assert [name for name, value in task.own_state().items() if not torch.equal(value, before[name])] == []


def test_weights_of_classes_count() -> None:
    plain, weighted = task_of(), task_of(labels={"classes": ("a", "b", "c"), "weights": (1.0, 2.0, 0.5)})
    weighted.load_own_state(plain.own_state())
    for task in (plain, weighted):
        task.eval()
    prepared = plain.prepare(BATCH, seed=0, update=0)
    logits = plain.logits(prepared.inputs)
    one, other = plain.losses(logits, prepared.targets), weighted.losses(logits, prepared.targets)
    torch.testing.assert_close(other, one * torch.tensor([1.0, 2.0, 0.5, 1.0]))
    wanted = torch.nn.functional.cross_entropy(logits, BATCH.labels, reduction="none")
    torch.testing.assert_close(one, wanted)


TEXT = st.text(alphabet="ab |'", max_size=30)
LETTERS = Letters(("_", "|", *"ab'"), Case.KEEP)


@given(TEXT)
def test_letters_and_back(text: str) -> None:
    words = " ".join(text.replace("|", " ").split())
    numbers = LETTERS.encode(text)
    assert LETTERS.decode(numbers) == words
    assert all(0 < number < len(LETTERS) for number in numbers)


@given(st.lists(st.integers(0, 4), max_size=25))
def test_greedy_is_what_ctc_reads(path: list[int]) -> None:
    """Repetitions become one, then blanks go (Graves et al. 2006, section 3.1)."""
    logits = torch.eye(5)[path] if path else torch.zeros(0, 5)
    found = greedy(logits)
    assert [symbol for symbol, _, _ in found] == [symbol for symbol, _ in itertools.groupby(path) if symbol]
    for symbol, start, end in found:
        assert set(path[start:end]) == {symbol}


@given(st.lists(st.integers(1, 3), max_size=8))
def test_the_fewest_frames(target: list[int]) -> None:
    """With one frame less the CTC loss is infinite."""
    targets, lengths = torch.tensor([target], dtype=torch.int64).reshape(1, -1), torch.tensor([len(target)])
    needed = int(required_frames(targets, lengths))
    repeats = sum(one == other for one, other in itertools.pairwise(target))
    assert needed == len(target) + repeats
    for frames, finite in ((needed, True), (needed - 1, False)):
        if frames < 1 or not target:
            continue
        loss = torch.nn.functional.ctc_loss(
            torch.zeros(frames, 1, 5).log_softmax(-1), targets, torch.tensor([frames]), lengths, reduction="sum"
        )
        assert bool(loss.isfinite()) is finite


@given(st.lists(st.tuples(st.text(alphabet="ab ", min_size=1), TEXT), min_size=1, max_size=5))
def test_error_rates_are_jiwers(pairs: list[tuple[str, str]]) -> None:
    said = [" ".join(one.split()) or "a" for one, _ in pairs]
    heard = [" ".join(other.split()) for _, other in pairs]
    rates = error_rates([Transcript("k", one, other, 1.0) for one, other in zip(said, heard, strict=True)])
    assert rates["wer"] == jiwer.wer(said, heard)
    assert rates["cer"] == jiwer.cer(said, heard)
    words = sum(len(one.split()) for one in said)
    wrong = sum(Transcript("k", one, other, 1.0).word_errors for one, other in zip(said, heard, strict=True))
    assert rates["wer"] == pytest.approx(wrong / words)


def predictions(kind: LabelKind, outputs: Any, targets: Any) -> Predictions:
    out = torch.as_tensor(outputs, dtype=torch.float32)
    return Predictions(kind, out, torch.as_tensor(targets), torch.zeros(len(out)), ("k",) * len(out))


def test_scores_of_classes() -> None:
    outputs = torch.eye(7)[[0, 1, 2, 3, 4, 5, 6, 0]] + 0.1
    found = scores(predictions(LabelKind.CLASS, outputs, [0, 1, 2, 3, 4, 5, 6, 6]))
    assert found["accuracy"] == 7 / 8
    assert 7 / 8 <= found["top5"] <= 1
    two = scores(predictions(LabelKind.CLASS, [[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]], [0, 1, 0, 1]))
    assert two["f1"] == 0.5
    assert two["matthews"] == 0.0
    constant = scores(predictions(LabelKind.CLASS, [[1.0, 0.0]] * 3, [0, 0, 0]))
    assert constant["matthews"] == 0.0  # not defined


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=20))
def test_correlations_are_scipys(pairs: list[tuple[int, int]]) -> None:
    given_, wanted = (np.array([pair[side] for pair in pairs], dtype=np.float64) for side in (0, 1))
    found = scores(predictions(LabelKind.NUMBER, given_[:, None], torch.tensor(wanted, dtype=torch.float32)[:, None]))
    if given_.std() and wanted.std():
        assert found["pearson"] == pytest.approx(stats.pearsonr(given_, wanted).statistic, abs=1e-6)
        assert found["spearman"] == pytest.approx(stats.spearmanr(given_, wanted).statistic, abs=1e-6)
    else:
        assert found["pearson"] == found["spearman"] == 0.0
    assert found["squared_error"] == pytest.approx(np.square(given_ - wanted).mean())


def test_choices() -> None:
    choices = Choices(
        {"task": ("a", "b"), "size": ("small", "large")}, lambda task, size: Settings(name=f"{task}-{size}")
    )
    recipe, rest = choices.chosen(["size=large", "optim.lr=1"])
    assert (recipe.name, rest) == ("a-large", ["optim.lr=1"])
    assert choices.default().name == "a-small"
    with pytest.raises(ConfigError, match="task=c: no such choice; there is a, b"):
        choices.chosen(["task=c"])
