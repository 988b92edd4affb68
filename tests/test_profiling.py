"""profiling/: the eager baseline computes what the library does; the benchmarks write records. Nothing is timed."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vgf_fast import Learner, TrainConfig, TransportBudget, VGFConfig, VGFPolicy, reference

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = {
    "observation_dim": 5,
    "action_dim": 3,
    "batch": 4,
    "particles": 4,
    "behavior_steps": 2,
    "flow_steps": 2,
    "hidden": 16,
    "layers": 2,
    "members": 2,
}


def load_profiling():
    """Make ``profiling`` importable; the repository's root on the path would make ``kernels`` so too."""
    folder = REPOSITORY / "profiling"
    spec = importlib.util.spec_from_file_location("profiling", folder / "__init__.py")
    sys.modules["profiling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["profiling"])


load_profiling()
from profiling import bench, compare, compiled, eager, records, report, tables  # noqa: E402
from profiling.tables import speed  # noqa: E402
from profiling.worker import Job, Sizes, random_batch  # noqa: E402


def run_module(name, *arguments):
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)


def tiny_flags():
    return [text for name, value in TINY.items() for text in (f"--{name.replace('_', '-')}", value)]


def compiled_agent(policy, train):
    return compiled.CompiledAgent(policy, train, backend="eager")


AGENTS = pytest.mark.parametrize("make_agent", [eager.EagerAgent, compiled_agent], ids=["eager", "compiled"])


# --- the eager baseline ----------------------------------------------------------------------------------------------


@pytest.fixture
def policy():
    """A float64 policy whose LayerNorm and biases are not those of a fresh network."""
    config = VGFConfig(
        observation_dim=5,
        action_dim=3,
        hidden_dims=(32, 24),
        behavior_hidden_dims=(16, 16),
        members=3,
        particles=7,
        behavior_steps=4,
        train_budget=TransportBudget(steps=4, step_size=0.05, temperature=0.3),
        test_budget=TransportBudget(steps=2, step_size=0.02, temperature=0.2),
    )
    policy = VGFPolicy(config, seed=3).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


def draws(config, batch):
    generator = torch.Generator().manual_seed(5)
    shape = (batch, config.particles, config.action_dim)
    return {
        "particles": torch.randn(shape, generator=generator, dtype=torch.float64),
        "bc_x0": torch.randn(batch, config.action_dim, generator=generator, dtype=torch.float64),
        "bc_t": torch.rand(batch, 1, generator=generator, dtype=torch.float64),
    }


def transitions(config, batch):
    sizes = Sizes(observation_dim=config.observation_dim, action_dim=config.action_dim, batch=batch)
    data = random_batch(sizes, np.random.default_rng(6))
    return {name: torch.from_numpy(array).double() for name, array in data.items()}


@pytest.mark.parametrize("module", [eager, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("particles", [1, 2, 7, 10])
def test_eager_direction_is_the_reference_direction(particles, module):
    generator = torch.Generator().manual_seed(particles)
    x, score = (torch.randn(6, particles, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = reference.svgd_direction(x, score, temperature=0.1)
    torch.testing.assert_close(module.svgd_direction(x, score, 0.1), expected, rtol=1e-9, atol=1e-9)


@AGENTS
@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_eager_flow_follows_the_reference_trajectory(policy, aggregation, make_agent):
    policy.config = dataclasses.replace(policy.config, flow_q_aggregation=aggregation)
    agent = make_agent(policy, TrainConfig())
    observations = transitions(policy.config, 6)["observations"]
    noise = draws(policy.config, 6)["particles"]
    states = observations.unsqueeze(1).expand(-1, policy.config.particles, -1)
    drawn = policy.draw_particles(observations, noise)
    torch.testing.assert_close(agent.draw(states, noise), drawn, rtol=1e-9, atol=1e-9)
    _, score = reference.CriticAtStates(policy.critic.stacked(), observations).values_and_score(drawn, aggregation)
    torch.testing.assert_close(agent.score(states, drawn), score, rtol=1e-9, atol=1e-9)
    budget = policy.config.train_budget
    expected = policy.flow_particles(observations, drawn, budget, return_trajectory=True).trajectory
    assert not torch.equal(expected[0], expected[-1])
    torch.testing.assert_close(torch.stack(agent.flow(states, drawn, budget)), expected, rtol=1e-9, atol=1e-9)


@AGENTS
def test_eager_acts_as_the_policy(policy, make_agent):
    agent = make_agent(policy, TrainConfig())
    observation = transitions(policy.config, 1)["observations"][0]
    noise = draws(policy.config, 1)["particles"][0]
    expected = policy.sample_actions(observation, noise=noise)
    torch.testing.assert_close(agent.sample_actions(observation, noise), expected, rtol=1e-9, atol=1e-9)


@AGENTS
def test_eager_update_is_the_learners(policy, make_agent):
    train = TrainConfig(batch_size=6, tau=0.1)
    agent = make_agent(policy, train)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    learner = Learner(policy, train)
    batch, noise = transitions(policy.config, 6), draws(policy.config, 6)
    metrics, found = learner.update(batch, noise), agent.update(batch, noise)
    for name, value in found.items():
        torch.testing.assert_close(value, metrics[name], rtol=1e-9, atol=1e-9)
    assert all(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    expected = eager.EagerAgent(policy, train)
    for part in ("critic", "target_critic", "behavior"):
        pairs = zip(getattr(agent, part).parameters(), getattr(expected, part).parameters(), strict=True)
        for parameter, wanted in pairs:
            torch.testing.assert_close(parameter, wanted, rtol=1e-9, atol=1e-9)


def test_eager_refuses_options_it_does_not_compute():
    policy = VGFPolicy(VGFConfig(observation_dim=2, action_dim=1, hidden_dims=(4,), bandwidth_gradient=True))
    with pytest.raises(ValueError, match="bandwidth_gradient is True, expected False"):
        eager.EagerAgent(policy, TrainConfig())


# --- records ---------------------------------------------------------------------------------------------------------


def test_quantiles_and_paired_ratio():
    assert records.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))
    assert records.quantiles([]) == (None, None, None)
    # The ratio of the medians would be 2 / 10.
    assert records.paired_ratio([1.0, 2.0, 30.0], [10.0, 4.0, 10.0]) == 0.5
    assert records.paired_ratio([1.0], []) is None


def test_read_names_the_line_that_is_no_record(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"benchmark": "update"}\n')
    with pytest.raises(ValueError, match="line 1 is not a record"):
        records.read(path)


def test_job_survives_its_json():
    job = Job("ours-float32", "cpu", 2, 7, Sizes(batch=3), "/somewhere")
    assert Job.from_json(job.to_json()) == job


# --- the commands ----------------------------------------------------------------------------------------------------


def test_bench_writes_records(tmp_path):
    out = tmp_path / "folder" / "records.jsonl"
    methods = ["ours-float32", "ours-bfloat16", "eager-float32"]
    flags = ["--device", "cpu", "--threads", 1, "--quick", "--out", out, *tiny_flags()]
    done = run_module("profiling.bench", "update", "act", "--methods", *methods, "jax-release", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jax-release: skipped, --jax-release was not given" in done.stdout
    found = records.read(out)
    assert [(r.benchmark, r.method) for r in found] == [(b, m) for b in ("update", "act") for m in methods]
    for record in found:
        assert record.dtype == record.method.partition("-")[2]
        assert record.sizes == TINY
        assert (record.rounds, record.threads, record.jax, record.driver) == (2, 1, None, None)
        assert 0.0 < record.p20 <= record.p50 <= record.p80
        assert record.ratio_to_jax is None
        assert record.ratio_to_eager > 0.0
        assert record.peak_bytes >= record.built_bytes > 2**20
        assert record.torch == torch.__version__
        assert record.python.split(".")[:2] == [str(n) for n in sys.version_info[:2]]
        assert record.date.endswith("+00:00")
        assert record.device
        assert record.method in done.stdout
    assert all(r.ratio_to_eager == 1.0 for r in found if r.method == "eager-float32")
    assert set(json.loads(out.read_text().splitlines()[0])) == {f.name for f in dataclasses.fields(records.Record)}


def test_bench_beside_busy_loops(tmp_path, monkeypatch, capfd):
    from profiling import busy, machine
    from vgf_fast.common import openmp

    out = tmp_path / "records.jsonl"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    names = (busy.ONE_THREAD, f"GOMP_SPINCOUNT={openmp.SPIN_COUNT}")
    monkeypatch.setattr(busy, "SETTINGS", {name: busy.SETTINGS[name] for name in names})
    flags = ["--device", "cpu", "--threads", 1, "--quick", "--out", out, *tiny_flags()]
    assert bench.main(["busy", *map(str, flags)]) == 0
    printed = capfd.readouterr().out
    found = records.read(out)
    loops = (0, busy.LOOPS_PER_CORE * machine.usable_cores())
    expected = [(n, f"busy {work}", name) for n in loops for work in ("update", "act") for name in busy.SETTINGS]
    assert [(r.busy_loops, r.benchmark, r.method) for r in found] == expected
    for record in found:
        assert (record.rounds, record.threads, record.sizes) == (2, 1, TINY)
        assert 0.0 < record.p20 <= record.p50 <= record.p80 <= record.total
        assert record.ratio_to_one_thread > 0.0
        assert record.method in printed
    assert all(r.ratio_to_one_thread == 1.0 for r in found if r.method == busy.ONE_THREAD)


def test_busy_loops_run_until_the_block_ends(monkeypatch):
    from profiling import busy

    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1])
    with busy.loops(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def test_bench_measures_every_peer_unless_told_otherwise():
    assert bench.parse(["update", "--device", "cuda"]).methods == bench.METHODS
    on_a_cpu = bench.parse(["update", "--device", "cpu"]).methods
    assert set(bench.METHODS) - set(on_a_cpu) == {"torch-float32", "torch-bfloat16"}


def test_bench_skips_a_release_that_is_not_there(tmp_path):
    flags = ["--methods", "jax-release", "--jax-release", tmp_path, "--device", "cpu", "--quick"]
    done = run_module("profiling.bench", "memory", *flags)
    assert done.returncode == 1
    assert done.stdout.startswith("jax-release: skipped, FileNotFoundError: no agents/vgf.py in")
    assert "no method can run here" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "100000"], "--threads is 100000, expected at most"),
        (["--hidden", "0"], "--hidden is 0, expected an integer >= 1"),
        (["--rounds", "0"], "--rounds is 0, expected an integer >= 1"),
    ],
)
def test_bench_refuses_what_it_cannot_do(flags, message, capsys):
    from profiling import bench

    with pytest.raises(SystemExit):
        bench.parse(["act", "--device", "cpu", *flags])
    assert message in capsys.readouterr().err


def test_a_part_of_the_gpu_run_ends_with_its_time_limit(tmp_path):
    from profiling import gpu

    log = tmp_path / "log.txt"
    assert gpu.run([sys.executable, "-c", "import time; print('begun'); time.sleep(600)"], 1.0, log) is None
    cut_short = log.read_text()
    assert cut_short.startswith("begun\n")
    assert gpu.run([sys.executable, "-c", "print('done'); raise SystemExit(3)"], 600.0, log) == 3
    assert log.read_text() == cut_short + "done\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def ended_after(command, sign, log):
    """What a command wrote that the GPU run ended once it had written ``sign``."""
    from profiling import gpu

    with log.open("w") as file:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        while sign not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        gpu.end(process)
    assert process.poll() is not None
    return log.read_text()


def test_a_part_that_will_not_end_is_killed_with_what_it_started(tmp_path, monkeypatch):
    from profiling import gpu

    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    deaf = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.getpid())"
    child = f"{deaf}; print('begun'); time.sleep(600)"
    program = f"{deaf}; import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    pids = ended_after([sys.executable, "-c", program], "begun", tmp_path / "log.txt").split()[:2]
    for pid in map(int, pids):
        deadline = time.monotonic() + 30.0
        # The child is nobody's to wait for: a killed process takes its time, and may stay a zombie.
        while alive(pid):
            assert time.monotonic() < deadline, f"process {pid} goes on"
            time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_test_run_cut_short_says_what_has_failed(tmp_path):
    (tmp_path / "test_slow.py").write_text(
        "import time\ndef test_wrong(): assert 1 + 1 == 3\n"
        "def test_slow(capsys):\n    with capsys.disabled(): print('begun')\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    assert "assert (1 + 1) == 3" in ended_after(list(map(str, command)), "begun", tmp_path / "log.txt")


def test_every_test_of_a_kernel_runs_on_a_gpu():
    from profiling import gpu

    kernels, marked = gpu.gpu_tests()
    assert {"tests/test_kernel_acting.py", "tests/test_kernel_flow_step.py"} <= set(kernels)
    assert {"tests/test_kernel_acting.py", "tests/test_gpu.py", "tests/test_graphs.py"} <= set(marked)
    assert "tests/test_kernel_compile.py" not in kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_there_is_none(tmp_path):
    done = run_module("profiling.gpu", "--out", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"no GPU that torch {torch.__version__} can use: nothing to do"
    assert not (tmp_path / "results").exists()


class TestReport:
    def test_the_pages_are_what_the_records_give(self):
        assert report.main(["--check"]) == 0, "run: python -m profiling.report"

    def test_only_what_stands_between_the_markers_changes(self):
        sections = {"one": lambda: "new"}
        text = "before <!-- one -->\nold\n<!-- /one --> after"
        assert report.rendered(text, sections) == "before <!-- one -->\nnew\n<!-- /one --> after"
        assert report.rendered(report.rendered(text, sections), sections) == report.rendered(text, sections)
        with pytest.raises(ValueError, match="no one place for 'one'"):
            report.rendered("nothing here", sections)

    def test_without_a_record_it_says_so(self, tmp_path):
        assert speed.times(tmp_path / "gpu.jsonl") == "Not yet measured on a GPU."

    def test_the_newest_record_counts(self, tmp_path, monkeypatch):
        path = tmp_path / "cpu.jsonl"
        monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
        lines = []
        for date, ratio in (("2026-01-02", 0.5), ("2026-01-01", 0.9)):
            for benchmark in ("update", "act"):
                record = {
                    "date": date, "benchmark": benchmark, "method": "ours-float32", "device": "a CPU", "p50": 1.0,
                    "ratio_to_eager": ratio, "threads": 2, "peak_bytes": 2**20,
                }  # fmt: skip
                lines.append(json.dumps(record))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = speed.times(path)
        assert "| vgf_fast, float32 | 0.50 | 0.50 | 1 |" in text
        assert "`cpu.jsonl` (2026-01-02, a CPU)" in text


class TestCompare:
    COMMITTED = REPOSITORY / "profiling" / "results" / "cpu.jsonl"

    def write(self, path, **factors):
        """The committed records with the medians of some methods multiplied."""
        found = [
            dataclasses.replace(record, p50=record.p50 * factors.get(record.method.replace("-", "_"), 1.0))
            for record in records.read(self.COMMITTED)
            if record.p50 is not None
        ]
        records.append(path, found)
        return str(path)

    def test_a_file_is_no_slower_than_itself(self, capsys):
        assert compare.main([str(self.COMMITTED), str(self.COMMITTED)]) == 0
        assert "update ours-float32" in capsys.readouterr().out

    def test_what_is_slower_than_the_noise_is_flagged(self, tmp_path, capsys):
        slow = self.write(tmp_path / "slow.jsonl", ours_bfloat16=2.0)
        assert compare.main([str(self.COMMITTED), slow]) == 1
        flagged = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
        assert flagged
        assert all("ours-bfloat16" in line for line in flagged)
        assert compare.main([slow, str(self.COMMITTED)]) == 0

    def test_a_slower_machine_is_not_a_slower_program(self, tmp_path):
        every = {"ours_float32": 3.0, "ours_bfloat16": 3.0, "eager_float32": 3.0, "jax_release": 3.0}
        assert compare.main([str(self.COMMITTED), self.write(tmp_path / "busy.jsonl", **every)]) == 0

    def test_nothing_in_common(self, tmp_path, capsys):
        other = tmp_path / "other.jsonl"
        records.append(other, [dataclasses.replace(r, device="another") for r in records.read(self.COMMITTED)])
        assert compare.main([str(self.COMMITTED), str(other)]) == 2
        assert "nothing to compare" in capsys.readouterr().out
        assert compare.main([str(self.COMMITTED), str(tmp_path / "missing.jsonl")]) == 2
