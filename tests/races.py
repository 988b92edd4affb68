"""A race detector for Triton's interpreter, which runs one program after another and one operation at a time.

What a GPU may reorder is seen in the addresses. Inside a program, threads meet only at barriers: a load of what was
stored since the last one, or a store over what was loaded or stored, is a race, unless both accesses are of the very
same addresses in the same shape, where every thread meets its own. Between programs of a launch nothing is ordered: an
access to what another program stored, or a store to what another loaded, is a race, unless this program has made an
atomic operation before.
"""

import contextlib
from unittest import mock

import numpy as np
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class Race(AssertionError):
    """Two accesses that nothing orders."""


def _overlap(addresses, others):
    """Whether two sorted arrays have an entry in common."""
    if addresses[-1] < others[0] or others[-1] < addresses[0]:
        return False
    place = np.searchsorted(others, addresses)
    return bool((others[np.minimum(place, len(others) - 1)] == addresses).any())


class _Accesses:
    def __init__(self):
        self.program = None
        self.everywhere = {"load": {}, "store": {}}  # program -> arrays of addresses, of the whole launch
        self.synchronised = False
        self.barrier()

    def begin(self, program):
        self.program = program
        self.synchronised = False
        self.barrier()

    def barrier(self):
        self.pending = {"load": [], "store": []}

    def access(self, kind, pointers, mask):
        addresses = np.unique(np.asarray(pointers)[np.asarray(mask).astype(bool)])
        if addresses.size == 0:
            return
        whole = np.asarray(pointers)
        conflicting = ["store"] if kind == "load" else ["load", "store"]
        for other in conflicting:
            for earlier, earlier_whole in self.pending[other]:
                same_threads = whole.shape == earlier_whole.shape and np.array_equal(whole, earlier_whole)
                if not same_threads and _overlap(addresses, earlier):
                    raise Race(f"a {kind} of shape {whole.shape} after a {other} of shape {earlier_whole.shape}")
            if self.synchronised:
                continue
            for program, arrays in self.everywhere[other].items():
                if program != self.program and any(_overlap(addresses, array) for array in arrays):
                    raise Race(f"a {kind} in program {self.program} after a {other} in program {program}")
        self.pending[kind].append((addresses, whole))
        self.everywhere[kind].setdefault(self.program, []).append(addresses)


@contextlib.contextmanager
def race_detector(barriers=True):
    """While it lasts, a race in an interpreted kernel raises. ``barriers=False`` overlooks all barriers."""
    state = [_Accesses()]
    originals = {
        name: getattr(InterpreterBuilder, name)
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_barrier",
            "set_grid_idx",
            "create_atomic_rmw",
            "create_atomic_cas",
        )
    }
    call = GridExecutor.__call__

    def masked_load(self, pointers, mask, *rest):
        state[0].access("load", pointers.data, mask.data)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        state[0].access("store", pointers.data, mask.data)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def barrier(self, *rest):
        if barriers:
            state[0].barrier()
        return originals["create_barrier"](self, *rest)

    def set_grid_idx(self, *index):
        state[0].begin(index)
        return originals["set_grid_idx"](self, *index)

    def atomic(name):
        def run(self, *rest):
            state[0].synchronised = True
            return originals[name](self, *rest)

        return run

    def launch(self, *args, **kwargs):
        state[0] = _Accesses()
        return call(self, *args, **kwargs)

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        mock.patch.object(InterpreterBuilder, "create_barrier", barrier),
        mock.patch.object(InterpreterBuilder, "set_grid_idx", set_grid_idx),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic("create_atomic_rmw")),
        mock.patch.object(InterpreterBuilder, "create_atomic_cas", atomic("create_atomic_cas")),
        mock.patch.object(GridExecutor, "__call__", launch),
    ):
        yield
