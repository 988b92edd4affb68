"""Settings of a training run in three sections (policy, train, run), laid over each other: preset, file, flags."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from vgf_fast.config import (
    Precision,
    TrainConfig,
    TransportBudget,
    VGFConfig,
    boolean,
    check_known_keys,
    checked_bounds,
    choice,
    integer,
    integers,
)
from vgf_fast.envs.simulators import Workers
from vgf_fast.experiments.presets import SECTIONS, merged, preset
from vgf_fast.functional import Backend

Sections = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run learns from, for how long, and how often it logs, evaluates and saves. Intervals are in updates."""

    task: str = ""  # cube-single-play-singletask-v0, d4rl/hopper-medium-v2, minari/..., or a file of transitions
    dataset_dir: str | None = None  # folder of the task's files; default: where its library looks, with download
    data_url: str | None = None  # folder of a mirror of OGBench's or D4RL's files, to download missing ones from
    env: str | None = None  # Gymnasium environment to evaluate in, instead of the task's own; a file has none
    action_low: tuple[float, ...] | None = None  # of a file's actions, one number for all or one each; default: env's
    action_high: tuple[float, ...] | None = None  # likewise; without either, a file's actions are in [-1, 1]
    data_precision: Precision = "float32"  # of the transitions in memory; bfloat16 takes half of it
    steps: int = 1_000_000  # updates in all, those before a resumption included
    log_interval: int = 1_000  # updates between rows of train.csv
    eval_interval: int = 100_000  # updates between evaluations; there is one at the end too; 0: none at all
    eval_episodes: int = 50  # episodes for each number of flow steps
    eval_flow_steps: tuple[int, ...] = (0, 1, 2, 3)  # numbers of flow steps (L_test) to evaluate
    eval_num_envs: int = 10  # environments side by side
    eval_workers: Workers = "sync"  # simulate in this process (sync) or in one process a core (async)
    eval_behavior_cloning: bool = False  # evaluate the behaviour model alone, too
    checkpoint_interval: int = 100_000  # updates between checkpoints; there is one at the end too
    device: str | None = None  # cpu, cuda, cuda:1 ...; default: the GPU if there is one
    backend: Backend = "auto"  # auto, triton or torch
    tensorboard: bool = True  # TensorBoard events, where it is installed

    def checked(self) -> RunConfig:
        """This, in Python's own types, or ``ValueError`` for a field outside its range.

        From a constructor, tyro would call it wrong usage.
        """
        values: dict[str, Any] = {}
        lows = {"eval_interval": 0, "steps": 1, "log_interval": 1, "eval_episodes": 1, "eval_num_envs": 1}
        for name, low in {**lows, "checkpoint_interval": 1}.items():
            values[name] = integer(f"run.{name}", getattr(self, name), low)
        values["eval_flow_steps"] = integers("run.eval_flow_steps", self.eval_flow_steps, 0)
        if self.action_low is not None or self.action_high is not None:
            ends = checked_bounds("run", ("action_low", "action_high"), self.action_low, self.action_high)
            values |= {"action_low": ends[0], "action_high": ends[1]}
        for name in ("eval_behavior_cloning", "tensorboard"):
            values[name] = boolean(f"run.{name}", getattr(self, name))
        choices = {"eval_workers": Workers, "backend": Backend, "data_precision": Precision}
        for name, names in choices.items():
            choice(f"run.{name}", getattr(self, name), get_args(names))
        for name in ("task", "dataset_dir", "data_url", "env", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "task"):
                raise ValueError(f"run.{name} is {value!r}, expected a text")
        return dataclasses.replace(self, **values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Make one of known keys, as ``layered`` gives them. Raises ``ValueError`` for a field outside its range."""
        return cls(**values).checked()


def layered(preset_name: str | None, file: Path | None, assignments: Sequence[str], base: Sections) -> Sections:
    """``base``, overridden by a preset, a YAML file, and assignments "section.field=value", in this order.

    Raises ``ValueError`` for unknown names, with the closest, and ``FileNotFoundError``.
    """
    sections = base
    if preset_name is not None:
        chosen = preset(preset_name)
        sections = merged(sections, {"policy": chosen.policy, "train": chosen.train, "run": chosen.run})
    if file is not None:
        sections = merged(sections, read_file(file))
    for assignment in assignments:
        sections = merged(sections, _parse_assignment(assignment))
    return {section: dict(sections.get(section, {})) for section in SECTIONS}


def read_file(path: Path) -> dict[str, Any]:
    """Sections of a YAML file.

    Raises ``FileNotFoundError``, and ``ValueError`` for bad YAML, a key that stands twice, or unknown keys.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    values = _parse_yaml(path.read_bytes(), str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected the sections {', '.join(SECTIONS)}")
    _check_sections(str(path), values)
    return values


def to_yaml(sections: Mapping[str, Any]) -> str:
    """The text ``read_file`` reads back."""
    import yaml

    return yaml.safe_dump(_plain(sections), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse_yaml(text: str | bytes, source: str) -> Any:
    """The value of a YAML text. Raises ``ValueError`` for what is none, and for a key that stands twice."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply to be settings") from None
    except Exception as error:  # the loader's constructors raise nearly anything
        raise ValueError(f"{source} is not YAML: {error}") from error


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, that takes 3e-4 for a number as YAML 1.2 does, (64, 64) for a list, and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for index, key in enumerate(keys):
                if key in keys[:index]:
                    raise ValueError(f"{key!r} stands twice, again in line {node.value[index][0].start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    Loader.add_implicit_resolver("!tuple", re.compile(r"^\([-+.\deE\s,]*\)$"), ["("])
    Loader.add_constructor("!tuple", lambda loader, node: yaml.load(f"[{node.value[1:-1]}]", Loader))
    return Loader


def _parse_assignment(text: str) -> dict[str, Any]:
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise ValueError(f"--set has {text!r}, expected section.field=value, such as policy.particles=5")
    values = _parse_yaml(value, f"--set {name}={value}")
    for key in reversed(keys):
        values = {key: values}
    _check_sections("--set", values)
    return values


def _check_sections(owner: str, values: Mapping[str, Any]) -> None:
    check_known_keys(owner, values, list(SECTIONS))
    for section, fields in values.items():
        if not isinstance(fields, Mapping):
            raise ValueError(f"{owner}: {section} is {fields!r}, expected fields")
        kind = {"policy": VGFConfig, "train": TrainConfig, "run": RunConfig}[section]
        check_known_keys(f"{owner}: {section}", fields, [field.name for field in dataclasses.fields(kind)])
        for name, value in fields.items():
            if name.endswith("_budget"):
                if not isinstance(value, Mapping):
                    raise ValueError(f"{owner}: {section}.{name} is {value!r}, expected steps, step_size, temperature")
                known = [field.name for field in dataclasses.fields(TransportBudget)]
                check_known_keys(f"{owner}: {section}.{name}", value, known)
            elif isinstance(value, Mapping):
                raise ValueError(f"{owner}: {section}.{name} is {value!r}, expected a single value")
