"""Ranges around the phases of an update and of acting: their names, their order, and the launches in each."""

import builtins
import json
import re
import subprocess
import sys
import tracemalloc
from unittest import mock

import pytest
import torch
from test_kernel_training import training_launches
from test_profiling import REPOSITORY, load_profiling
from vgf_fast.kernels import ranges

from vgf_fast import Learner, TrainConfig, TransportBudget, VGFConfig, VGFPolicy
from vgf_fast.backends import native
from vgf_fast.data.dataset import Dataset

load_profiling()
from profiling import timeline  # noqa: E402

STEPS = 3
DRAWN = [("vgf/sample_batch", 0, ()), ("vgf/noise", 0, ())]
# Of two hidden layers and few rows, and of two Euler steps.
BEHAVIOR_FLOW = ("euler_kernel", *("small_kernel", "euler_kernel") * 2)
VALUES = ("rows_kernel", "small_kernel", "rows_kernel", "flow_step_kernel")
FLOW_STEP = ("rows_kernel", *("small_kernel",) * 2, "rows_kernel", "product_kernel", "flow_step_kernel")
TRAINING = tuple(training_launches(2))
TRITON_UPDATE = [
    *DRAWN,
    ("vgf/update", 0, ()),
    ("vgf/pack", 1, ("packing_kernel",)),
    ("vgf/behavior_flow", 1, BEHAVIOR_FLOW),
    ("vgf/state_share", 2, ("state_share_kernel",)),
    ("vgf/state_share", 1, ("state_share_kernel",)),
    ("vgf/state_share", 1, ("state_share_kernel",)),
    *((f"vgf/flow_step/{step}", 1, FLOW_STEP) for step in range(STEPS)),
    ("vgf/values", 1, VALUES),
    ("vgf/td_loss", 1, TRAINING),
    ("vgf/behavior_loss", 1, TRAINING),
    ("vgf/metrics", 1, ()),
]
TRITON_ACT = [
    ("vgf/noise", 0, ()),
    ("vgf/act", 0, ()),
    ("vgf/pack", 1, ("packing_kernel",)),
    ("vgf/behavior_flow", 1, BEHAVIOR_FLOW),
    ("vgf/state_share", 2, ("state_share_kernel",)),
    ("vgf/state_share", 1, ("state_share_kernel",)),
    *((f"vgf/flow_step/{step}", 1, FLOW_STEP) for step in range(STEPS)),
    ("vgf/values", 1, VALUES),
]
TORCH_UPDATE = [
    *DRAWN[:2],
    ("vgf/update", 0, ()),
    ("vgf/behavior_flow", 1, ()),
    *((f"vgf/flow_step/{step}", 1, ()) for step in range(STEPS)),
    *(
        (f"vgf/{name}", 1, ())
        for name in (
            *("values", "td_target", "td_loss", "behavior_loss", "backward", "target_critic", "optimizer", "metrics"),
        )
    ),
]
TORCH_ACT = [
    ("vgf/noise", 0, ()),
    ("vgf/act", 0, ()),
    ("vgf/behavior_flow", 1, ()),
    *((f"vgf/flow_step/{step}", 1, ()) for step in range(STEPS)),
    ("vgf/values", 1, ()),
    ("vgf/select", 1, ()),
]


def small_policy(backend):
    budget = TransportBudget(steps=STEPS)
    config = VGFConfig(
        observation_dim=3,
        action_dim=2,
        hidden_dims=(16, 16),
        behavior_hidden_dims=(16, 16),
        particles=4,
        behavior_steps=2,
        train_budget=budget,
        test_budget=budget,
    )
    return VGFPolicy(config, backend=backend)


def one_update(backend):
    generator = torch.Generator().manual_seed(0)
    dataset = Dataset.from_arrays(
        observations=torch.randn(20, 3, generator=generator),
        actions=torch.rand(20, 2, generator=generator) * 2.0 - 1.0,
        next_observations=torch.randn(20, 3, generator=generator),
        rewards=torch.randn(20, generator=generator),
        masks=torch.ones(20),
    )
    learner = Learner(small_policy(backend), TrainConfig(batch_size=5))
    return learner, lambda: learner.fit(dataset, 1, progress=False)


def outline(spans):
    return [(span.name, span.depth, span.kernels) for span in spans]


def needs_interpreter(backend):
    if backend == "triton":
        pytest.importorskip("triton")


@pytest.mark.parametrize(("backend", "expected"), [("triton", TRITON_UPDATE), ("torch", TORCH_UPDATE)])
def test_update(backend, expected):
    needs_interpreter(backend)
    _, update = one_update(backend)
    with timeline.launches.noting_launches():
        update()
    spans = timeline.record(update)
    assert outline(spans) == expected
    assert all(span.milliseconds > 0.0 for span in spans)
    if backend == "triton":
        assert sum(span.operators for span in spans if span.depth) == 4, "the update's other launches are metrics"
    else:
        # In compiled code no operator shows.
        with native.off():
            spans = timeline.record(update)
        assert outline(spans) == expected
        assert all(span.operators for span in spans if span.depth)


@pytest.mark.parametrize(("backend", "expected"), [("triton", TRITON_ACT), ("torch", TORCH_ACT)])
def test_acting(backend, expected):
    needs_interpreter(backend)
    policy = small_policy(backend)
    states = torch.randn(2, 3)
    assert outline(timeline.record(lambda: policy.sample_actions(states))) == expected


def test_every_range_has_a_documented_name():
    used = {name for name, _, _ in [*TRITON_UPDATE, *TRITON_ACT, *TORCH_UPDATE, *TORCH_ACT]}
    used = {"vgf/flow_step/{}" if name.startswith("vgf/flow_step/") else name for name in used}
    assert used | {"vgf/score_loss"} == set(ranges.NAMES)
    # Whatever opens one names one of them.
    opened = re.compile(r'ranges\.span\(f?"([^"]+)"\)')
    for folder in ("vgf_fast", "kernels"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for name in opened.findall(path.read_text(encoding="utf-8")):
                assert re.sub(r"\{.*\}", "{}", name) in ranges.NAMES, (path.name, name)
    text = (REPOSITORY / "profiling" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name.replace('{}', '0')}`" in text for name in ranges.NAMES)


def test_off_means_nothing_at_all():
    assert ranges.span("vgf/act") is ranges.span("vgf/update")
    with ranges.span("vgf/act"):  # what the first call allocates is not the ranges'
        pass
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        for _ in range(100):
            with ranges.span("vgf/act"):
                pass
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    own = [d for d in after.compare_to(before, "filename") if d.traceback[0].filename == ranges.__file__]
    assert sum(d.size_diff for d in own) == 0
    with torch.profiler.profile() as profiled:
        small_policy("torch").sample_actions(torch.zeros(3))
    assert not [event.name for event in profiled.events() if event.name.startswith("vgf/")]


def test_the_numbers_are_the_same():
    plain, update = one_update("torch")
    update()
    watched, update = one_update("torch")
    timeline.record(update)
    for expected, found in zip(plain.policy.parameters(), watched.policy.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_nvtx():
    nvtx = pytest.importorskip("nvtx")
    opened = []

    def annotate(name, domain):
        opened.append((name, domain))
        return mock.MagicMock()

    with mock.patch.object(nvtx, "annotate", annotate), ranges.switched_on("nvtx"):
        small_policy("torch").sample_actions(torch.zeros(3))
    assert opened == [(name, "vgf_fast") for name, _, _ in TORCH_ACT]
    with ranges.switched_on("nvtx"):
        small_policy("torch").sample_actions(torch.zeros(3))
    assert ranges.span("vgf/act") is ranges.span("vgf/update"), "off again"


def test_nvtx_that_is_not_installed(monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "nvtx":
            raise ImportError("No module named 'nvtx'")
        return imported(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "nvtx", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install nvtx"), ranges.switched_on("nvtx"):
        pass
    small_policy("torch").sample_actions(torch.zeros(3))


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind is 'cuda', expected 'nvtx' or 'profiler'"):
        ranges.switch("cuda")


def test_switched_on_by_the_environment():
    code = "from vgf_fast.kernels import ranges; print(type(ranges.span('vgf/act')).__name__)"
    for kind, expected in (("profiler", "record_function"), ("", "nullcontext")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"VGF_FAST_RANGES": kind}, check=False
        )
        assert done.stdout.strip() == expected, done.stderr


def test_a_compiled_function_may_have_ranges():
    policy = small_policy("torch")

    def act(states, noise):
        return policy.flow_particles(states, policy.draw_particles(states, noise), policy.config.test_budget).particles

    states, noise = torch.randn(2, 3), torch.randn(2, 4, 2)
    with torch.no_grad():
        compiled = torch.compile(act, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(states, noise), act(states, noise))


def test_the_trace_is_chromes(tmp_path):
    _, update = one_update("torch")
    path = tmp_path / "trace.json"
    timeline.record(update, path)
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert {"vgf/update", "vgf/values"} <= {event["name"] for event in events}
    assert list(tmp_path.iterdir()) == [path]
