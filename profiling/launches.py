"""How many kernels a piece of work launches, counted without a GPU.

    TRITON_INTERPRET=1 python -m profiling.launches

Triton's launches are counted where they are made, and not made; PyTorch's are the operators its profiler sees that have
no operator below them and do more than describe memory. On a GPU each of them is one launch or more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

if TYPE_CHECKING:
    from vgf_fast.functional import Backend

RESULTS = Path(__file__).parent / "results" / "launches.json"
PREFIX = "triton::"
# Leaves that launch nothing: they allocate, or look at memory in another way.
VIEWS = "alias as_strided detach expand permute reshape select slice split squeeze t transpose unbind unsqueeze view"
MEMORY = "empty empty_like empty_strided new_empty new_empty_strided resize_ set_"
OTHERS = "_reshape_alias _unsafe_view lift_fresh narrow promote_types resolve_conj result_type split_with_sizes to"
FREE = {f"aten::{name}" for names in (VIEWS, MEMORY, OTHERS) for name in names.split()}
# One launch on a GPU, whatever they are made of on the CPU.
WHOLE = {"aten::mean"}


class Launches(NamedTuple):
    """Launches by name."""

    triton: Counter[str]
    torch: Counter[str]

    @property
    def total(self) -> int:
        """Launches of Triton's kernels and of PyTorch's together."""
        return self.triton.total() + self.torch.total()


@contextlib.contextmanager
def noting_launches(make: bool = False) -> Iterator[None]:
    """Every Triton launch becomes a named range of torch's profiler, and is made only if ``make``."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def noted(run: Callable[..., Any]) -> Callable[..., Any]:
        def launch(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            with record_function(PREFIX + self.fn.__name__):
                return run(self, *args, warmup=warmup, **kwargs) if make else None

        return launch

    with (
        mock.patch.object(InterpretedFunction, "run", noted(InterpretedFunction.run)),
        mock.patch.object(JITFunction, "run", noted(JITFunction.run)),
    ):
        yield


def launch_of(event: Any) -> str | None:
    """The launch that an event of torch's profiler is, Triton's behind ``PREFIX``, or None for another event."""
    if event.name.startswith(PREFIX):
        return str(event.name)
    if not event.name.startswith("aten::") or event.name in FREE or _is_inside(event, WHOLE):
        return None
    below = [child for child in event.cpu_children if child.name.startswith("aten::")]
    is_leaf = event.name in WHOLE or all(child.name in FREE for child in below)
    return event.name.removeprefix("aten::") if is_leaf else None


def _is_inside(event: Any, names: set[str]) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name in names or _is_inside(parent, names))


def count(function: Callable[[], object]) -> Launches:
    """Call ``function`` and count what it launches; what Triton's kernels would have written stays unwritten."""
    with noting_launches(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    launches = Launches(Counter(), Counter())
    for name in filter(None, map(launch_of, profiled.events())):
        if name.startswith(PREFIX):
            launches.triton[name.removeprefix(PREFIX)] += 1
        else:
            launches.torch[name] += 1
    return launches


def paper_policy(backend: Backend = "triton") -> Any:
    """A policy of the paper's sizes."""
    from vgf_fast import VGFConfig, VGFPolicy

    return VGFPolicy(VGFConfig(observation_dim=29, action_dim=8), backend=backend)


def paper_dataset() -> Any:
    """Transitions of the paper's sizes; what they say does not matter."""
    from vgf_fast.data.dataset import Dataset

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1000, 29, generator=generator)
    return Dataset.from_arrays(
        observations=states,
        actions=torch.rand(1000, 8, generator=generator) * 2.0 - 1.0,
        next_observations=states.roll(-1, 0),
        rewards=torch.zeros(1000),
        masks=torch.ones(1000),
    )


def update_launches(backend: Backend = "triton") -> Launches:
    """Launches of one update of a batch of 256, drawn from a dataset; the first, which fills caches, is not counted."""
    from vgf_fast import Learner

    learner, dataset = Learner(paper_policy(backend)), paper_dataset()

    def update() -> None:
        learner.update(dataset.sample(256, learner.generator), check=False)

    count(update)
    return count(update)


def act_launches(batch: int = 256, backend: Backend = "triton") -> Launches:
    """Launches of actions for ``batch`` states that lie on the device, with the noise drawn."""
    policy = paper_policy(backend)
    states = torch.randn(batch, 29)

    def act() -> None:
        policy.sample_actions(states)

    from vgf_fast import policy as module

    # Observations are looked at for NaN on the CPU only.
    with mock.patch.object(module, "check_finite"):
        count(act)
        return count(act)


def eager_update_launches() -> Launches:
    """Launches of one update written in plain PyTorch with autograd: what ``profiling.eager`` does."""
    from profiling import eager
    from vgf_fast import TrainConfig

    agent, dataset = eager.EagerAgent(paper_policy("torch"), TrainConfig()), paper_dataset()
    generator = torch.Generator().manual_seed(0)
    return count(lambda: agent.update(dataset.sample(256, generator)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts at the paper's sizes; with ``--write`` into ``profiling/results/launches.json`` too."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.launches", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    counted = {
        "one update": update_launches(),
        "one update, eager PyTorch": eager_update_launches(),
        "actions for 256 states": act_launches(),
        "one action": act_launches(1),
    }
    for name, launches in counted.items():
        print(f"{name}: {launches.total} launches")
        for counter in launches:
            if counter:
                print("   ", ", ".join(f"{n} {kernel}" for kernel, n in counter.most_common(12)))
    if options.write:
        table = {
            name: {"triton": launches.triton.total(), "torch": launches.torch.total(), "total": launches.total}
            for name, launches in counted.items()
        }
        RESULTS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
