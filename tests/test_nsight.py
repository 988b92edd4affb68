"""profiling/nsight.py: what Nsight writes as one table, and what it is run with."""

import pytest
import torch
from test_profiling import REPOSITORY, load_profiling

load_profiling()
from profiling import nsight  # noqa: E402

DATA = REPOSITORY / "tests" / "data"


def test_ncu():
    behavior, flow = nsight.read(DATA / "ncu.csv")
    assert (behavior.name, behavior.launches, behavior.stall) == ("behavior_flow_kernel", 1, "barrier")
    assert behavior.seconds == pytest.approx(1150e-6)
    assert (flow.name, flow.launches) == ("flow_step_kernel", 2)
    assert flow.seconds == pytest.approx(100e-6)
    # Means weighted by the times 40 and 60.
    assert flow.dram_bytes_per_second == pytest.approx(160.5e9)
    assert flow.l2_bytes_per_second == pytest.approx(3.2e12)
    assert flow.matrix_percent == pytest.approx(36.0)
    assert flow.occupancy_percent == pytest.approx(12.0)
    # 3.4 against 2.1; an instruction that was selected did not wait.
    assert flow.stall == "long scoreboard"


def test_nsys_kernels():
    flow, other = nsight.read(DATA / "nsys_kernels.csv")
    assert (flow.name, flow.launches) == ("flow_step_kernel", 15)
    assert flow.seconds == pytest.approx(500e-6)
    assert flow.matrix_percent is None
    assert other.name == "void at::native::elementwise_kernel<4, at::detail::Array>"


def test_nsys_ranges():
    update, step = nsight.read(DATA / "nsys_ranges.csv")
    assert (update.name, update.launches, update.seconds) == ("vgf/update", 3, pytest.approx(1.5e-3))
    assert (step.name, step.seconds) == ("vgf/flow_step/0", pytest.approx(120e-6))


def test_the_table(capsys):
    assert nsight.main(["read", str(DATA / "ncu.csv"), "--markdown"]) == 0
    assert "| flow_step_kernel | 2 | 50.00 | 160 | 3200 | 36.0 | 12.0 | long scoreboard |" in capsys.readouterr().out
    assert nsight.main(["read", str(DATA / "nsys_ranges.csv"), str(DATA / "nsys_kernels.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["vgf/update", "3", "500.00"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Kernel Name", "Kernel"), "no header of Nsight's"),
        (lambda text: text.replace("gpu__time_duration.sum", "gpu__time_duration.max"), "lacks gpu__time_duration.sum"),
        (
            lambda text: text.replace('"usecond"', '"fortnight"'),
            "has unit 'fortnight' in column 'gpu__time_duration.sum'",
        ),
        (
            lambda text: text.replace('"40.0"', '"n/a"'),
            "has 'n/a' in column 'gpu__time_duration.sum', expected a number",
        ),
        (lambda text: "", "no header of Nsight's"),
    ],
)
def test_files_that_are_none(tmp_path, capsys, change, message):
    path = tmp_path / "odd.csv"
    path.write_text(change((DATA / "ncu.csv").read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        nsight.read(path)
    assert nsight.main(["read", str(path)]) == 2
    assert str(path) in capsys.readouterr().out
    assert nsight.main(["read", str(tmp_path / "missing.csv")]) == 2


def test_without_nsight_or_a_gpu_there_is_nothing_to_do(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nsight.shutil, "which", lambda tool: None)
    for command in ("nsys", "ncu"):
        assert nsight.main([command, "--out", str(tmp_path / "out")]) == 0
        assert f"no {command} on the path: nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(nsight.shutil, "which", lambda tool: "/usr/bin/" + tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nsight.main(["ncu", "--out", str(tmp_path / "out")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_run(tmp_path, capsys, monkeypatch):
    commands = []

    class Done:
        returncode = 0

    def run(command, **options):
        commands.append(command)
        if "--import" in command:
            target = command[command.index("--log-file") + 1]
            (tmp_path / "flow_step_kernel.csv").write_bytes((DATA / "ncu.csv").read_bytes())
            assert target == str(tmp_path / "flow_step_kernel.csv")
        return Done

    monkeypatch.setattr(nsight.shutil, "which", lambda tool: "/usr/bin/" + tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nsight.subprocess, "run", run)
    assert nsight.main(["ncu", "--out", str(tmp_path)]) == 0
    profile = " ".join(commands[0])
    assert "--clock-control none" in profile
    assert "--replay-mode kernel" in profile
    assert "regex:flow_step_kernel" in profile
    assert "behavior_flow_kernel" in capsys.readouterr().out
    assert nsight.main(["nsys", "--out", str(tmp_path)]) == 0
    assert "--capture-range=cudaProfilerApi" in commands[2]
    monkeypatch.setattr(Done, "returncode", 3)
    assert nsight.main(["nsys", "--out", str(tmp_path)]) == 1
    assert "error: nsys profile ended with status 3" in capsys.readouterr().out
