"""Value Gradient Flow, fast: offline reinforcement learning with particles instead of a policy network.

Importing this needs torch, NumPy and safetensors alone; Triton, simulators and the rest are imported when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vgf_fast.common import openmp as openmp  # first: it acts before torch is loaded
from vgf_fast.config import TrainConfig, TransportBudget, VGFConfig, config_from_reference
from vgf_fast.experiments.presets import presets, train_presets
from vgf_fast.functional import (
    behavior_flow,
    critic_value_and_score,
    select_particle,
    svgd_direction,
    td_target,
    value_gradient_flow,
)
from vgf_fast.learner import Learner
from vgf_fast.policy import VGFPolicy
from vgf_fast.reference import FlowResult

if TYPE_CHECKING:
    from vgf_fast import data, llm
    from vgf_fast.data import Dataset
    from vgf_fast.envs.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "Dataset",
    "FlowResult",
    "Learner",
    "TrainConfig",
    "TransportBudget",
    "VGFConfig",
    "VGFPolicy",
    "__version__",
    "behavior_flow",
    "config_from_reference",
    "critic_value_and_score",
    "data",
    "evaluate",
    "llm",
    "presets",
    "select_particle",
    "svgd_direction",
    "td_target",
    "train_presets",
    "value_gradient_flow",
]

_LAZY = {
    "Dataset": ("vgf_fast.data", "Dataset"),
    "data": ("vgf_fast.data", None),
    "evaluate": ("vgf_fast.envs.evaluation", "evaluate"),
    "llm": ("vgf_fast.llm", None),
}


def __getattr__(name: str) -> Any:
    """Names that are imported when first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, member = _LAZY[name]
    module = importlib.import_module(place)
    value = module if member is None else getattr(module, member)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
