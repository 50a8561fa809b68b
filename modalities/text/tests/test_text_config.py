"""The settings of text: what they build, what is said about wrong ones, and what they do to a batch."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data2vec.core import Experiment
from data2vec.core.batch import Batch, Example, Sample
from data2vec.core.errors import ConfigError, DataError, SampleError
from data2vec.core.modality import Modality
from data2vec.core.settings.fields import NormOrder, TransformerConfig
from data2vec.core.settings.overrides import from_yaml, to_yaml
from data2vec.core.settings.pretraining import PredictorConfig, PredictorKind
from data2vec.text import MaskConfig, MaskKind, SpanMasker, Text, TextDecoder, Tokenizer, TokenMasker
from data2vec.text.loader import pack_ids
from data2vec.text.tokenizer import FILE_NAME, train_bpe

BASE = TransformerConfig(norm_order=NormOrder.POST)
TINY = TransformerConfig(depth=2, width=24, heads=3, norm_order=NormOrder.POST, norm_eps=1e-5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat sat on the mat and the dog sat on the cat"] * 20, 280)


@pytest.fixture
def file(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "run" / FILE_NAME
    path.parent.mkdir()
    path.write_bytes(tokenizer.content)
    return path


def batch_of(rows: list[list[int]]) -> Batch:
    lengths = torch.tensor([len(row) for row in rows])
    inputs = torch.tensor([row + [1] * (int(lengths.max()) - len(row)) for row in rows])
    return Batch("text", inputs, torch.arange(len(rows)), torch.full((len(rows),), -1), lengths)


def test_the_defaults_are_sound_and_those_of_the_paper():
    text = Text()
    assert text.problems(BASE) == []
    assert text.asset_problems() == []
    assert Modality.by_name("text") is Text
    assert (text.vocabulary, text.block, text.dropout) == (50_265, 512, 0.1)
    assert (text.mask.ratio, text.mask.random_share, text.mask.kept_share) == (0.15, 0.1, 0.1)
    assert text.predictor_config == PredictorConfig(PredictorKind.MLP, layers=2)
    assert text.length_range == (3, 512)
    assert Text.length_unit == "tokens"
    assert Text.assets == ("tokenizer.json",)
    assert not text.has_cls_token


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (Text(vocabulary=5), "text.vocabulary=5: must be 6 or more"),
        (Text(block=2), "text.block=2: must be 3 or more"),
        (Text(blocks=-1), "text.blocks=-1: must be 0 or more"),
        (Text(dropout=1.0), "text.dropout=1.0: must be from 0 to below 1"),
        (Text(mask=MaskConfig(ratio=0.0)), "text.mask.ratio=0.0: must be above 0 and below 1"),
        (Text(mask=MaskConfig(masks=0)), "text.mask.masks=0: must be 1 or more"),
        (Text(mask=MaskConfig(length=0)), "text.mask.length=0: must be 1 or more"),
        (Text(mask=MaskConfig(masks=8)), "text.mask.masks=8: the student reads one input of each sample"),
        (
            Text(mask=MaskConfig(MaskKind.SPAN, ratio=0.9, adjust=0.2)),
            "text.mask.adjust=0.2: with text.mask.ratio=0.9 it must be below 1",
        ),
        (
            Text(mask=MaskConfig(random_share=0.6, kept_share=0.5)),
            "text.mask.random_share=0.6: with text.mask.kept_share=0.5 it must be at most 1",
        ),
        (Text(mask=MaskConfig(kept_share=-0.1)), "text.mask.random_share=0.1: with text.mask.kept_share=-0.1"),
        (Text(predictor=PredictorConfig(PredictorKind.CONV2D)), "text.predictor.kind=conv2d: text has one dimension"),
        (Text(predictor=PredictorConfig(layers=0)), "text.predictor.layers=0: must be 1 or more"),
        (Text(predictor=PredictorConfig(input_dropout=1.0)), "text.predictor.input_dropout=1.0: must be from 0"),
        (Text(predictor=PredictorConfig(projection_ratio=0.0)), "text.predictor.projection_ratio=0.0: must be above"),
        (
            Text(predictor=PredictorConfig(PredictorKind.CONV1D, groups=5)),
            "text.predictor.groups=5: does not divide transformer.width=768",
        ),
        (
            Text(predictor=PredictorConfig(PredictorKind.CONV1D, groups=16, width=100)),
            "text.predictor.groups=16: does not divide text.predictor.width=100",
        ),
    ],
)
def test_a_wrong_setting_is_named(text: Text, problem: str) -> None:
    found = text.problems(BASE)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_are_listed():
    assert len(Text(vocabulary=1, dropout=-1.0, mask=MaskConfig(ratio=2.0, masks=0)).problems(BASE)) == 4


def test_settings_survive_the_configuration_file(tmp_path: Path) -> None:
    mask = MaskConfig(MaskKind.SPAN, ratio=0.35, replace=False, masks=8)
    experiment = Experiment(modalities={"text": Text(tokenizer="a/tokenizer.json", mask=mask)}, transformer=BASE)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(experiment))
    assert from_yaml(path).modalities["text"] == experiment.modalities["text"]


def test_the_parts_follow_the_settings() -> None:
    assert Text(mask=MaskConfig(ratio=0.2)).build_masker() == TokenMasker(0.2)
    span = MaskConfig(MaskKind.SPAN, ratio=0.35, length=5, adjust=0.05, masks=2, replace=False)
    assert Text(mask=span).build_masker() == SpanMasker(0.35, 5, 0.05, 2)
    assert Text(tokenizer="here.json", block=9).build_decoder(train=True) == TextDecoder("here.json", 9, True)
    frontend = Text(vocabulary=300, block=40, dropout=0.2, blocks=2).build_frontend(TINY)
    assert frontend.extractor.embed.weight.shape == (300, 24)
    assert frontend.extractor.positions.weight.shape == (41, 24)
    assert frontend.extractor.norm.eps == TINY.norm_eps
    assert frontend.dropout.p == 0.2
    assert len(frontend.blocks) == 2
    assert frontend.prefix_tokens == 0
    assert frontend.bias is None


def test_what_is_masked_in_the_input_needs_no_mask_vector() -> None:
    assert not Text().uses_mask_token
    assert Text(mask=MaskConfig(replace=False)).uses_mask_token


def test_special_tokens_and_padding_are_not_maskable(tokenizer: Tokenizer, file: Path) -> None:
    text = Text(tokenizer=str(file))
    batch = batch_of([[0, 9, 10, 2, 11, 3, 4, 12, 2], [0, 13, 2]])
    expected = [[False, True, True, False, True, False, False, True, False], [False, True, *[False] * 7]]
    assert text.maskable(batch).tolist() == expected
    filled = Batch("text", batch.inputs.masked_fill(batch.inputs == 1, 50), batch.ids, batch.labels, batch.lengths)
    assert text.maskable(filled).tolist() == expected
    whole = Batch("text", filled.inputs, batch.ids, batch.labels)
    assert text.maskable(whole)[1].tolist() == [False, True, False, *[True] * 6]


def test_replaced_tokens_are_the_tokenizers(tmp_path: Path) -> None:
    """A vocabulary whose mask is its last token, as the released one's, and whose special tokens lie anywhere."""
    import tokenizers

    names = ["[PAD]", *(f"w{n}" for n in range(20)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / FILE_NAME))
    mask = MaskConfig(random_share=0.5, kept_share=0.0)
    text = Text(tokenizer=str(tmp_path / FILE_NAME), vocabulary=64, mask=mask)
    inputs = torch.tensor([[22, *[1 + n % 20 for n in range(200)], 23]] * 10)
    batch = Batch("text", inputs, torch.arange(10), torch.full((10,), -1))
    hidden = text.maskable(batch).unsqueeze(1)
    assert int(hidden.sum()) == 2000
    read = text.student_inputs(batch, hidden, seed=0, update=1)
    assert read is not None
    assert torch.equal(read[:, 0], inputs[:, 0])
    assert set(read[hidden[:, 0]].tolist()) == {24, *range(1, 21)}
    share = float((read[hidden[:, 0]] == 24).float().mean())
    assert share == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)
    assert Text(mask=MaskConfig(replace=False)).student_inputs(batch, hidden, seed=0, update=1) is None


def samples_of(*texts: Tensor) -> tuple[list[Sample], list[Example]]:
    samples = [Sample(f"key{n}", "shard.tar", 7 + n, {}) for n in range(len(texts))]
    return samples, [Example(text, n) for n, text in enumerate(texts)]


def test_only_batches_with_padding_have_lengths() -> None:
    text = Text()
    padded = text.collate(*samples_of(torch.tensor([0, 9, 8, 2]), torch.tensor([0, 9, 2])))
    assert padded.inputs.tolist() == [[0, 9, 8, 2], [0, 9, 2, 1]]
    assert padded.lengths is not None
    assert padded.lengths.tolist() == [4, 3]
    assert padded.ids.tolist() == [7, 8]
    assert padded.labels.tolist() == [0, 1]
    full = text.collate(*samples_of(torch.tensor([0, 9, 8, 2]), torch.tensor([0, 9, 7, 2])))
    assert full.lengths is None


def test_a_run_reads_the_tokenizer_that_it_keeps(file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    placed = Text(vocabulary=280).located(file.parent)
    assert placed.tokenizer == str(file)
    assert placed.loaded_tokenizer.vocabulary == tokenizer.vocabulary
    assert placed.asset_problems() == []
    nowhere = Text().located(tmp_path)
    assert nowhere == Text()
    assert nowhere.loaded_tokenizer.vocabulary == 261
    copy = tmp_path / "copy.json"
    copy.write_bytes(tokenizer.content)
    assert Text(tokenizer=str(copy)).located(file.parent).tokenizer == str(file)
    gone = Text(tokenizer=str(tmp_path / "gone.json"))
    assert gone.located(file.parent).tokenizer == str(file)
    copy.write_bytes(Tokenizer.bytes().content)
    with pytest.raises(ConfigError, match=r"text\.tokenizer=.*copy\.json: differs from .*with which the shards"):
        Text(tokenizer=str(copy)).located(file.parent)


def test_a_tokenizer_that_does_not_fit_is_named(file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = Text(vocabulary=100, tokenizer=str(file)).asset_problems()
    assert small == [
        f"text.vocabulary=100: the tokenizer {file} has {tokenizer.vocabulary} tokens; "
        f"choose text.vocabulary={tokenizer.vocabulary} or more"
    ]
    assert "the tokenizer of bytes has 261 tokens" in Text(vocabulary=260).asset_problems()[0]
    absent = Text(tokenizer=str(tmp_path / "absent.json")).asset_problems()
    assert len(absent) == 1
    assert absent[0].startswith(f"text.tokenizer={tmp_path / 'absent.json'}: ")
    with pytest.raises(DataError):
        Text(tokenizer=str(tmp_path / "absent.json")).build_frontend(TINY)


def test_settings_that_have_read_their_tokenizer_travel_to_workers(file: Path) -> None:
    text = Text(tokenizer=str(file))
    vocabulary = text.loaded_tokenizer.vocabulary
    travelled = pickle.loads(pickle.dumps(text))
    assert travelled == text
    assert travelled.loaded_tokenizer.vocabulary == vocabulary


def test_lengths_come_from_the_header_of_ready_tokens() -> None:
    assert Text.length_of({"tokens": pack_ids([0, 7, 8, 2], 300)}) == 4
    assert Text.length_of({"txt": b"some text"}) is None
    with pytest.raises(SampleError):
        Text.length_of({"tokens": b"damaged"})


def test_raw_features_are_a_bag_of_tokens() -> None:
    features = Text(vocabulary=30).exhibit.raw_features(batch_of([[0, 9, 9, 2], [0, 7, 2]]))
    assert features.shape == (2, 30)
    assert features[0, 9] > features[0, 0] > 0
    assert not features[1, 1]  # padding
