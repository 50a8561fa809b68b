"""Baselines of labels: each learns what it can, on data where that is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from data2vec.core.evaluation.features import Pooled
from data2vec.core.run.load import configuration_of
from data2vec.core.testing import load_module, load_script

TOOL = Path(__file__).resolve().parents[1] / "tools" / "baselines.py"
tuned = load_module("tuned_of_baselines", Path(__file__).with_name("tuned.py"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script(TOOL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> object:
    return tuned.pretrained(tmp_path_factory.mktemp("place"))


def counted(number: int, classes: int, seed: int) -> Pooled:
    """Counts of 30 words, of which one tells the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    x = torch.randint(0, 3, (number, 30), generator=generator).float()
    x[:, :classes] = torch.nn.functional.one_hot(labels, classes).float()
    return Pooled(x, labels)


def test_tfidf_finds_the_word_that_tells(tool: ModuleType) -> None:
    seen, judged = counted(90, 3, 0), counted(60, 3, 1)
    assert tool.tfidf_accuracy(seen, judged, seed=0) > 0.95
    same = replace(seen, x=torch.ones_like(seen.x))
    assert tool.tfidf_accuracy(same, judged, seed=0) == pytest.approx(1 / 3)  # nothing to learn from: one class for all


def test_padding_does_not_change_what_a_text_is(tool: ModuleType) -> None:
    torch.manual_seed(0)
    network = tool.TextNetwork(11, 3, width=8).eval()
    ids = torch.randint(0, 11, (4, 6))
    padded = torch.cat([ids, torch.full((4, 5), 7)], 1)
    torch.testing.assert_close(network(padded, torch.full((4,), 6)), network(ids, None))


@pytest.mark.parametrize("modality", ["vision", "speech", "text"])
def test_classes_that_the_input_shows(
    tool: ModuleType, place: object, modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grey levels and repeated letters tell the class; noise, which is all that the clips are, does not."""
    monkeypatch.setattr(tool, "_UPDATES", 60)
    folder = tmp_path / "run"
    assert tuned.ended(tuned.recipe_of(place, modality, folder, train={"updates": 2})) == 0
    found = tool.baseline_scores(configuration_of(folder), folder)
    assert list(found) == [tool.TFIDF if modality == "text" else tool.LINEAR, tool.SMALL]
    for scores in found.values():
        assert scores["accuracy"] > 0.6 if modality != "speech" else 0 <= scores["accuracy"] < 0.9


def test_letters(tool: ModuleType, place: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt by heart where the clips that judge are those that were learnt from."""
    folder = tmp_path / "run"
    recipe = tuned.letters_of(place, folder, train={"updates": 2})
    recipe = recipe.replace(data={"validation": place.shards("speech")})  # type: ignore[attr-defined]
    assert tuned.ended(recipe) == 0
    monkeypatch.setattr(tool, "_UPDATES", 150)
    found = tool.baseline_scores(configuration_of(folder), folder)
    assert list(found) == [tool.LINEAR, tool.SMALL]
    assert all(set(scores) == {"wer", "cer"} for scores in found.values())
    assert found[tool.SMALL]["cer"] < 0.7
    assert found[tool.SMALL]["cer"] < found[tool.LINEAR]["cer"] + 0.05


def test_numbers_have_no_baseline(tool: ModuleType, place: object, tmp_path: Path) -> None:
    recipe = tuned.recipe_of(place, "vision", tmp_path / "run", labels={"kind": "number"})
    assert tool.baseline_scores(recipe, tmp_path) == {}
