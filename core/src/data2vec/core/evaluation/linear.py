"""The linear probe: multinomial logistic regression on frozen, standardised features.

It minimises mean cross-entropy + (l2 / 2) ||W||^2 by full-batch L-BFGS. In the standardised features' principal
axes, each divided by the root of its curvature, the problem is well conditioned and few iterations are enough; the
rotation and the reduction to min(N, D) axes change neither the penalty nor the minimum. The strength l2 is chosen
on a validation part of the training samples, never on the test samples.

Shapes: N samples, D width, R axes (at most min(N, D)), C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from data2vec.core.errors import DataError
from data2vec.core.evaluation.features import Pooled

# From strong to weak, so that each solution is a good start for the next.
L2_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(1, -13, -1))
_VALIDATION_SHARE = 0.2
_PATIENCE = 2  # weaker penalties that may be worse in a row before the search ends
_MAX_ITERATIONS = 200
# Largest gradient entry, of a mean loss: rough while l2 is searched for, fine for the probe itself.
_SEARCH_TOLERANCE = 1e-4
_FINAL_TOLERANCE = 3e-6


@dataclass(frozen=True)
class LinearProbe:
    """A fitted probe. ``mean``, ``scale``: (D,); ``weight``: (D, C); ``bias``: (C,); ``classes``: (C,) labels."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    classes: Tensor
    l2: float

    def logits(self, x: Tensor) -> Tensor:
        """(N, D) to (N, C), on the device of the probe."""
        return ((x.to(self.mean.device) - self.mean) / self.scale) @ self.weight + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """(N, D) to (N,) int64 labels, on the CPU."""
        return self.classes[self.logits(x).argmax(dim=1)].cpu()


def fit_linear(train: Pooled, *, seed: int = 0, device: torch.device | str = "cpu") -> LinearProbe:
    """Choose l2 on a stratified fifth of ``train``, then fit all of it.

    The choice is by cross-entropy, which is less noisy than accuracy on few samples.

    Raises:
        DataError: a sample without a label, one class only, or fewer samples than two per class on average.
    """
    classes, y = _classes(train)
    x = train.x.to(device)
    y = y.to(device)
    held = _stratified(y.cpu(), seed).to(device)
    search = _Problem(x[~held], y[~held], len(classes))
    best, best_loss, worse = 0, float("inf"), 0
    for step, l2 in enumerate(L2_GRID):
        search.solve(l2, _SEARCH_TOLERANCE)
        loss = float(functional.cross_entropy(search.logits(x[held]), y[held]))
        if loss < best_loss:
            best, best_loss, worse = step, loss, 0
        elif (worse := worse + 1) >= _PATIENCE:
            break
    final = _Problem(x, y, len(classes))
    if best:
        final.solve(L2_GRID[best - 1], _SEARCH_TOLERANCE)  # a start nearer to the solution than zero
    final.solve(L2_GRID[best], _FINAL_TOLERANCE)
    return final.probe(classes.to(device), L2_GRID[best])


def linear_accuracy(train: Pooled, test: Pooled, *, seed: int = 0, device: torch.device | str = "cpu") -> float:
    """Share of ``test`` that a probe fitted to ``train`` classifies rightly, 0 to 1.

    Raises:
        DataError: see :func:`fit_linear`; or no labelled test sample, or a test class without a training sample.
    """
    if not len(test):
        raise DataError("linear probe: there is no labelled test sample")
    missing = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if missing:
        shown = ", ".join(str(label) for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"linear probe: {len(missing)} classes of the test samples have no training sample (class {shown}); "
            "raise evaluation.max_samples or check the labels"
        )
    probe = fit_linear(train, seed=seed, device=device)
    return float((probe.predict(test.x) == test.labels).double().mean())


def few_labels(train: Pooled, count: int, *, seed: int) -> Pooled:
    """``count`` samples drawn with as equal a number of each class as there are, the same for the same seed.

    Raises:
        DataError: ``count`` is below the number of classes, or above the number of samples.
    """
    classes, y = _classes(train)
    if count < len(classes):
        raise DataError(f"evaluation.few_labels={count}: fewer than the {len(classes)} classes; raise it")
    if count > len(train):
        raise DataError(f"evaluation.few_labels={count}: more than the {len(train)} training samples; lower it")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    turn = _place_within_class(y[order], len(classes))
    # First one of every class in random class order, then a second one, and so on until ``count`` are drawn.
    class_order = torch.randperm(len(classes), generator=generator)
    rank = turn * len(classes) + class_order[y[order]]
    return train.take(order[rank.argsort()[:count]])


def few_label_accuracy(
    train: Pooled,
    test: Pooled,
    count: int,
    *,
    draws: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Mean and standard deviation of the accuracy over ``draws`` class-balanced subsets of ``count`` samples."""
    accuracies = torch.tensor(
        [
            linear_accuracy(few_labels(train, count, seed=seed + draw), test, seed=seed + draw, device=device)
            for draw in range(draws)
        ],
        dtype=torch.float64,
    )
    return float(accuracies.mean()), float(accuracies.std(correction=1)) if draws > 1 else 0.0


def _classes(train: Pooled) -> tuple[Tensor, Tensor]:
    if not len(train):
        raise DataError("linear probe: there is no labelled training sample")
    if bool((train.labels < 0).any()):
        raise DataError("linear probe: every training sample needs a label")
    classes, y = train.labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise DataError(f"linear probe: all training samples are of class {int(classes[0])}; it needs two or more")
    if len(y) < 2 * len(classes):
        raise DataError(
            f"linear probe: {len(y)} training samples are too few for {len(classes)} classes; "
            "it needs two per class, one to fit and one to choose the penalty"
        )
    return classes, y


def _place_within_class(y: Tensor, classes: int) -> Tensor:
    """(N,): how many earlier samples have the same class."""
    order = torch.argsort(y, stable=True)
    counts = torch.bincount(y, minlength=classes)
    starts = counts.cumsum(0) - counts
    place = torch.empty_like(y)
    place[order] = torch.arange(len(y)) - starts[y[order]]
    return place


def _stratified(y: Tensor, seed: int) -> Tensor:
    """(N,) true for a fifth of each class, rounded up, but never for the only sample of a class."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(y)
    quota = torch.minimum((counts * _VALIDATION_SHARE).ceil().long(), counts - 1)
    held = torch.zeros(len(y), dtype=torch.bool)
    held[order] = _place_within_class(y[order], len(counts)) < quota[y[order]]
    return held


class _Problem:
    """One training set in its principal axes, solved for one l2 after another, each from the last solution."""

    def __init__(self, x: Tensor, y: Tensor, classes: int) -> None:
        self.mean = x.mean(dim=0)
        deviation = x.std(dim=0, correction=0)
        self.scale = torch.where(deviation > 1e-6 * deviation.max().clamp(min=1e-30), deviation, 1.0)
        z = (x - self.mean) / self.scale
        self.rotation, self.variance = _principal_axes(z)  # (D, R), (R,)
        self.z = z @ self.rotation
        self.y = y
        self.weight = z.new_zeros(classes, self.z.shape[1])  # (C, R), in the principal axes
        self.bias = z.new_zeros(classes)

    def solve(self, l2: float, tolerance: float) -> None:
        # A bound of the curvature along each axis: that of the softmax is at most a quarter.
        step = (0.25 * self.variance + l2).rsqrt()
        z = self.z * step
        v = (self.weight / step).requires_grad_()
        bias = self.bias.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [v, bias], max_iter=_MAX_ITERATIONS, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=tolerance, tolerance_change=1e-10,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (
                functional.cross_entropy(functional.linear(z, v, bias), self.y) + 0.5 * l2 * (step * v).square().sum()
            )
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        self.weight = (step * v).detach()
        self.bias = bias.detach()

    def logits(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.scale) @ (self.rotation @ self.weight.T) + self.bias

    def probe(self, classes: Tensor, l2: float) -> LinearProbe:
        return LinearProbe(self.mean, self.scale, self.rotation @ self.weight.T, self.bias, classes, l2)


def _principal_axes(z: Tensor) -> tuple[Tensor, Tensor]:
    """(D, R) orthonormal axes that span the rows of z (N, D), and (R,) the mean square along each."""
    n, d = z.shape
    # float64: the eigenvectors of a Gram matrix are those of z only as far as its square is precise.
    double = z.double()
    gram = double.T @ double if d <= n else double @ double.T
    eigenvalues, vectors = torch.linalg.eigh(gram / n)
    keep = eigenvalues > eigenvalues[-1] * 1e-10
    eigenvalues, vectors = eigenvalues[keep], vectors[:, keep]
    if d > n:
        vectors = double.T @ vectors / (eigenvalues * n).sqrt()
    return vectors.to(z.dtype), eigenvalues.to(z.dtype)
