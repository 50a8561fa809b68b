"""The report's pictures of text: what the student sees, and which texts the teacher finds alike.

Shapes: B texts, T tokens (padding included), M masks, D width.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data2vec.core.batch import Batch
from data2vec.core.evaluation.features import pool
from data2vec.core.exhibit import Illustrations, Panel
from data2vec.text.tokenizer import Tokenizer

_SHOWN = 6  # texts
_SHOWN_MASKS = 4
_SHOWN_TOKENS = 70
_QUERIES = 5
_NEIGHBOURS = 3
_SNIPPET = 48  # tokens of a neighbour
_TOKEN_WIDTH = 18  # characters of the widest block

_MONO = "font:12.5px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_TEXT = f"{_MONO};white-space:pre-wrap;overflow-wrap:anywhere;color:#1b2330"
_HIDDEN = "background:#cfd6df;border-radius:3px;box-shadow:inset 0 0 0 1px #fff"
_SWAPPED = "background:#fbe3c0;border-radius:3px;box-shadow:inset 0 0 0 1px #fff"
_LABEL = "font-size:11px;color:#6b7280;padding-top:5px;text-align:right"
_CARD = "border-top:1px solid #e3e7ec;padding:10px 0;display:grid;gap:2px 14px;grid-template-columns:86px minmax(0,1fr)"


def panels(drawn: Illustrations, tokenizer: Tokenizer) -> list[Panel]:
    """Masked texts under their originals, and the nearest neighbours of some texts.

    Args:
        drawn: ``batch.inputs`` (B, T) token ids, ``batch.student_inputs`` too where hidden tokens were replaced; the
            first six are shown, neighbours are sought among all.
        tokenizer: turns ids into text.

    Raises:
        ValueError: masks or features are not of the batch's tokens.
    """
    b, t = drawn.batch.inputs.shape
    if drawn.mask.shape[::2] != (b, t) or drawn.features.shape[:2] != (b, t):
        raise ValueError(
            f"masks {tuple(drawn.mask.shape)} and features {tuple(drawn.features.shape)} do not fit {b} x {t} tokens"
        )
    found = [_masked_panel(drawn, tokenizer)]
    return [*found, _neighbours_panel(drawn, tokenizer)] if b > 1 else found


def _masked_panel(drawn: Illustrations, tokenizer: Tokenizer) -> Panel:
    batch, masks = drawn.batch, drawn.mask.bool().cpu()
    count = masks.shape[1]
    shown = min(count, _SHOWN_MASKS)
    lengths = _lengths(batch)
    cards = []
    for number in range(min(_SHOWN, len(batch))):
        length = lengths[number]
        cut = min(length, _SHOWN_TOKENS)
        ids = batch.inputs[number, :cut].tolist()
        read = None if batch.student_inputs is None else batch.student_inputs[number, :cut].tolist()
        more = "…" if length > cut else ""
        rows = [("original", "".join(html.escape(text) for text in _visible(tokenizer, ids)) + more)]
        for row in range(shown):
            name = "student" if count == 1 else f"mask {row + 1}"
            rows.append((name, _masked(tokenizer, ids, read, masks[number, row, :cut].tolist()) + more))
        cards.append(_card(rows))
    valid = torch.arange(masks.shape[2]) < torch.tensor(lengths)[:, None]
    hidden = 100 * float(masks.sum()) / max(1, count * int(valid.sum()))
    several = f" Each text is seen under {count} masks" if count > 1 else ""
    several += f", of which {shown} are shown." if count > shown else "." if several else ""
    # Not every run replaces hidden tokens by others, and no colour is explained that is not there.
    other = batch.student_inputs is not None and bool((batch.student_inputs.cpu() != tokenizer.mask)[masks[:, 0]].any())
    swapped = " Orange ones show a random token instead, or are left as they are." if other else ""
    caption = (
        f"Grey tokens are hidden from the student, {hidden:.0f} % on average.{swapped} "
        f"The teacher sees the whole text, and the student predicts the teacher's features at these places.{several}"
    )
    return Panel("What the student sees", caption, f"<div>{''.join(cards)}</div>")


def _masked(tokenizer: Tokenizer, ids: Sequence[int], read: Sequence[int] | None, mask: Sequence[bool]) -> str:
    """The text as the student sees it: blocks as wide as the hidden tokens, what replaced them in orange.

    Args:
        ids: tokens of the text.
        read: what the student reads instead; None: hidden tokens are not there at all.
        mask: true where hidden.
    """
    parts = []
    read = [tokenizer.mask] * len(ids) if read is None else read
    originals, replacements = _visible(tokenizer, ids), _visible(tokenizer, read)
    for original, replacement, token, hidden in zip(originals, replacements, read, mask, strict=True):
        if not hidden:
            parts.append(html.escape(original))
        elif token != tokenizer.mask:
            parts.append(f'<span style="{_SWAPPED}">{html.escape(replacement)}</span>')
        else:  # no-break spaces: a block is not lost at the end of a line
            width = min(max(1, len(original)), _TOKEN_WIDTH)
            parts.append(f'<span style="{_HIDDEN}">{"&nbsp;" * width}</span>&#8203;')
    return "".join(parts)


def _neighbours_panel(drawn: Illustrations, tokenizer: Tokenizer) -> Panel:
    batch = drawn.batch
    b = len(batch)
    lengths = _lengths(batch)
    padding = torch.arange(batch.inputs.shape[1]) >= torch.tensor(lengths)[:, None]
    similarity = _similarity(pool(drawn.features.detach().cpu(), padding))
    labels = batch.labels.tolist()
    cards = []
    for query in np.linspace(0, b - 1, min(_QUERIES, b)).round().astype(int).tolist():
        order = [int(n) for n in np.argsort(-similarity[query], kind="stable") if n != query][:_NEIGHBOURS]
        rows = [("text", _snippet(tokenizer, batch, query, lengths[query]))]
        for number in order:
            known = labels[query] >= 0 and labels[number] >= 0
            same = ("same class" if labels[query] == labels[number] else "other class") if known else ""
            label = f"{similarity[query, number]:+.2f}" + (f" · {same}" if same else "")
            rows.append((label, _snippet(tokenizer, batch, number, lengths[number])))
        cards.append(_card(rows, "126px"))
    caption = (
        f"Some texts and their nearest neighbours among {b} evaluation texts, by the cosine of the teacher's mean "
        "features, from which the mean of all texts is taken off first."
    )
    return Panel("Nearest neighbours", caption, f"<div>{''.join(cards)}</div>")


def _similarity(x: Tensor) -> NDArray[np.float32]:
    """(B, D) to (B, B) cosines around the mean; zero where a text has no direction of its own."""
    x = x - x.mean(dim=0)
    x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (x @ x.T).nan_to_num(0.0).numpy()


def _snippet(tokenizer: Tokenizer, batch: Batch, number: int, length: int) -> str:
    ids = batch.inputs[number, : min(length, _SNIPPET)].tolist()
    kept = [token for token in ids if token not in (tokenizer.bos, tokenizer.pad)]
    return "".join(html.escape(text) for text in _visible(tokenizer, kept)) + ("…" if length > _SNIPPET else "")


def snippets(batch: Batch, tokenizer: Tokenizer) -> list[str]:
    """The beginning of each text of a batch, escaped."""
    return [_snippet(tokenizer, batch, number, length) for number, length in enumerate(_lengths(batch))]


def _visible(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens' texts on one line: line breaks as arrows, what cannot be printed as its number."""
    return ["".join(map(_printed, text)) for text in tokenizer.tokens(ids)]


def _printed(character: str) -> str:
    if character == "\n":
        return "↵"
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def _card(rows: Sequence[tuple[str, str]], width: str = "86px") -> str:
    """Rows of a label and HTML."""
    cells = "".join(
        f'<div style="{_LABEL}">{html.escape(label)}</div><div style="{_TEXT}">{text}</div>' for label, text in rows
    )
    return f'<div style="{_CARD.replace("86px", width)}">{cells}</div>'


def _lengths(batch: Batch) -> list[int]:
    b, t = batch.inputs.shape
    return [t] * b if batch.lengths is None else [int(length) for length in batch.lengths]
