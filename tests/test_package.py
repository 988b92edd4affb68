"""The installed package: what an import needs, what it must not bring along, and what it must not shadow."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vgf_fast.common import openmp

ROOT = Path(__file__).parent.parent
HEAVY = (
    "triton", "gymnasium", "transformers", "ogbench", "minari", "mujoco", "h5py", "rich", "tyro", "matplotlib", "yaml",
)  # fmt: skip


def run_python(code, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_brings_nothing_heavy(tmp_path):
    """Nor does asking for what is imported when asked for."""
    code = f"""
import sys, vgf_fast as vgf
assert {{"data", "Dataset", "evaluate", "llm"}} <= set(dir(vgf))
assert not any(f"vgf_fast.{{name}}" in sys.modules for name in ("data", "envs", "llm"))
assert vgf.Dataset is vgf.data.Dataset and callable(vgf.evaluate) and vgf.llm.BestOfN
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = run_python(code, tmp_path)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def extras():
    """Import names of every installed distribution that the three core ones do not bring along themselves."""
    core, todo = set(), ["torch", "numpy", "safetensors"]
    while todo:
        name = todo.pop()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in core:
            core.add(name)
            todo += [re.match(r"[\w.-]+", one)[0] for one in requires if "extra ==" not in one]
    known = {re.sub("[-_.]+", "-", name).lower() for name in core} | {"vgf-fast", "pip"}
    found = importlib.metadata.packages_distributions()
    return {
        name
        for name, owners in found.items()
        if not known & {re.sub("[-_.]+", "-", owner).lower() for owner in owners} and not name.startswith("_")
    }


def test_acting_and_training_need_torch_numpy_and_safetensors_alone(tmp_path):
    """With every other package made unimportable: import, act, train, save, load."""
    refused = extras() | set(HEAVY)
    assert "scipy" in refused
    assert not refused & {"torch", "numpy", "safetensors", "sympy", "vgf_fast"}
    code = f"""
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {refused!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hide, sys.meta_path)
import numpy, torch, vgf_fast as vgf
from vgf_fast.data.dataset import Dataset
policy = vgf.VGFPolicy(vgf.VGFConfig(3, 2, hidden_dims=(8,), behavior_hidden_dims=(8,)))
z = numpy.zeros
states = z((4, 3))
data = Dataset.from_arrays(observations=states, actions=z((4, 2)), next_observations=states, rewards=z(4), masks=z(4))
vgf.Learner(policy).fit(data, 2)
policy.save_pretrained("policy")
print(vgf.VGFPolicy.from_pretrained("policy").sample_actions(z(3)).shape)
"""
    result = run_python(code, tmp_path)
    assert result.stdout == "torch.Size([2])\n", result.stderr


@pytest.mark.parametrize("folder", [ROOT, None])
def test_the_name_kernels_stays_free(folder, tmp_path):
    """Also in the repository's own folder, where the source directory of that name lies."""
    result = run_python("import kernels", folder or tmp_path)
    assert result.returncode != 0
    assert "ModuleNotFoundError" in result.stderr or "vgf_fast.kernels" in result.stderr
    assert run_python("import vgf_fast.kernels", folder or tmp_path).returncode == 0


class TestSpin:
    """A short spin of waiting threads."""

    @pytest.fixture
    def unset(self, monkeypatch):
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        return monkeypatch

    def test_the_command_line_sets_it_before_libgomp_is_loaded(self, unset, tmp_path):
        code = "from vgf_fast.cli import main; raise SystemExit(main(['info', '--json']))"
        result = run_python(code, tmp_path, OMP_DISPLAY_ENV="verbose")
        assert json.loads(result.stdout)["threads"]["spin"] == f"GOMP_SPINCOUNT={openmp.SPIN_COUNT}"
        read = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
        assert set(read) <= {openmp.SPIN_COUNT}
        assert read or "libgomp" not in Path("/proc/self/maps").read_text()

    @pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "passive")])
    def test_a_setting_of_the_user_stays(self, unset, name, value):
        unset.delitem(sys.modules, "torch", raising=False)
        unset.setenv(name, value)
        assert openmp.shorten_spin() == f"{name}={value}"
        assert ("GOMP_SPINCOUNT" in os.environ) == (name == "GOMP_SPINCOUNT")

    def test_too_late_is_told(self, unset):
        unset.setitem(sys.modules, "torch", sys)
        assert "torch was imported before vgf_fast" in openmp.shorten_spin()
        assert "GOMP_SPINCOUNT" not in os.environ


def test_public_names():
    import vgf_fast

    assert vgf_fast.__version__ == importlib.metadata.version("vgf_fast")
    for name in vgf_fast.__all__:
        assert getattr(vgf_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        vgf_fast.no_such_name  # noqa: B018


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    # Built from a copy: a build leaves its folders beside the sources.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vgf_fast", "kernels", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run([*build, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vgf_fast"}
    for name in ("py.typed", "experiments/presets.json", "kernels/svgd.py", "data/dataset.py"):
        assert f"vgf_fast/{name}" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "vgf_fast").rglob("*.py")}
    assert sources <= set(names)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
class TestMakefile:
    """What make would run, in a folder of its own; it runs nothing."""

    TARGETS = ("demo", "test", "lint", "docs", "format", "gpu", "bench", "report", "nsys", "ncu")

    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, tmp_path)
        return tmp_path

    def commands(self, folder, *arguments):
        # Not as a part of the make that may run these tests.
        own = ("PYTHON", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
        environment = {name: value for name, value in os.environ.items() if name not in own}
        done = subprocess.run(
            ["make", "-n", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    @pytest.mark.parametrize("target", TARGETS)
    def test_the_first_time_installs_and_the_second_does_not(self, folder, target):
        first = self.commands(folder, target)
        assert "python3 -m venv .venv" in first
        assert any("pip install" in line and '-e ".[dev]"' in line for line in first)
        ready = folder / ".venv" / ".ready"
        ready.parent.mkdir()
        ready.touch()
        os.utime(folder / "pyproject.toml", (0, 0))
        os.utime(folder / "constraints.txt", (0, 0))
        second = self.commands(folder, target)
        assert second == first[-len(second) :]
        assert all(line.startswith(".venv/bin/python -m ") and "pip" not in line for line in second)
        # New pins are installed.
        (folder / "constraints.txt").touch()
        os.utime(ready, (1, 1))
        assert self.commands(folder, target) == first

    @pytest.mark.parametrize("target", TARGETS)
    def test_an_interpreter_is_used_as_it_is(self, folder, target):
        commands = self.commands(folder, "PYTHON=python3", target)
        assert commands
        assert all(line.startswith("python3 -m ") and "pip" not in line and "venv" not in line for line in commands)
