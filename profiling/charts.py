"""The report's two charts, from records. A picture carries the digest of the numbers it shows, and is drawn anew only
when they change: two versions of matplotlib draw the same numbers in different bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEYWORD = "Records"  # of the PNG's text chunk that holds the digest
OURS, PEER = "#1b6ca8", "#b0b0b0"
DOTS_PER_INCH = 130
SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Bars(NamedTuple):
    """One panel: a time for every method, and what it is a multiple of."""

    title: str
    unit: str
    values: Mapping[str, float]  # method's name -> time


class Curve(NamedTuple):
    """Cost against rows of one operation."""

    name: str
    rows: Sequence[float]
    cost: Sequence[float]


def digest(numbers: Any) -> str:
    """Digest of what a chart shows: JSON's types and named tuples of them."""
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def stored_digest(path: Path) -> str | None:
    """The digest a picture carries, or None of one that is missing or carries none."""
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(SIGNATURE):
        return None
    place = len(SIGNATURE)
    while place + 12 <= len(data):
        (length,), kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        keyword, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and keyword == KEYWORD.encode():
            return text.decode("latin-1")
        place += 12 + length
    return None


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, numbers: Any) -> None:
    """Write the picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    figure.savefig(beside, format="png", dpi=DOTS_PER_INCH, metadata={KEYWORD: digest(numbers), "Software": None})
    os.replace(beside, path)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def time_by_method(path: Path, panels: Sequence[Bars]) -> None:
    """Draw horizontal bars, a panel for each machine; unchanged where the picture shows the same numbers already."""
    if stored_digest(path) == digest(panels):
        return
    rows = max(len(panel.values) for panel in panels)
    figure = _figure(6.4 * len(panels), 1.2 + 0.38 * rows)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        names = list(panel.values)[::-1]
        values = [panel.values[name] for name in names]
        colors = [OURS if name.startswith("vgf_fast") else PEER for name in names]
        bars = axes.barh(names, values, color=colors, height=0.7)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_xlim(0.0, 1.15 * max(values))
        axes.set_xlabel(panel.unit)
        axes.set_title(panel.title, loc="left", fontsize=11)
        axes.tick_params(axis="y", length=0)
        _plain(axes)
    _save(figure, path, panels)


def cost_against_rows(path: Path, curves: Sequence[Curve], title: str, unit: str) -> None:
    """Draw cost against rows on logarithmic axes; unchanged where the picture shows the same numbers already."""
    numbers = [curves, title, unit]
    if stored_digest(path) == digest(numbers):
        return
    figure = _figure(6.4, 4.2)
    axes = figure.add_subplot()
    for curve, color in zip(curves, ("#1b6ca8", "#d95f02", "#4d9221", "#7570b3"), strict=False):
        axes.plot(curve.rows, curve.cost, marker="o", markersize=4, color=color, label=curve.name)
    last = max(curves, key=lambda curve: curve.rows[-1])
    low, high = last.rows[0], last.rows[-1]
    slope = [0.5 * last.cost[-1] * rows / high for rows in (low, high)]
    axes.plot((low, high), slope, color="black", linestyle=":", linewidth=1.2, label="proportional to rows")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("rows: states x particles")
    axes.set_ylabel(unit)
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    _plain(axes)
    _save(figure, path, numbers)
