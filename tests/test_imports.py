"""Who may import whom: arrows run down only, inside functions too, and no circle."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top down: a module imports what stands below its own place here, and modules of its own place.
ORDER = (
    "cli", "experiments", "llm", "learner", "online", "loop", "envs", "batches", "policy", "reference_checkpoint",
    "functional", "backends", "checks", "networks", "reference", "data", "kernels", "common", "config", "flow",
)  # fmt: skip
# Of what stands below them, these know no more than this.
KNOW_ONLY = {
    "kernels": set(),
    "reference": set(),
    "config": {"flow"},
    "flow": set(),
    "common": {"config"},
    "data": {"common", "config"},
    "llm": {"backends", "reference", "kernels", "common", "config"},
}


@functools.cache
def sources():
    """Module's name -> (source, whether it is a package)."""
    found = {}
    for folder, prefix in ((ROOT / "vgf_fast", "vgf_fast"), (ROOT / "kernels", "vgf_fast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            found[".".join((prefix, *(parts[:-1] if is_package else parts)))] = path.read_text(), is_package
    return found


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@functools.cache
def written(module, source, is_package):
    """(module, name in it or None, whether it is imported with the importing one, line) of every import."""

    def walk(node, at_once):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                for other in child.orelse:
                    yield from walk(ast.Module([other], []), at_once)
            elif isinstance(child, ast.Import):
                yield from ((alias.name, None, at_once, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module.split(".") if is_package else module.split(".")[:-1]
                    base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [child.module])])
                yield from ((base, alias.name, at_once, child.lineno) for alias in child.names)
            else:
                yield from walk(child, at_once and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return list(walk(ast.parse(source), True))


def imports(module, source, is_package, modules):
    """(module, whether it is imported with the importing one, line) of every import of this project."""
    for base, name, at_once, line in written(module, source, is_package):
        if base.split(".")[0] in ("vgf_fast", "profiling", "tests", "kernels"):
            yield (f"{base}.{name}" if f"{base}.{name}" in modules else base), at_once, line


def place(module):
    """Part of the house: "data" of vgf_fast.data.files; "" of vgf_fast itself."""
    return [*module.split("."), ""][1]


def wrong_arrows(modules):
    """A line for every import that goes up, or further than its module may know."""
    found = []
    for module, (source, is_package) in modules.items():
        mine = place(module)
        for name, _, line in imports(module, source, is_package, modules):
            theirs = place(name)
            if mine == "" and name.startswith("vgf_fast."):
                continue  # the front door opens on every room
            known = name.startswith("vgf_fast.") and {mine, theirs} <= set(ORDER)
            allowed = known and (
                mine == theirs or (ORDER.index(mine) < ORDER.index(theirs) and theirs in KNOW_ONLY.get(mine, {theirs}))
            )
            if not allowed:
                found.append(f"{module}, line {line}, imports {name}")
    return found


def circle(modules):
    """Modules that import one another while they are being imported, or nothing."""
    graph = {
        module: {
            name
            for name, at_once, _ in imports(module, source, is_package, modules)
            if at_once and name in modules and name != module
        }
        for module, (source, is_package) in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_arrows_run_down_only():
    assert wrong_arrows(sources()) == []


def test_no_circle():
    assert circle(sources()) == []


def test_every_place_is_in_the_order():
    places = {place(module) for module in sources()} - {""}
    assert places == set(ORDER)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vgf_fast.kernels.planted", "from vgf_fast.common import arrays"),
        ("vgf_fast.data.planted", "def f():\n    from vgf_fast.envs import evaluation"),
        ("vgf_fast.data.planted", "from vgf_fast import reference"),
        ("vgf_fast.data.planted", "class A:\n    def f(self):\n        import vgf_fast.learner as one"),
        ("vgf_fast.policy", "from .envs.simulators import Simulator"),
        ("vgf_fast.learner", "def f():\n    from vgf_fast.experiments import run"),
        ("vgf_fast.llm.planted", "from vgf_fast.experiments.run import train"),
        ("vgf_fast.llm.planted", "def f():\n    from vgf_fast.learner import Learner"),
        ("vgf_fast.common.planted", "from vgf_fast import VGFPolicy"),
        ("vgf_fast.reference.planted", "from vgf_fast.backends import native"),
        ("vgf_fast.reference.planted", "def f():\n    from vgf_fast.kernels import ranges"),
        ("vgf_fast.backends.planted", "from vgf_fast.policy import VGFPolicy"),
        ("vgf_fast.reference", "if TYPE_CHECKING:\n    pass\nelse:\n    from vgf_fast import policy"),
        ("vgf_fast.envs.planted", "import profiling.bench"),
        ("vgf_fast.cli.planted", "from kernels import svgd"),
        ("vgf_fast.unknown", "from vgf_fast import config"),
    ],
)
def test_a_wrong_arrow_is_found(module, source):
    modules = {**sources(), module: (source, False)}
    assert [line for line in wrong_arrows(modules) if line.startswith(f"{module}, ")]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vgf_fast.data.planted", "if TYPE_CHECKING:\n    from vgf_fast.envs import evaluation"),
        ("vgf_fast.data.planted", "from . import files\nfrom ..common import arrays"),
        ("vgf_fast.experiments.planted", "from vgf_fast.learner import Learner"),
    ],
)
def test_a_right_arrow_is_not(module, source):
    lines = wrong_arrows({**sources(), module: (source, False)})
    assert not [line for line in lines if line.startswith(f"{module}, ")]


def test_a_circle_is_found():
    planted = {
        "vgf_fast.data.one": ("from vgf_fast.data.two import x", False),
        "vgf_fast.data.two": ("from vgf_fast.data import one", False),
    }
    assert set(circle({**sources(), **planted})) == set(planted)
    planted["vgf_fast.data.two"] = ("def f():\n    from vgf_fast.data import one", False)
    assert circle({**sources(), **planted}) == []
