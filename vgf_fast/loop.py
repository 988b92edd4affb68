"""The training loop that ``fit``, runs in a directory and learning online share: work, and what is due in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vgf_fast.common import interrupts
from vgf_fast.common.progress import progress_bar

LOSSES = ("critic_loss", "bc_loss", "score_loss")


class Duty(NamedTuple):
    """What is done every ``interval`` steps and after the last one; an interval of 0 leaves the last one alone."""

    interval: int
    do: Callable[[], None]
    is_held: bool = False  # belongs to the work before it: a signal waits for both


def run(
    label: str,
    work: Callable[[int], None],
    position: Callable[[], int],
    end: int,
    duties: Sequence[Duty],
    save: Duty | None = None,
    *,
    first: Callable[[], None] | None = None,
    progress: bool = True,
) -> None:
    """Work until ``position()``, a number of steps, is ``end``, and do in between what is due.

    ``work(limit)`` does at least one and at most ``limit`` steps, past no step at which something is due; then comes
    every duty that is, in order, and ``save`` at last. ``first`` is called before all work. A signal takes effect
    between two calls of ``work``, or in a duty that is not held; ``save`` is called then too, unless it was after the
    last step.

    Raises ``KeyboardInterrupt`` after that, or at once for a second signal, with nothing saved of work half done.
    """
    saved_at, is_whole = -1, True

    def saving() -> None:
        nonlocal saved_at
        assert save is not None
        save.do()
        saved_at = position()

    every = [*duties, *([] if save is None else [Duty(save.interval, saving)])]
    try:
        if first is not None:
            first()
        with progress_bar(label, total=end - position(), enabled=progress) as advance:
            while (before := position()) < end:
                left = [duty.interval - before % duty.interval for duty in every if duty.interval]
                is_whole = False
                with interrupts.held():
                    work(min([end - before, *left]))
                    is_whole, step = True, position()
                    due = [one for one in every if step == end or (one.interval and step % one.interval == 0)]
                    for duty in (one for one in due if one.is_held):
                        duty.do()
                for duty in (one for one in due if not one.is_held):
                    duty.do()
                advance(step - before)
    except KeyboardInterrupt:
        if save is not None and is_whole and saved_at != position():
            saving()
        raise


def check_losses(step: int, record: Mapping[str, float]) -> None:
    """Raise ``ArithmeticError`` when a loss of update number ``step`` is no longer a number."""
    losses = {name: value for name, value in record.items() if name in LOSSES}
    if not all(map(math.isfinite, losses.values())):
        told = ", ".join(f"{name} is {value:g}" for name, value in losses.items())
        raise ArithmeticError(
            f"training diverged: in update {step} {told}; try a lower learning rate, or rewards of smaller scale"
        )
