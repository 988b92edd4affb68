"""The paper's settings by name, such as "ogbench/cube-double-play" and "d4rl/hopper-medium-v2".

They are data, in ``presets.json``: a preset inherits from a family and changes fields. What is not listed under "ours"
is the public release's, from its scripts; where these give a range (step size, temperature), one value was chosen and
listed. A section or budget named there ("policy") stands for all its fields. Sizes are the environments'. The bandwidth
gradient is off in all of them, as in the paper and unlike the release. "tasks" is the number of an environment's tasks:
"ogbench/cube-double-play/task3" is the preset with that task instead of the environment's default. All but the demo's
have an amortised variant, AVGF: "ogbench/cube-double-play-avgf".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Any, Generic, TypeVar

from vgf_fast.config import TrainConfig, VGFConfig

SECTIONS = ("policy", "train", "run")
AMORTIZED = "-avgf"
# As the release's amortised agent and its scripts differ.
AMORTIZED_CHANGE: dict[str, Any] = {"policy": {"amortized": True, "particles": 5}, "train": {"max_gradient_norm": 1.0}}
Value = TypeVar("Value")


class UnknownPresetError(ValueError, KeyError):
    """There is no preset of that name; the message has the closest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclasses.dataclass(frozen=True)
class PaperScore:
    """Scores of the paper's tables: normalised return (D4RL), success in percent (OGBench)."""

    vgf: float
    fql: float
    iql: float
    about: str = ""  # what they are of, where it is not this task alone


@dataclasses.dataclass(frozen=True)
class Preset:
    """The fields a preset sets, section by section; what it leaves out keeps its default."""

    name: str
    policy: dict[str, Any]  # fields of VGFConfig
    train: dict[str, Any]  # fields of TrainConfig
    run: dict[str, Any]  # fields of run.RunConfig: task, steps, intervals
    ours: frozenset[str]  # dotted names of fields that are our choice, such as "policy.train_budget.step_size"
    paper: PaperScore | None = None  # where the paper's tables have it


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    tables = json.loads(files("vgf_fast.experiments").joinpath("presets.json").read_text(encoding="utf-8"))
    blocks = dict(tables["presets"])
    for name, block in tables["presets"].items():
        if not name.startswith("demo/"):
            blocks[name + AMORTIZED] = merged({key: block[key] for key in block if key != "paper"}, AMORTIZED_CHANGE)
    every: dict[str, Any] = {}
    for name, block in blocks.items():
        every[name] = block
        for number in range(1, block.get("tasks", 0) + 1):
            task = block["run"]["task"].replace("-singletask-", f"-singletask-task{number}-")
            every[f"{name}/task{number}"] = merged(block, {"run": {"task": task}})
    return {**tables, "presets": every}


def merged(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``change``, dicts within dicts merged likewise; neither is written."""
    result = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The names of all values that are not dicts: {"a": {"b": 1}} -> "a.b"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@functools.cache
def preset(name: str) -> Preset:
    """The preset of a name, of the paper's tables and the public release's scripts (see this module).

    Raises ``UnknownPresetError`` (``ValueError`` and ``KeyError``) with the closest names.
    """
    known = _tables()["presets"]
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.0)
        raise UnknownPresetError(f"there is no preset {name!r}; the closest are {', '.join(close)}")
    lineage = [known[name]]
    while "inherits" in lineage[0]:
        lineage.insert(0, _tables()["families"][lineage[0]["inherits"]])
    values: dict[str, Any] = {}
    ours: set[str] = set()
    for block in lineage:
        change = {section: block[section] for section in SECTIONS if section in block}
        values = merged(values, change)
        listed = block.get("ours", [])
        # What a block sets is the release's again, unless it lists it.
        ours -= set(dotted(change))
        ours |= {field for field in dotted(values) if any(f"{field}.".startswith(f"{one}.") for one in listed)}
    policy, train, run = (values.get(section, {}) for section in SECTIONS)
    paper = lineage[-1].get("paper")
    return Preset(name, policy, train, run, frozenset(ours), None if paper is None else PaperScore(**paper))


class _Presets(Mapping[str, Value], Generic[Value]):
    """The paper's settings by name, made when asked for: ``presets["ogbench/cube-double-play"]``.

    Names come from the paper's tables, values from the public release's scripts where the paper does not give them.
    Raises ``UnknownPresetError`` (``ValueError`` and ``KeyError``) with the closest names for one that is not there.
    """

    def __init__(self, make: Callable[[Preset], Value]) -> None:
        self._make = make

    def __getitem__(self, name: str) -> Value:
        return self._make(preset(name))

    def __iter__(self) -> Iterator[str]:
        return iter(_tables()["presets"])

    def __len__(self) -> int:
        return len(_tables()["presets"])

    def __repr__(self) -> str:
        return f"<{len(self)} presets: {', '.join(self)}>"


presets: Mapping[str, VGFConfig] = _Presets(lambda one: VGFConfig.from_dict(one.policy))
train_presets: Mapping[str, TrainConfig] = _Presets(lambda one: TrainConfig.from_dict(one.train))
