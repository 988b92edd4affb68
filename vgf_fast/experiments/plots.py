"""The demo's two pictures, drawn without a display."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from vgf_fast.common.files import replacing

if TYPE_CHECKING:
    from vgf_fast.experiments.demo import Picture

COLORS = ("#7f7f7f", "#d95f02", "#1b6ca8", "#4d9221")
DOTS_PER_INCH = 150


def _figure(width: float, height: float) -> Any:
    """An empty figure [inches] of matplotlib's file-only canvas: no window system, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"matplotlib cannot be imported ({error}): pip install 'vgf_fast[train]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH)


def learning_curve(
    path: str | os.PathLike[str], updates: np.ndarray, lines: Mapping[str, np.ndarray], data_return: float
) -> None:
    """Return against updates: ``lines`` maps a label to (mean, low, high) [3, M] at ``updates`` [M]."""
    figure = _figure(6.4, 4.0)
    axes = figure.add_subplot()
    axes.axhline(data_return, color="black", linestyle=":", linewidth=1.2)
    axes.annotate(
        "the data's own controller", (1.0, data_return), xycoords=("axes fraction", "data"), xytext=(-4, 4),
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    names = {"bc": "behaviour cloning", "L=0": "L = 0 (best of N)"}
    for color, (label, (mean, low, high)) in zip(COLORS, lines.items(), strict=False):
        name = names.get(label, label.replace("=", " = "))
        axes.plot(updates, mean, color=color, marker="o", markersize=4, label=name, clip_on=False, zorder=3)
        axes.fill_between(updates, low, high, color=color, alpha=0.18, linewidth=0)
    axes.set_xlabel("updates")
    axes.set_ylabel("return of an episode")
    axes.set_title("Reacher: return while learning", fontsize=11)
    axes.set_xlim(updates[0], updates[-1])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    _save(figure, path)


def particles(path: str | os.PathLike[str], picture: Picture) -> None:
    """The particles' ways over the contours of Q in the action square."""
    figure = _figure(5.8, 5.2)
    axes = figure.add_subplot()
    contours = axes.contourf(picture.grid, picture.grid, picture.q, levels=24, cmap="YlGnBu_r")
    figure.colorbar(contours, ax=axes, shrink=0.8, pad=0.03, label="Q, mean over the critics")
    start, end = picture.trajectory[0], picture.trajectory[-1]
    for way in picture.trajectory.swapaxes(0, 1):
        axes.plot(way[:, 0], way[:, 1], color="black", linewidth=1.0, marker=".", markersize=3, zorder=3)
    steps = len(picture.trajectory) - 1
    dots = {"edgecolors": "black", "linewidths": 0.8, "clip_on": False, "s": 36, "zorder": 4}
    star = {**dots, "marker": "*", "s": 220, "zorder": 5}
    axes.scatter(*start.T, color="white", label="drawn from the behaviour model", **dots)
    axes.scatter(*end.T, color="#d95f02", label=f"after {steps} flow steps", **dots)
    axes.scatter(*end[picture.chosen], color="#ffd92f", label="chosen: the largest Q", **star)
    axes.set(xlabel="torque of the shoulder", ylabel="torque of the elbow", xlim=(-1, 1), ylim=(-1, 1))
    axes.set(xticks=[-1, -0.5, 0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1], aspect="equal")
    axes.set_title("Reacher: particles flow up the value in one state", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8, columnspacing=1.0, handletextpad=0.3)
    _save(figure, path)
