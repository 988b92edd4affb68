"""SIGINT and SIGTERM: heard at once, acted on where nothing is torn, and the second one ends the process.

``listening`` is for a process of its own, the command line's; ``held`` is for work that must not end half-way, such as
an update, in any process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """What came in; ``requested`` is the first signal's name."""

    def __init__(self, owns_process: bool) -> None:
        self.requested: str | None = None
        self._owns_process = owns_process
        self._held = 0
        self._pending = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: raises ``KeyboardInterrupt``, if held later; a second one does not wait."""
        first = self.requested is None
        self.requested = self.requested or signal.Signals(number).name
        if first and self._held:
            self._pending = True
            return
        if not first and self._owns_process:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """A part after which, not in which, a signal takes effect."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._pending and not self._held:
            self._pending = False
            raise KeyboardInterrupt

    def watch(self, pipe: int) -> None:
        """Thread of a process of its own: the main one hears nothing while it is in a long call into C."""
        heard = 0
        while number := os.read(pipe, 1)[0]:
            if number in SIGNALS:
                heard += 1
                if heard == 2:
                    os._exit(INTERRUPTED)
                sys.stderr.write(f"{signal.Signals(number).name}: stopping; a second one stops at once\n")
                sys.stderr.flush()


_current: Interrupts | None = None  # of the main thread's ``listening``


def requested() -> str | None:
    """Name of the signal that asked the process to stop, if one did."""
    return None if _current is None else _current.requested


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` for SIGINT and SIGTERM, outside of ``held`` or after it, and say that one was heard.

    A second signal ends the process at once, with exit code 130: files are written whole or not at all. Inside another
    ``listening``, and elsewhere than in the main thread, it does nothing.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _current = Interrupts(owns_process=True)
    old = {number: signal.signal(number, _current.handle) for number in SIGNALS}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    old_pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_current.watch, args=(reading,), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_pipe)
        for number, handler in old.items():
            signal.signal(number, handler)
        _current = None
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let a signal take effect after the block, not in it.

    Where nobody is ``listening`` that is Ctrl-C alone, if Python's own handler is in place; the second raises
    ``KeyboardInterrupt`` there and then.
    """
    if _current is not None and threading.current_thread() is threading.main_thread():
        with _current.holding():
            yield
        return
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    own = Interrupts(owns_process=False)
    signal.signal(signal.SIGINT, own.handle)
    try:
        with own.holding():
            yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _forget() -> None:
    """Forget the parent's signals in a forked child, which has its own."""
    global _current
    if _current is not None:
        _current = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)
