"""The report's pictures of images: what the student sees, and what the teacher's patches have in common.

Shapes: B images, C channels (1 or 3), H x W pixels, gh x gw patches (T in all), M masks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.exhibit import Illustrations, Panel
from data2vec.core.report.pictures import gallery, image, png

_SHOWN = 8
_SHOWN_MASKS = 4
_ENOUGH_TO_CENTRE = 32  # images whose mean at a position says what the position alone contributes
_TARGET_SIDE = 224  # tiny images are enlarged by a whole factor to about this many pixels
_HATCH_LIGHT, _HATCH_DARK = 226, 202

Picture = NDArray[np.uint8]


def panels(drawn: Illustrations, *, mean: Sequence[float], std: Sequence[float], patch: int) -> list[Panel]:
    """Masked inputs beside their originals, and the patch features' principal components as colours.

    Args:
        drawn: ``batch.inputs`` (B, C, H, W), normalised; the first eight are shown, the components are those of all.
        mean, std: of each channel, to undo the normalisation; a single value serves every channel.
        patch: side of a patch in pixels.

    Raises:
        ValueError: grid, patch and image size do not belong together.
    """
    gh, gw = drawn.shape
    height, width = drawn.batch.inputs.shape[-2:]
    if (gh * patch, gw * patch) != (height, width):
        raise ValueError(f"a grid of {gh} x {gw} patches of {patch} pixels does not cover {height} x {width} pixels")
    originals = [_enlarge(picture) for picture in _to_uint8(drawn.batch.inputs[:_SHOWN], mean, std)]
    return [_masked_panel(originals, drawn, (gh, gw)), _components_panel(originals, drawn, (gh, gw))]


def pictures(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """An image tag for each of (B, C, H, W) normalised inputs."""
    return [image(png(_enlarge(picture)), "image") for picture in _to_uint8(inputs, mean, std)]


def _masked_panel(originals: list[Picture], drawn: Illustrations, grid: tuple[int, int]) -> Panel:
    masks = drawn.mask[: len(originals)].cpu().numpy()
    count = masks.shape[1]
    shown = min(count, _SHOWN_MASKS)
    cards = []
    for original, sample in zip(originals, masks, strict=True):
        card = [(image(png(original), "original image"), "original")]
        for number in range(shown):
            view = _hide(original, sample[number].reshape(grid))
            caption = "student" if shown == 1 else f"mask {number + 1}"
            card.append((image(png(view), "image with masked patches hidden"), caption))
        cards.append(card)
    hidden = 100 * float(masks.mean())
    several = f" Each image is seen under {count} masks" if count > 1 else ""
    several += f", of which {shown} are shown." if count > shown else "." if several else ""
    caption = (
        f"Hatched patches are hidden from the student, {hidden:.0f} % on average. The teacher sees the whole image, "
        f"and the student predicts the teacher's features at the hidden patches.{several}"
    )
    return Panel("What the student sees", caption, gallery(cards, columns=4 if shown == 1 else 2))


def _components_panel(originals: list[Picture], drawn: Illustrations, grid: tuple[int, int]) -> Panel:
    centred = len(drawn.features) >= _ENOUGH_TO_CENTRE
    colours = _components(drawn.features, by_position=centred)[: len(originals)]
    cards = []
    for original, colour in zip(originals, colours, strict=True):
        side = (original.shape[0] // grid[0], original.shape[1] // grid[1])
        picture = np.repeat(np.repeat(colour.reshape(*grid, 3), side[0], axis=0), side[1], axis=1)
        cards.append([(image(png(original), "original image"), "original"),
                      (image(png(picture), "principal components of the patch features"), "features")])  # fmt: skip
    taken_off = " What all images have in common at a place is taken off first." if centred else ""
    caption = (
        f"The first three principal components of the teacher's patch features, over {len(drawn.features)} images, as "
        f"red, green and blue.{taken_off} Patches that the teacher finds alike have like colours, within an image and "
        "across images."
    )
    return Panel("Patch features", caption, gallery(cards, columns=4))


def _to_uint8(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Picture]:
    """(B, C, H, W) normalised to B pictures (H, W, 3)."""
    x = x.detach().float().cpu()
    scale = torch.tensor(tuple(std)[: x.shape[1]], dtype=torch.float32).view(1, -1, 1, 1)
    shift = torch.tensor(tuple(mean)[: x.shape[1]], dtype=torch.float32).view(1, -1, 1, 1)
    x = (x * scale + shift).clamp(0, 1)
    if x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    pictures = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return list(pictures)


def _enlarge(picture: Picture) -> Picture:
    factor = max(1, round(_TARGET_SIDE / max(picture.shape[:2])))
    return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


def _hide(picture: Picture, mask: NDArray[np.bool_]) -> Picture:
    """The picture with masked patches (gh, gw) under a grey hatch."""
    height, width = picture.shape[:2]
    covered = np.repeat(np.repeat(mask, height // mask.shape[0], axis=0), width // mask.shape[1], axis=1)
    rows, columns = np.indices((height, width))
    stripe = ((rows + columns) // 4) % 3 == 0
    hatch = np.where(stripe, _HATCH_DARK, _HATCH_LIGHT).astype(np.uint8)
    return np.where(covered[:, :, None], hatch[:, :, None], picture)


def _components(features: Tensor, *, by_position: bool = False) -> Picture:
    """(B, T, D) to (B, T, 3): three principal components, each stretched from its 1st to its 99th percentile.

    ``by_position`` takes off the mean of each position over the images: else the components of a model with absolute
    positions mostly show where a patch lies.
    """
    x = features.detach().float().cpu()
    b, t, d = x.shape
    if by_position:
        x = x - x.mean(dim=0)
    flat = x.reshape(b * t, d)
    flat = flat - flat.mean(dim=0)
    _, _, axes = torch.linalg.svd(flat, full_matrices=False)
    axes = axes[:3]
    # An axis has no sign of its own; the largest entry is made positive, so that the colours do not flip.
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    projected = flat @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    projected = torch.nn.functional.pad(projected, (0, 3 - projected.shape[1]))
    low, high = torch.quantile(projected, torch.tensor([0.01, 0.99]), dim=0)
    # An axis without variance is rounding noise, and stretching it would show a pattern that is not there.
    scale = (high - low).max()
    width = torch.where(high - low > 1e-4 * scale, high - low, torch.inf)
    stretched = torch.where(width.isinf(), 0.5, (projected - low) / width).clamp(0, 1)
    return (stretched.reshape(b, t, 3) * 255).round().to(torch.uint8).numpy()
