"""Counting kernel launches, in Triton's interpreter and on a GPU."""

import contextlib
from unittest import mock

from triton.runtime import jit
from triton.runtime.interpreter import GridExecutor


@contextlib.contextmanager
def count_launches(note=None):
    """While it lasts, the names of the kernels launched are appended to the list it gives, and told to ``note``."""
    names = []
    executed, ran = GridExecutor.__call__, jit.JITFunction.run

    def interpret(self, *args, **kwargs):
        names.append(self.fn.__name__)
        if note is not None:
            note(self.fn.__name__)
        return executed(self, *args, **kwargs)

    def run(self, *args, **kwargs):
        if not kwargs.get("warmup"):
            names.append(self.fn.__name__)
            if note is not None:
                note(self.fn.__name__)
        return ran(self, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", interpret), mock.patch.object(jit.JITFunction, "run", run):
        yield names
