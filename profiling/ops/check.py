"""Whether an implementation computes its operation's reference, by the rules of the tests."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from profiling import machine
from profiling.ops.op import Inputs, Op, Outputs, Prepared
from profiling.worker import Sizes
from vgf_fast.backends import native

DRAWS = 5  # of inputs, before an implementation is called wrong


@functools.cache
def tolerances() -> Any:
    """The tests' table of bounds; there is no other."""
    path = machine.REPOSITORY / "tests" / "tolerances.py"
    spec = importlib.util.spec_from_file_location("profiling_tolerances", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Truth:
    """An operation's outputs at given inputs, in float64 and by the same formulas in the inputs' dtype."""

    exact: Outputs
    plain: Outputs
    dtype: torch.dtype  # of the inputs


def truth(op: Op, inputs: Inputs) -> Truth:
    """The reference in float64, and in PyTorch's operations in the inputs' own dtype. Writes no input."""
    with native.off():
        return Truth(op.reference(inputs.to(torch.float64)), op.reference(inputs.clone()), inputs.dtype)


def fault(op: Op, prepared: Prepared, expected: Truth) -> str | None:
    """Run once and compare: what is wrong, or None.

    An output passes within its bound of the table, relative to its largest entry, or if its root mean square error is
    at most twice that of PyTorch's operations in the same dtype: the tests' rules, whose table is of exact products.
    """
    outputs = {name: tensor.detach() for name, tensor in (prepared.run() | prepared.state()).items()}
    if outputs.keys() != expected.exact.keys():
        return f"outputs are {sorted(outputs)}, expected {sorted(expected.exact)}"
    for name, exact in expected.exact.items():
        value = outputs[name]
        if value.shape != exact.shape:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
        if not value.isfinite().all():
            return f"{name} has values that are not finite"
        if not value.is_floating_point():
            if not torch.equal(value, exact):
                return f"{name} differs from the reference"
            continue
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        error, plain_error = ((t.double() - exact) / scale for t in (value, expected.plain[name]))
        # Outputs are float32, whatever the products; the table holds those of exact float32 products.
        table = tolerances().BOUNDS[op.bounds[name.partition(" ")[0]]]
        exact_by_luck = tolerances().FLOOR[torch.float32]
        bound = max(table[torch.float32], exact_by_luck) if expected.dtype == torch.float32 else exact_by_luck
        mean, plain_mean = (float(e.square().mean().sqrt()) for e in (error, plain_error))
        if float(error.abs().max()) > bound and mean > 2.0 * plain_mean:
            return (
                f"{name} errs by {float(error.abs().max()):.1e} (bound {bound:.0e}), root mean square {mean:.1e} "
                f"(PyTorch's {plain_mean:.1e})"
            )
    return None


def check(
    op: Op,
    implementations: Sequence[str],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    compiler: str = "inductor",
) -> dict[str, str | None]:
    """What is wrong with each implementation, or None; an implementation that raises is wrong too.

    Where rounding puts a unit of a relu network on the other side of its kink, the score jumps, in any arithmetic. So
    inputs are drawn anew up to ``DRAWS`` times: what is wrong is wrong in all of them.
    """
    draws: list[tuple[Inputs, Truth]] = []
    faults: dict[str, str | None] = {}
    for implementation in implementations:
        for draw in range(DRAWS):
            if draw == len(draws):
                inputs = op.build(sizes, dtype, device, torch.Generator().manual_seed(seed + draw))
                draws.append((inputs, truth(op, inputs)))
            inputs, expected = draws[draw]
            try:
                faults[implementation] = fault(op, op.prepare(implementation, inputs.clone(), compiler), expected)
            except Exception as error:  # whatever a compiler or a driver objects to
                faults[implementation] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                break
            if faults[implementation] is None:
                break
    return faults
