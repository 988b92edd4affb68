"""The loop that all training shares: what is due when, and what a signal finds and leaves."""

import math
import os
import signal

import pytest

from vgf_fast import loop
from vgf_fast.loop import Duty


class Counting:
    """Steps that are counted, and a diary of what was done after which."""

    def __init__(self, piece=1000):
        self.step, self.piece, self.diary, self.limits = 0, piece, [], []

    def work(self, limit):
        self.limits.append(limit)
        self.step += min(limit, self.piece)

    def duty(self, name, interval, **options):
        return Duty(interval, lambda: self.diary.append((name, self.step)), **options)

    def run(self, end, duties, save=None, **options):
        loop.run("working", self.work, lambda: self.step, end, duties, save, progress=False, **options)


@pytest.mark.parametrize("piece", [1, 2, 1000])
def test_everything_is_done_when_it_is_due_whatever_the_pieces(piece):
    counting = Counting(piece)
    log, evaluation = counting.duty("log", 4, is_held=True), counting.duty("evaluation", 6)
    counting.run(14, [log, evaluation], counting.duty("save", 0), first=lambda: counting.diary.append(("first", 0)))
    assert counting.diary == [
        ("first", 0), ("log", 4), ("evaluation", 6), ("log", 8), ("log", 12), ("evaluation", 12), ("log", 14),
        ("evaluation", 14), ("save", 14),
    ]  # fmt: skip
    assert max(counting.limits) == 4


def test_a_loop_that_goes_on_has_the_same_dates():
    counting = Counting()
    counting.step = 5
    counting.run(9, [counting.duty("log", 4)], counting.duty("save", 3))
    assert counting.diary == [("save", 6), ("log", 8), ("log", 9), ("save", 9)]


def test_nothing_is_done_without_steps():
    counting = Counting()
    counting.run(0, [counting.duty("log", 1)], counting.duty("save", 1))
    assert counting.diary == []


def test_a_signal_in_the_work_waits_for_it_and_for_what_belongs_to_it():
    counting = Counting(1)
    work = counting.work

    def signalled(limit):
        if counting.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        work(limit)

    counting.work = signalled
    log, evaluation = counting.duty("log", 4, is_held=True), counting.duty("evaluation", 4)
    with pytest.raises(KeyboardInterrupt):
        counting.run(8, [log, evaluation], counting.duty("save", 8))
    assert counting.diary == [("log", 4), ("save", 4)]


@pytest.mark.parametrize("where", ["first", "evaluation"])
def test_a_signal_in_a_duty_saves(where):
    counting = Counting()

    def stop():
        raise KeyboardInterrupt

    duties = [counting.duty("log", 4), *([Duty(4, stop)] if where == "evaluation" else [])]
    with pytest.raises(KeyboardInterrupt):
        counting.run(8, duties, counting.duty("save", 2), first=stop if where == "first" else None)
    assert counting.diary == ([("save", 0)] if where == "first" else [("save", 2), ("log", 4), ("save", 4)])


def test_a_signal_after_saving_saves_no_second_time():
    counting = Counting(1)
    work = counting.work

    def work_or_stop(limit):
        if counting.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        work(limit)
        counting.step -= counting.step == 5  # nothing was done

    counting.work = work_or_stop
    with pytest.raises(KeyboardInterrupt):
        counting.run(8, [], counting.duty("save", 4))
    assert counting.diary == [("save", 4)]


def test_work_half_done_is_not_saved():
    counting = Counting()

    def torn(limit):
        counting.step += 1
        raise KeyboardInterrupt

    counting.work = torn
    with pytest.raises(KeyboardInterrupt):
        counting.run(8, [], counting.duty("save", 1))
    assert counting.diary == []


def test_losses_that_are_no_numbers_are_named():
    loop.check_losses(3, {"critic_loss": 1.0, "q_mean": math.nan})
    with pytest.raises(ArithmeticError, match=r"diverged: in update 3 critic_loss is inf, bc_loss is 1;"):
        loop.check_losses(3, {"critic_loss": math.inf, "bc_loss": 1.0})
