"""Text as a user trains it: files to shards, to a run, its report, its features; also after a stop."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data2vec.core.data.shards.index import ShardIndex
from data2vec.core.errors import SampleError
from data2vec.core.run.load import load_run
from data2vec.core.settings.overrides import apply_overrides, from_yaml
from data2vec.core.testing import load_script
from data2vec.core.training.monitor import read_metrics
from data2vec.text import Text, Tokenizer, load_encoder

ROOT = Path(__file__).resolve().parents[1]
BLOCK, VOCABULARY = 32, 320
TINY = (
    f"text.vocabulary={VOCABULARY}", f"text.block={BLOCK}", "text.predictor.width=null", "transformer.depth=2",
    "transformer.width=32", "transformer.heads=2", "targets.top_k=2", "optim.warmup=1", "optim.hold=0", "optim.lr=1e-3",
    "train.updates=6", "train.batch=16", "train.micro_batch=8", "train.log_every=1", "train.device=cpu",
    "data.workers=0", "evaluation.few_labels=8", "evaluation.tasks=[rank]",
)  # fmt: skip
V2 = (
    "text.mask.masks=2", "text.predictor.layers=1", "text.predictor.width=16", "text.predictor.kernel=3",
    "train.micro_batch=null",
)  # fmt: skip
SENTENCES = {
    "sea": "the ship sails over waves & foam to an island harbour with salt and wind",
    "wood": "a fox runs below old oak trees where moss <mask> grows near owls at night",
}
WORDS = {name: sentence.split() for name, sentence in SENTENCES.items()}


def tiny(*arguments: str) -> list[str]:
    """The arguments, after those of ``TINY`` that they do not give."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [*(argument for argument in TINY if argument.partition("=")[0] not in given), *arguments]


def command(module: ModuleType, *arguments: str) -> int:
    """The exit code of an experiment."""
    try:
        module.main(module.experiment, module.sample, argv=tiny(*arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def weights(run: Path, update: int = 6) -> dict[str, torch.Tensor]:
    """Every tensor of the model and the optimiser in the checkpoint of an update."""
    (place,) = (run / "checkpoints").glob(f"update-*{update}")
    return {
        f"{file.stem}/{key}": tensor
        for file in (place / "model.safetensors", place / "optimiser.safetensors")
        for key, tensor in load_file(file).items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


@pytest.fixture(scope="module")
def text_base() -> ModuleType:
    return load_script(ROOT / "experiments" / "text_base.py")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes with 60 documents each, three to a file."""
    folder = tmp_path_factory.mktemp("text") / "corpus"
    generator = np.random.default_rng(0)
    for label, words in WORDS.items():
        for number in range(20):
            lines = [" ".join(generator.choice(words, generator.integers(4, 30))) for _ in range(3)]
            path = folder / label / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n")
    return folder


class Sharded:
    """``packed``: full blocks across documents, without classes. ``labelled``: one document or less in a sample."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder, self.packed, self.labelled = folder, folder / "packed", folder / "labelled"
        tool = load_script(ROOT / "tools" / "shard.py")
        rest = ["--block", str(BLOCK), "--validation", "0.25", "--workers", "1"]
        learnt = ["--train-tokenizer", str(VOCABULARY)]
        assert tool.main(["text", str(corpus), str(self.packed), *learnt, *rest]) == 0
        same = ["--tokenizer", str(self.packed / "tokenizer.json"), "--pack", "within"]
        assert tool.main(["text", str(corpus), str(self.labelled), *same, *rest]) == 0

    def data(self, place: str) -> tuple[str, str]:
        folder = self.folder / place
        return f"data.train={folder}/train-*.tar", f"data.validation={folder}/validation-*.tar"


@pytest.fixture(scope="module")
def sharded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    return Sharded(tmp_path_factory.mktemp("shards"), corpus)


class Finished:
    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out


@pytest.fixture(scope="module")
def finished(text_base: ModuleType, sharded: Sharded, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on packed blocks."""
    folder, lines = tmp_path_factory.mktemp("runs") / "text", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        write = sys.stdout.write
        patch.setattr(sys.stdout, "write", lambda text: (lines.append(text), write(text))[1])
        assert command(text_base, *sharded.data("packed"), f"train.folder={folder}") == 0
    return Finished(folder, "".join(lines))


def test_a_run_is_trained_evaluated_and_reported(finished: Finished, sharded: Sharded) -> None:
    folder = finished.folder
    assert f"report: {folder}/report.html" in finished.out
    assert [line["update"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, 7))
    assert ShardIndex.load(sharded.packed).length_unit == "tokens"
    assert (folder / "tokenizer.json").read_bytes() == (sharded.packed / "tokenizer.json").read_bytes()
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "teacher",
        "student",
        "random encoder",
        "bag of embeddings",
        "bag of tokens",
    ]
    assert all(row["rank"] is not None for row in rows)


def test_the_report_shows_masked_text_and_neighbours(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    for part in ("What the student sees", "Nearest neighbours", "bag of tokens", "Grey tokens are hidden"):
        assert part in page
    assert page.count(">original</div>") == page.count(">student</div>") == 6
    assert "&amp;" in page  # text is text: never markup
    assert "&lt;mask&gt;" in page
    assert "<mask>" not in page
    assert not re.search(r"""(src|href|action)\s*=\s*["']?\s*(https?:)?//""", page, re.IGNORECASE)


def test_the_configuration_reads_back(
    finished: Finished, sharded: Sharded, text_base: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer's place is the run's own matter: it is not in the configuration."""
    arguments = tiny(*sharded.data("packed"), f"train.folder={finished.folder}", "text.mask.ratio=0.3")
    assert command(text_base, "--print-config", *arguments) == 0
    printed = from_yaml(capsys.readouterr().out)
    assert printed == apply_overrides(text_base.experiment, arguments)
    text = printed.modalities["text"]
    assert isinstance(text, Text)
    assert (text.vocabulary, text.mask.ratio, text.tokenizer) == (VOCABULARY, 0.3, None)
    assert from_yaml(finished.folder / "config.yaml") == printed.replace(text={"mask": {"ratio": 0.15}})


def test_a_stopped_run_goes_on_bit_for_bit(
    finished: Finished, sharded: Sharded, text_base: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed blocks in two passes an update; the first part in a process of its own, the last with a worker."""
    stopped = (*sharded.data("packed"), f"train.folder={tmp_path}", "train.max_minutes=1e-9")
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / "text_base.py"), *tiny(*stopped)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped (out of time) at update 1 of 6" in done.stdout
    assert command(text_base, *stopped) == 0
    assert "stopped (out of time) at update 2 of 6" in capsys.readouterr().out
    assert command(text_base, *stopped[:-1], "data.workers=1") == 0
    assert "continuing from update 2 of 6" in capsys.readouterr().out
    assert_same(weights(finished.folder), weights(tmp_path))
    losses = [[line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (finished.folder, tmp_path)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def test_the_second_version_with_classes(sharded: Sharded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of different lengths under two masks each; stopped and continued."""
    module = load_script(ROOT / "experiments" / "text_base_v2.py")
    arguments = (*V2, *sharded.data("labelled"), "evaluation.tasks=[knn]", "evaluation.neighbours=3")
    arguments = (*arguments, "train.updates=3", "train.checkpoint_every=2", "train.keep=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(module, *arguments, f"train.folder={whole}") == 0
    for update in (1, 2):
        capsys.readouterr()
        assert command(module, *arguments, f"train.folder={parts}", "train.max_minutes=1e-9") == 0
        assert f"stopped (out of time) at update {update} of 3" in capsys.readouterr().out
    assert_same(weights(whole, 2), weights(parts, 2))
    page = (whole / "report.html").read_text()
    assert page.count(">mask 1</div>") == page.count(">mask 2</div>") == 6
    assert "same class" in page
    rows = {row["name"]: row for row in json.loads((whole / "report.json").read_text())["rows"]}
    assert all(row["knn"] is not None for row in rows.values())
    assert rows["bag of tokens"]["knn"] > 0.9  # the classes share no word


def test_batches_by_length(sharded: Sharded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = load_script(ROOT / "experiments" / "text_base_v2.py")
    budget = ("train.micro_length=256", "train.batch_length=512", "train.max_minutes=1e-9")
    for update in (1, 2):
        assert command(module, *V2, *budget, *sharded.data("labelled"), f"train.folder={tmp_path}") == 0
        assert f"stopped (out of time) at update {update} of 6" in capsys.readouterr().out


def test_the_evaluation_tool(finished: Finished, sharded: Sharded, tmp_path: Path, capsys) -> None:
    """The run's own blocks carry no classes; other shards of the same tokenizer do."""
    tool, out = load_script(ROOT / "tools" / "evaluate.py"), tmp_path / "table.json"
    arguments = [str(finished.folder), "--tasks", "knn,linear,rank,positions", "--device", "cpu", "--json", str(out)]
    assert tool.main(arguments) == 0
    table, reported = json.loads(out.read_text()), json.loads((finished.folder / "report.json").read_text())
    assert table["rows"] == reported["rows"]
    assert "The samples carry no labels, so only the effective rank is given." in table["notes"]
    assert "The samples carry no labels of positions" in " ".join(table["notes"])
    capsys.readouterr()
    assert tool.main([*arguments, "--data", f"{sharded.labelled}/train-*.tar"]) == 0
    table = json.loads(out.read_text())
    assert table["classes"] == 2
    assert all(row[task] is not None for row in table["rows"] for task in ("knn", "linear", "linear_few", "rank"))
    assert "bag of tokens" in capsys.readouterr().out


def test_a_run_needs_its_shards_no_more(finished: Finished, sharded: Sharded, corpus: Path, tmp_path: Path) -> None:
    """Neither the tokenizer beside them."""
    shards, run = shutil.copytree(sharded.packed, tmp_path / "shards"), tmp_path / "run"
    shutil.copytree(finished.folder, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(sharded.packed), str(shards)))
    assert str(shards) in (run / "config.yaml").read_text()
    shutil.rmtree(shards)
    moved = run.rename(tmp_path / "elsewhere")
    modality = load_run(moved, device="cpu").experiment.modalities["text"]
    assert isinstance(modality, Text)
    assert modality.tokenizer == str(moved / "tokenizer.json")
    assert modality.loaded_tokenizer.content == Tokenizer.load(sharded.packed / "tokenizer.json").content
    assert load_encoder(moved, device="cpu")(["a ship"]).shape == (1, 32)


def test_a_text_has_its_features_whatever_is_beside_it(finished: Finished) -> None:
    encoder = load_encoder(finished.folder, device="cpu")
    texts = ["the ship", "a fox runs below old oak trees where moss grows, ünd & <s> more"]
    together = encoder.tokens(texts)
    assert together.padding is not None
    counts = [int((~row).sum()) for row in together.padding]
    assert counts[0] < counts[1] == together.x.shape[1] <= BLOCK
    for text, x, count in zip(texts, together.x, counts, strict=True):
        alone = encoder.tokens([text]).x[0]
        assert alone.shape == (count, 32)
        torch.testing.assert_close(x[:count], alone, rtol=1e-4, atol=1e-5)
    both = encoder(texts)
    for text, vector in zip(texts, both, strict=True):
        torch.testing.assert_close(vector, encoder([text])[0], rtol=1e-4, atol=1e-5)
    assert (both[0] - both[1]).norm() > 1e-3
    with pytest.raises(SampleError, match="text 1: an empty document"):
        encoder(["the ship", "  "])
