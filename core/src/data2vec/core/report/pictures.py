"""Self-contained pictures for the report: data URIs, image tags and grids of them. Any modality may use these."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def png(array: NDArray[np.uint8]) -> str:
    """A PNG data URI of (H, W, 3) RGB or (H, W) grey uint8 values.

    Raises:
        ValueError: another shape or type.
    """
    from matplotlib.image import imsave

    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"a picture must be uint8 (H, W, 3) or (H, W), got {array.dtype} {array.shape}")
    rgb = np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array
    stream = io.BytesIO()
    imsave(stream, np.ascontiguousarray(rgb), format="png", pil_kwargs={"optimize": True})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def figure_svg(figure: Any) -> str:
    """An SVG data URI of a matplotlib figure; text stays text, set in the reader's sans-serif font."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "data2vec"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def image(uri: str, alt: str, *, crisp: bool = False) -> str:
    """An ``img`` as wide as its cell. ``crisp`` keeps pixels square when the page scales a tiny picture up."""
    style = "width:100%;height:auto;display:block;border-radius:4px" + (";image-rendering:pixelated" if crisp else "")
    return f'<img src="{html.escape(uri, quote=True)}" alt="{html.escape(alt, quote=True)}" style="{style}">'


def gallery(cards: Sequence[Sequence[tuple[str, str]]], *, columns: int) -> str:
    """Cards side by side, ``columns`` on a wide page and fewer on a narrow one.

    Args:
        cards: each a row of (``image`` tag, caption) cells; captions are escaped.
        columns: cards in a row at full width.
    """
    least = 150 if max((len(card) for card in cards), default=1) <= 2 else 290
    share = 92 // max(columns, 1)
    parts = []
    for card in cards:
        cells = "".join(
            f'<figure style="margin:0;min-width:0">{tag}'
            f'<figcaption style="font-size:11px;color:#6b7280;text-align:center;padding-top:3px">'
            f"{html.escape(caption)}</figcaption></figure>"
            for tag, caption in card
        )
        grid = f"display:grid;gap:6px;grid-template-columns:repeat({max(len(card), 1)},minmax(0,1fr))"
        parts.append(f'<div style="{grid}">{cells}</div>')
    outer = f"display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(max({least}px,{share}%),1fr))"
    return f'<div style="{outer}">{"".join(parts)}</div>'
