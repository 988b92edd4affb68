"""Settings of a training run in three sections (policy, train, run), laid over each other: preset, file, flags."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from vgf_fast.config import Precision, TrainConfig, TransportBudget, VGFConfig, check_known_keys
from vgf_fast.functional import Backend
from vgf_fast.presets import SECTIONS, merged, preset
from vgf_fast.simulators import Workers

Sections = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run learns from, for how long, and how often it logs, evaluates and saves. Intervals are in updates."""

    task: str = ""  # cube-single-play-singletask-v0, d4rl/hopper-medium-v2, minari/..., or a file of transitions
    dataset_dir: str | None = None  # folder of the task's files; default: where its library looks, with download
    data_url: str | None = None  # folder of a mirror of OGBench's or D4RL's files, to download missing ones from
    env: str | None = None  # Gymnasium environment to evaluate in, instead of the task's own; a file has none
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
        """This, or ``ValueError`` for a field outside its range; from a constructor, tyro would call it wrong usage."""
        lows = {"eval_interval": 0, "steps": 1, "log_interval": 1, "eval_episodes": 1, "eval_num_envs": 1}
        for name, low in {**lows, "checkpoint_interval": 1}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"run.{name} is {value!r}, expected an integer >= {low}")
        for name, kind in (("eval_behavior_cloning", bool), ("tensorboard", bool), ("task", str)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"run.{name} is {getattr(self, name)!r}, expected a {kind.__name__}")
        for name, choices in (
            ("eval_workers", get_args(Workers)),
            ("backend", get_args(Backend)),
            ("data_precision", get_args(Precision)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"run.{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        steps = self.eval_flow_steps
        if not isinstance(steps, tuple) or any(type(one) is not int or one < 0 for one in steps):
            raise ValueError(f"run.eval_flow_steps is {steps!r}, expected integers >= 0")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Of known keys, as ``layered`` gives them. Raises ``ValueError`` for a field outside its range."""
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**plain).checked()


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
    """Sections of a YAML file. Raises ``FileNotFoundError``, and ``ValueError`` for bad YAML or unknown keys."""
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
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


def _loader() -> Any:
    """PyYAML's safe loader, that takes 3e-4 for a number as YAML 1.2 does."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _parse_assignment(text: str) -> dict[str, Any]:
    import yaml

    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2:
        raise ValueError(f"--set has {text!r}, expected section.field=value, such as policy.particles=5")
    try:
        values: Any = yaml.load(value, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"--set {name} has the value {value!r}, which is not YAML: {error}") from error
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
