"""How long OpenMP's idle threads spin before they sleep. Imported before torch, which loads libgomp.

With more busy processes than cores, a thread that spins at a barrier takes the time of the one it waits for, and small
networks train a hundred times slower. libgomp reads its settings once, when it is loaded; the default there is
300,000 turns and more.
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "10000"  # turns: as fast as the default on a quiet machine, under twice one thread's time on a busy one
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def shorten_spin() -> str:
    """Set a short spin for libgomp, unless the user has chosen or torch is loaded already; returns what holds."""
    for name in _SETTINGS:
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    if "torch" in sys.modules:
        return (
            "libgomp's own long spin, slow on a busy machine, as torch was imported before vgf_fast: import vgf_fast "
            f"first, or set GOMP_SPINCOUNT={SPIN_COUNT}"
        )
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    return f"GOMP_SPINCOUNT={SPIN_COUNT}"


SPIN = shorten_spin()
