"""Token embeddings, and what padding may not change: features, targets and loss of both versions of data2vec."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data2vec.core import Batch, Data2Vec, Experiment
from data2vec.core.settings.fields import LayerOutput, NormOrder, TransformerConfig
from data2vec.core.settings.pretraining import (
    LossConfig,
    PredictorConfig,
    PredictorKind,
    StudentSees,
    TargetNorm,
    TargetsConfig,
    TeacherConfig,
    TeacherShares,
)
from data2vec.core.testing import relative_error
from data2vec.text import MaskConfig, MaskKind, Text, TextExtractor

BOS, PAD, EOS, MASK = 0, 1, 2, 4
VOCABULARY = 261  # that of bytes, whose special tokens these are


def extractor(block: int = 20) -> TextExtractor:
    torch.manual_seed(0)
    return TextExtractor(vocabulary=30, width=16, block=block)


class TestExtractor:
    def test_embedding_and_place_are_added_and_normalised(self) -> None:
        module = extractor()
        tokens = torch.tensor([[0, 7, 7, 2], [0, 9, 2, 1]])
        out = module(tokens, torch.tensor([4, 3]))
        assert out.shape == (4,)
        expected = module.embed.weight[tokens] + module.positions.weight[1:5]
        torch.testing.assert_close(out.x, torch.nn.functional.layer_norm(expected, (16,)))
        assert out.padding is not None
        assert out.padding.tolist() == [[False] * 4, [False, False, False, True]]

    def test_padding_and_its_place_are_zero_at_first_and_the_rest_is_not(self) -> None:
        module = extractor()
        assert not module.embed.weight[PAD].any()
        assert not module.positions.weight[0].any()
        for table in (module.embed.weight, module.positions.weight):
            rows = table.abs().sum(1)
            assert int((rows == 0).sum()) == 1
            assert float(table[rows > 0].detach().std()) == pytest.approx(0.02, rel=0.2)
        assert module.positions.weight.shape == (21, 16)

    def test_padding_is_not_learned(self) -> None:
        module = extractor()
        module(torch.tensor([[0, 7, 2, 1]]), torch.tensor([3])).x.square().sum().backward()
        assert not module.embed.weight.grad[PAD].any()
        assert not module.positions.weight.grad[0].any()
        assert module.positions.weight.grad[1:4].any(1).all()

    def test_the_place_alone_for_a_learned_mask_vector(self) -> None:
        module = extractor()
        out = module(torch.tensor([[0, 7, 2], [0, 8, 2]]))
        assert out.positions is not None
        assert out.positions.shape == (1, 3, 16)
        torch.testing.assert_close(out.positions, module.norm(module.positions.weight[1:4]).unsqueeze(0))
        assert out.padding is None

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (torch.zeros(2, 21, dtype=torch.int64), "21 tokens, but there are positions for 20"),
            (torch.zeros(2, 5), "integers"),
            (torch.zeros(5, dtype=torch.int64), "integers"),
            (torch.zeros(2, 0, dtype=torch.int64), "integers"),
        ],
    )
    def test_other_inputs_are_refused(self, tokens: Tensor, message: str) -> None:
        for call in (extractor(), extractor().grid):
            with pytest.raises(ValueError, match=message):
                call(tokens)

    def test_used_in_inference_mode_first_it_still_trains(self) -> None:
        module = extractor(block=17)
        tokens = torch.tensor([[0, *range(5, 20), 2]])
        with torch.inference_mode():
            module(tokens)
        module(tokens).x.square().sum().backward()
        assert module.positions.weight.grad is not None


TRANSFORMER = TransformerConfig(depth=3, width=16, heads=2, norm_order=NormOrder.POST, norm_eps=1e-5)


def version_1(kind: MaskKind = MaskKind.TOKEN) -> Experiment:
    return Experiment(
        modalities={"text": Text(vocabulary=VOCABULARY, block=24, dropout=0.0, mask=MaskConfig(kind, ratio=0.3))},
        transformer=TRANSFORMER,
        teacher=TeacherConfig(shares=TeacherShares.FRONTEND),
        targets=TargetsConfig(2, LayerOutput.FEED_FORWARD, TargetNorm.LAYER),
        loss=LossConfig(beta=4.0, scale=1.0),
    )


def version_2(kind: MaskKind = MaskKind.TOKEN) -> Experiment:
    predictor = PredictorConfig(
        PredictorKind.CONV1D, layers=2, kernel=9, residual=False, projection_layers=2, mask_noise=0.0
    )
    mask = MaskConfig(kind, ratio=0.48, masks=3, replace=False)
    text = Text(vocabulary=VOCABULARY, block=24, dropout=0.0, mask=mask, predictor=predictor)
    return replace(
        version_1(),
        modalities={"text": text},
        student_sees=StudentSees.VISIBLE,
        targets=TargetsConfig(3, LayerOutput.FEED_FORWARD, TargetNorm.INSTANCE),
        loss=LossConfig(scale=1.0),
    )


def mask_vector() -> Experiment:
    """Every position seen, hidden ones as a learned vector."""
    mask = MaskConfig(ratio=0.3, replace=False)
    return version_1().replace(text={"mask": mask, "predictor": PredictorConfig(PredictorKind.LINEAR)})


EXPERIMENTS = {
    "1.0": version_1(),
    "1.0 spans": version_1(MaskKind.SPAN),
    "2.0": version_2(),
    "2.0 spans": version_2(MaskKind.SPAN),
    "mask vector": mask_vector(),
}


def build(experiment: Experiment) -> Data2Vec:
    """A model whose teacher is another than its student."""
    torch.manual_seed(0)
    model = Data2Vec.build(experiment).eval()
    with torch.no_grad():
        for _, mine, _ in model.teacher.averaged(model.student):
            mine.add_(torch.randn_like(mine) * 0.1)
    return model


MODELS = {name: build(experiment) for name, experiment in EXPERIMENTS.items()}


@st.composite
def texts(draw: st.DrawFn) -> list[list[int]]:
    """Blocks of one or more documents, of different lengths."""
    ordinary = st.integers(5, VOCABULARY - 1)
    block = st.lists(st.lists(ordinary, min_size=1, max_size=6), min_size=1, max_size=3)
    documents = draw(st.lists(block, min_size=2, max_size=4))
    return [[BOS, *(token for document in found for token in (*document, EOS))] for found in documents]


def batch_of(rows: list[list[int]], first: int = 0, fill: int = PAD, extra: int = 0) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max()) + extra
    inputs = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    ids = torch.arange(first, first + len(rows)) + 1000
    padded = bool((lengths < width).any())
    return Batch("text", inputs, ids, torch.full_like(ids, -1), lengths if padded else None)


def masked(experiment: Experiment, model: Data2Vec, batch: Batch):
    return model.prepare(batch, seed=3, update=4)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
@settings(max_examples=12, deadline=None)
@given(rows=texts(), extra=st.sampled_from([0, 2]), fill=st.sampled_from([PAD, MASK, 77]))
def test_a_padded_batch_gives_what_its_samples_give_alone(
    name: str, rows: list[list[int]], extra: int, fill: int
) -> None:
    experiment, model = EXPERIMENTS[name], MODELS[name]
    batch = batch_of(rows, fill=fill, extra=extra)
    features, targets = model.features(batch), model.make_targets(batch)
    prepared = masked(experiment, model, batch)
    read, mask = prepared.batch, prepared.mask
    together = model(prepared)
    total, count = torch.zeros(()), 0
    for index, row in enumerate(rows):
        alone = batch_of([row], first=index)
        assert alone.lengths is None
        size = len(row)
        assert relative_error(features.x[index, :size], model.features(alone).x[0]) < 2e-5
        assert relative_error(targets[index, :size], model.make_targets(alone)[0]) < 2e-5
        own = masked(experiment, model, alone)
        own_read, own_mask = own.batch, own.mask
        assert torch.equal(mask.hidden[index, :, :size], own_mask.hidden[0])
        assert not mask.hidden[index, :, size:].any()
        if read.student_inputs is not None:
            assert own_read.student_inputs is not None
            assert torch.equal(read.student_inputs[index, :size], own_read.student_inputs[0])
        output = model(own)
        total, count = total + output.total, count + output.count
    assert together.count == count
    assert relative_error(together.total, total) < 2e-5


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_special_tokens_are_never_hidden_and_every_setting_learns(name: str) -> None:
    experiment, model = EXPERIMENTS[name], MODELS[name]
    rows = [[BOS, 9, 8, EOS, 7, 6, 5, 9, EOS], [BOS, 11, EOS], [BOS, 20, 21, 3, 22, EOS]]
    batch = batch_of(rows)
    prepared = masked(experiment, model, batch)
    read, mask = prepared.batch, prepared.mask
    hidden = mask.hidden.any(1)
    assert not (hidden & torch.isin(batch.inputs, torch.tensor([0, 1, 2, 3, 4]))).any()
    assert (read.student_inputs is not None) == name.startswith("1.0")
    model.zero_grad()
    model(prepared).loss.backward()
    missing = {
        parameter
        for parameter, value in model.named_parameters()
        if value.requires_grad and (value.grad is None or not value.grad.any())
    }
    assert missing == set()


_WITHOUT_LIBSNDFILE = """
import ctypes, pathlib
real = ctypes.CDLL
class Absent(real):
    def __init__(self, name, *args, **kwargs):
        maps = pathlib.Path("/proc/self/maps").read_text()
        if str(name) == "libsndfile.so.1" and "libsndfile" not in maps:
            raise OSError("no such library on this machine")
        super().__init__(name, *args, **kwargs)
ctypes.CDLL = Absent
import data2vec.text
import fairseq2n
maps = pathlib.Path("/proc/self/maps").read_text()
print([line.split()[-1] for line in maps.splitlines() if "libsndfile" in line][0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_fairseq2_is_imported_without_a_library_of_the_system() -> None:
    """In a process where the dynamic linker finds no libsndfile, fairseq2 gets that of soundfile's wheel."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_LIBSNDFILE], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "_soundfile_data" in done.stdout


class TestAnotherLength:
    """Positions of a model for longer or shorter inputs."""

    @pytest.mark.parametrize("block", [8, 20, 30, 64])
    def test_places_keep_their_positions_and_further_ones_repeat(self, block: int) -> None:
        trained, fresh = extractor(block=20).positions.weight, extractor(block=block)
        assert trained[1:].abs().sum(1).min() > 0
        made = fresh.resized("positions.weight", trained)
        assert made is not None
        fitted, line = made
        assert fitted.shape == fresh.positions.weight.shape
        assert torch.equal(fitted[0], trained[0])
        assert all(torch.equal(fitted[1 + place], trained[1 + place % 20]) for place in range(block))
        assert line == f"positions of 20 tokens {'cut' if block < 20 else 'repeated'} to {block}"

    def test_other_tables_are_left_alone(self) -> None:
        module = extractor()
        for name, value in (
            ("embed.weight", torch.zeros(31, 16)),
            ("positions.weight", torch.zeros(10, 8)),
            ("positions.weight", torch.zeros(1, 16)),
            ("positions.weight", torch.zeros(16)),
        ):
            assert module.resized(name, value) is None
