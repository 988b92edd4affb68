"""Value Gradient Flow, fast: offline reinforcement learning with particles instead of a policy network.

Importing this needs torch, NumPy and safetensors alone; Triton, simulators and the rest are imported when asked for.
"""

from vgf_fast.config import TrainConfig, TransportBudget, VGFConfig, config_from_reference
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
from vgf_fast.presets import presets, train_presets
from vgf_fast.reference import FlowResult

__version__ = "0.1.0"

__all__ = [
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
    "presets",
    "select_particle",
    "svgd_direction",
    "td_target",
    "train_presets",
    "value_gradient_flow",
]
