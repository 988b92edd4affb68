"""Every public name says in sentences what it does, with types, and what it raises, where it or what it calls does."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import vgf_fast as vgf

PACKAGE = Path(vgf.__file__).parent
# Modules whose public names are for users; of the package itself, those of __all__.
MODULES = (
    "config", "functional", "policy", "learner", "online", "reference_checkpoint", "common.checkpoints",
    "data.dataset", "data.files", "data.d4rl", "data.minari", "data.ogbench", "data.replay", "envs.evaluation",
    "envs.generate", "envs.tasks", "experiments.demo", "experiments.finetune", "experiments.presets",
    "experiments.reproduce", "experiments.run", "experiments.settings", "llm.baselines", "llm.data",
    "llm.aligner", "llm.embedding_flow", "llm.latent", "llm.run",
)  # fmt: skip
# Where a formula or a protocol is someone else's, whose it is.
SOURCES = ("paper", "release", "ALGORITHM", "Stable-Baselines3", "LeRobot")
SOURCED = (
    "learner.Learner.update", "learner.Learner.fit", "learner.Learner.finetune_online", "policy.VGFPolicy.predict",
    "policy.VGFPolicy.select_action", "policy.VGFPolicy.reset", "policy.VGFPolicy.flow_particles",
    "policy.VGFPolicy.draw_particles", "policy.VGFPolicy.sample_actions", "experiments.presets.preset",
    "functional.behavior_flow", "functional.svgd_direction", "functional.value_gradient_flow", "functional.td_target",
    "functional.select_particle", "functional.critic_value_and_score", "online.OnlineTraining",
    "config.TransportBudget", "config.VGFConfig", "config.TrainConfig",
)  # fmt: skip


# What writes a file, and so raises OSError.
WRITERS = [("vgf_fast.common.files", None, "replacing")]


def public():
    """(name, object, owner class or None) of every public function, class, and method of one."""
    found = {}
    for module_name in MODULES:
        module = importlib.import_module(f"vgf_fast.{module_name}")
        for name, one in vars(module).items():
            if name.startswith("_") or getattr(one, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(one):
                found[f"{module_name}.{name}"] = one, None
                for method, value in vars(one).items():
                    plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                    plain = plain.fget if isinstance(plain, property) else plain
                    if not method.startswith("_") and inspect.isfunction(plain):
                        found[f"{module_name}.{name}.{method}"] = plain, one
            elif inspect.isfunction(inspect.unwrap(one)):
                found[f"{module_name}.{name}"] = inspect.unwrap(one), None
    return found


@functools.cache
def functions():
    """Every function of the package: (module, class or None, name) -> its syntax tree."""
    found = {}
    for info in pkgutil.walk_packages([str(PACKAGE)], "vgf_fast."):
        path = PACKAGE.joinpath(*info.name.split(".")[1:])
        file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        if "kernels" in info.name or not file.is_file():
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found[info.name, None, node.name] = node
            elif isinstance(node, ast.ClassDef):
                methods = (one for one in node.body if isinstance(one, ast.FunctionDef))
                found |= {(info.name, node.name, method.name): method for method in methods}
    return found


def callees(module, owner, node):
    """The package's functions that a function calls by a name, of its own object, or of an imported module."""
    namespace = vars(importlib.import_module(module))
    for call in (one for one in ast.walk(node) if isinstance(one, ast.Call)):
        function = call.func
        if isinstance(function, ast.Name):
            target = namespace.get(function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            if function.value.id in ("self", "cls") and (module, owner, function.attr) in functions():
                yield module, owner, function.attr
                continue
            value = namespace.get(function.value.id)
            target = getattr(value, function.attr, None) if inspect.ismodule(value) else None
        else:
            continue
        target = inspect.unwrap(target) if callable(target) else None
        name, home = getattr(target, "__name__", None), getattr(target, "__module__", None)
        if inspect.isclass(target):
            yield from ((home, name, made) for made in ("__init__", "__post_init__"))
        elif name is not None:
            yield home, None, name


@functools.cache
def raises(key):
    """Whether a function has a ``raise`` of its own, or calls one of the package that has."""
    seen, left = set(), [key]
    while left:
        one = left.pop()
        if one in seen or one not in functions():
            continue
        seen.add(one)
        node = functions()[one]
        if one in WRITERS or any(isinstance(part, ast.Raise) and part.exc is not None for part in ast.walk(node)):
            return True
        left += callees(one[0], one[1], node)
    return False


def documented(one, owner):
    """The docstring, a class's with its constructor's."""
    text = inspect.cleandoc(one.__doc__ or "")
    if inspect.isclass(one) and "__init__" in vars(one):
        text += "\n" + inspect.cleandoc(one.__init__.__doc__ or "")
    return text.strip()


PUBLIC = public()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name):
    one, owner = PUBLIC[name]
    text = documented(one, owner)
    first = text.split("\n\n")[0]
    assert re.search(r"[.:]\s*$", first), f"no sentence: {first!r}"
    assert len(first.split()) > 2, f"no sentence: {first!r}"
    if inspect.isclass(one):
        keys = [(one.__module__, one.__name__, made) for made in ("__init__", "__post_init__")]
    else:
        keys = [(one.__module__, None if owner is None else owner.__name__, one.__name__)]
    if any(raises(key) for key in keys):
        assert re.search(r"\b[Rr]aises?\b|``\w*Error``|\berrors as\b", text), "it raises, and does not say so"
    if not inspect.isclass(one):
        signature = inspect.signature(one)
        bare = [
            argument.name for argument in signature.parameters.values()
            if argument.annotation is argument.empty and argument.name not in ("self", "cls")
        ]  # fmt: skip
        assert not bare, f"without types: {bare}"
        assert signature.return_annotation is not signature.empty, "without a type of what it returns"
    if name in SOURCED:
        assert any(source in text for source in SOURCES), f"without its source: {', '.join(SOURCES)}"


def test_the_walk_finds_what_raises():
    """By a name, of the object itself, through a class, and of a module."""
    assert {"policy.VGFPolicy.sample_actions", "functional.td_target", "online.OnlineTraining"} <= set(PUBLIC)
    assert set(SOURCED) <= set(PUBLIC)
    assert raises(("vgf_fast.policy", "VGFPolicy", "sample_actions"))
    assert raises(("vgf_fast.experiments.presets", None, "preset"))
    assert raises(("vgf_fast.learner", "Learner", "save"))
    assert raises(("vgf_fast.envs.evaluation", None, "evaluate"))
    assert raises(("vgf_fast.envs.tasks", None, "load"))
    assert not raises(("vgf_fast.policy", "VGFPolicy", "reset"))
