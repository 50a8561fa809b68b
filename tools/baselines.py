"""Baselines for the labels of a fine-tuned run, which know nothing of pretraining.

The plainest representation of the input under a linear classifier: pixels, the log-mel spectrum, TF-IDF of tokens
(Salton and Buckley 1988); for letters, each frame of the log-mel spectrum with its neighbours under CTC. And a small
network made for the task: convolutions for pictures and spectrograms, convolutions of embeddings for texts (Kim 2014,
arXiv 1408.5882), a bidirectional recurrent network for letters (Graves et al. 2006).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegressionCV
from torch import Tensor, nn

from data2vec.core.batch import Batch
from data2vec.core.data.dataset import EvaluationData, TrainData
from data2vec.core.evaluation.features import Pooled
from data2vec.core.evaluation.linear import linear_accuracy
from data2vec.core.exhibit import Exhibit
from data2vec.core.finetuning.recognition import RecognitionTask
from data2vec.core.finetuning.transcribing import Transcript, cut, error_rates, said_in, text_of
from data2vec.core.run.kinds import kind_of
from data2vec.core.run.prepare import open_data, with_assets
from data2vec.core.settings.finetuning import Classification, FineTuning, LabelKind, Recognition

LINEAR, TFIDF, SMALL = "linear classifier of the raw input", "linear classifier of TF-IDF", "small network"
_BATCH = 64
_UPDATES = 1_000
_RATE = 3e-3
_WIDTHS = (32, 64, 128)
_NEIGHBOURS = 7  # frames that a linear classifier of letters sees at once


def baseline_scores(recipe: FineTuning, folder: Path) -> dict[str, dict[str, float]]:
    """The scores of every baseline that suits what a finished run learnt, by its name and the score's."""
    if isinstance(recipe, Recognition):
        return _recognised(recipe, *_opened(recipe, folder))
    if isinstance(recipe, Classification) and recipe.labels.kind is LabelKind.CLASS:
        return {name: {"accuracy": value} for name, value in _classified(recipe, *_opened(recipe, folder))}
    return {}


def _opened(recipe: FineTuning, folder: Path) -> tuple[TrainData, EvaluationData]:
    """The labelled samples that a run learnt from, and those that judged it."""
    opened = open_data(recipe, folder / "cache")
    with_assets(recipe, *opened, folder, started=True)
    _, (train, validation) = kind_of(recipe).settle(recipe, opened, recipe)
    (name,) = recipe.modalities
    return train[name], validation[name]


def _classified(recipe: Classification, train: TrainData, validation: EvaluationData) -> Iterator[tuple[str, float]]:
    (modality,) = recipe.modalities.values()
    learnt = train.for_evaluation()  # without augmentation
    tokens = not next(iter(learnt.evaluation_batches(1))).inputs.is_floating_point()
    seen, judged = (_raw_features(modality.exhibit, data) for data in (learnt, validation))
    if tokens:
        yield TFIDF, tfidf_accuracy(seen, judged, seed=recipe.train.seed)
    else:
        yield LINEAR, linear_accuracy(seen, judged, seed=recipe.train.seed)
    yield SMALL, _small_accuracy(recipe, modality.exhibit, train, validation)


def _raw_features(exhibit: Exhibit, data: EvaluationData) -> Pooled:
    batches = list(data.evaluation_batches(_BATCH))
    x = torch.cat([exhibit.raw_features(batch) for batch in batches])
    return Pooled(x, torch.cat([batch.labels for batch in batches]))


def tfidf_accuracy(seen: Pooled, judged: Pooled, *, seed: int) -> float:
    """The accuracy of logistic regression on log(1 + term frequency) times inverse document frequency.

    Its strength is chosen by cross-validation among the samples that it learns from.
    """
    weighting = TfidfTransformer().fit(seen.x.numpy())
    classifier = LogisticRegressionCV(
        Cs=[0.1, 1.0, 10.0, 100.0], l1_ratios=(0.0,), scoring="neg_log_loss", max_iter=1_000, random_state=seed,
        use_legacy_attributes=False,
    )  # fmt: skip
    classifier.fit(weighting.transform(seen.x.numpy()), seen.labels.numpy())
    named = classifier.predict(weighting.transform(judged.x.numpy()))
    return float((named == judged.labels.numpy()).mean())


class ConvolutionalNetwork(nn.Module):
    """Three convolutions of 3 x 3 with batch norm and pooling, then a linear classifier.

    Args:
        channels: of the pictures.
        classes: to be told apart.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(4 * channels, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, classes) logits of (B, channels, H, W)."""
        logits: Tensor = self.head(self.layers(pictures))
        return logits


class TextNetwork(nn.Module):
    """Embeddings under convolutions of 3, 4 and 5 tokens, the largest value over the text, and a linear classifier.

    Args:
        vocabulary: tokens.
        classes: to be told apart.
        width: of the embeddings and of each convolution.
    """

    def __init__(self, vocabulary: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, size, padding=size // 2) for size in (3, 4, 5))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3 * width, classes)

    def forward(self, ids: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, classes) logits of (B, L) ids, of which ``lengths`` are valid."""
        x = self.embedding(ids).transpose(1, 2)
        length = ids.shape[1]
        valid = torch.ones(1, 1, length, dtype=torch.bool)
        if lengths is not None:
            valid = (torch.arange(length) < lengths[:, None]).unsqueeze(1)
        x = x * valid
        # 0 is the least that ReLU gives: padded places never hold the largest value.
        found = [(convolution(x)[..., :length].relu() * valid).amax(2) for convolution in self.convolutions]
        logits: Tensor = self.head(self.dropout(torch.cat(found, 1)))
        return logits


def _small_accuracy(recipe: Classification, exhibit: Exhibit, train: TrainData, validation: EvaluationData) -> float:
    """The accuracy of a small network, which sees what the run saw, augmentation included."""
    torch.manual_seed(recipe.train.seed)
    first = next(iter(validation.evaluation_batches(1)))
    picture, classes = exhibit.raw_picture(first), len(recipe.labels.classes)
    network: nn.Module
    if picture is not None:
        network = ConvolutionalNetwork(picture.shape[1], classes)

        def logits(batch: Batch) -> Tensor:
            found: Tensor = network(exhibit.raw_picture(batch))
            return found
    else:
        sets = (train.for_evaluation(), validation)
        largest = max(int(batch.inputs.max()) for data in sets for batch in data.evaluation_batches(_BATCH))
        network = TextNetwork(largest + 1, classes)

        def logits(batch: Batch) -> Tensor:
            found: Tensor = network(batch.inputs, batch.lengths)
            return found

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits(batch), batch.labels, label_smoothing=0.1)

    _learn(network, train.batches(0, min(_BATCH, train.total)), loss)
    right = total = 0
    with torch.no_grad():
        for batch in validation.evaluation_batches(_BATCH):
            right += int((logits(batch).argmax(1) == batch.labels).sum())
            total += len(batch)
    return right / total


def _learn(network: nn.Module, batches: Iterator[Batch], loss_of: Callable[[Batch], Tensor]) -> None:
    """Train for as many updates as every small network has, and leave it in evaluation mode."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=_UPDATES)
    network.train()
    for batch in islice(batches, _UPDATES):
        optimiser.zero_grad()
        loss_of(batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    network.eval()


class FrameNetwork(nn.Module):
    """Letters from frames of the raw input: a linear map of seven frames, or a recurrent network of both directions.

    Args:
        width: of a frame.
        symbols: of the letters.
        recurrent: layers of 128 gated units in each direction; 0 is the linear map.
    """

    def __init__(self, width: int, symbols: int, recurrent: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.recurrent = None
        if recurrent:
            self.recurrent = nn.GRU(width, 128, recurrent, batch_first=True, bidirectional=True, dropout=0.3)
            width = 2 * 128
        self.dropout = nn.Dropout(0.3 if recurrent else 0.0)
        self.head = nn.Conv1d(width, symbols, _NEIGHBOURS, padding=_NEIGHBOURS // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, symbols) logits of (B, T, width)."""
        x = self.norm(x.transpose(1, 2))
        if self.recurrent is not None:
            x = self.recurrent(x.transpose(1, 2))[0].transpose(1, 2)
        logits: Tensor = self.head(self.dropout(x)).transpose(1, 2)
        return logits


def _recognised(recipe: Recognition, train: TrainData, validation: EvaluationData) -> dict[str, dict[str, float]]:
    ((name, modality),) = recipe.modalities.items()
    task = RecognitionTask.build(recipe).eval()  # reads transcripts and counts frames; its weights are not used
    extractor = task.backbone.encoder.frontend(name).extractor

    def logits(network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x = modality.exhibit.raw_positions(batch)
        frames = extractor.grid(batch.inputs, batch.lengths)[1]
        if frames is None:
            frames = torch.full((len(batch),), x.shape[1])
        valid = torch.arange(x.shape[1]) < frames[:, None]
        return network(x * valid.unsqueeze(-1)), frames

    def stream() -> Iterator[Batch]:
        length = recipe.train.micro_length
        if length is None:
            return train.batches(0, min(_BATCH, train.total))
        return train.length_batches(0, length)

    def score(network: nn.Module) -> dict[str, float]:
        def loss(batch: Batch) -> Tensor:
            values, frames = logits(network, batch)
            return task.losses(values, frames, task.prepare(batch, seed=0, update=0)).mean()

        _learn(network, stream(), loss)
        found = []
        with torch.no_grad():
            for batch in validation.evaluation_batches(recipe.evaluation.batch):
                heard = [text_of(task, own) for own in cut(*logits(network, batch))]
                said = said_in(task, batch)
                found += [Transcript(*parts, loss=0.0) for parts in zip(batch.keys, said, heard, strict=True)]
        return {rate: value for rate, value in error_rates(found).items() if rate in ("wer", "cer")}

    first = next(iter(validation.evaluation_batches(1)))
    width, symbols = modality.exhibit.raw_positions(first).shape[2], len(task.letters)
    found = {}
    for row, recurrent in ((LINEAR, 0), (SMALL, 2)):
        torch.manual_seed(recipe.train.seed)
        found[row] = score(FrameNetwork(width, symbols, recurrent))
    return found
