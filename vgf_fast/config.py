"""Configuration: frozen dataclasses, one comment a field. Imports NumPy and the standard library alone."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np

from vgf_fast.flow import Flow

Activation = Literal["relu", "gelu", "swish"]
Aggregation = Literal["mean", "min"]
Behavior = Literal["flow", "gaussian"]
CriticLoss = Literal["td", "expectile", "sql"]
ParticleOptimizer = Literal["adam", "ascent"]
ParticleKernel = Literal["rbf", "imq"]
Precision = Literal["float32", "bfloat16"]
Selection = Literal["max", "softmax", "random"]
TargetReduce = Literal["mean", "max"]


# Of temperatures and step sizes: float32 holds their quotients with scores, and the squares of these.
SMALLEST, LARGEST = 1e-12, 1e12

LARGEST_INTEGER = 2**63 - 1  # of 64 bits with a sign, which sizes and counts have in PyTorch
# What seeds may be: so that a seed and a small number more still seed torch.
MAX_SEED = LARGEST_INTEGER


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value``, NumPy's integers included, as an int from ``low`` to ``high``; ``ValueError`` naming it otherwise."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):  # type: ignore[operator]
        expected = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}, expected an integer {expected}")
    if high is None and value > LARGEST_INTEGER:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, expected an integer of 64 bits, at most {LARGEST_INTEGER}")
    return int(value)  # type: ignore[call-overload]


def integers(name: str, values: object, low: int, *, least: int = 0) -> tuple[int, ...]:
    """At least ``least`` integers of a list, a tuple, a range or an array, or ``ValueError`` naming them."""
    shown = values
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set)):
        values = shown = tuple(values)
        with contextlib.suppress(ValueError):
            values = tuple(integer(name, value, low) for value in values)
            if len(values) >= least:
                return values
    raise ValueError(f"{name} is {shown!r}, expected {f'at least {least} ' if least else ''}integers >= {low}")


def real(name: str, value: object, low: float, high: float = math.inf, *, low_open: bool = False) -> float:
    """``value``, NumPy's numbers included, in an interval, or ``ValueError`` naming it; an int stays one."""
    number = math.nan
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
        interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if math.isinf(high) else ']'}"
        raise ValueError(f"{name} is {value!r}, expected a number in {interval}")
    return value if type(value) is int else number


def boolean(name: str, value: object) -> bool:
    """``value``, NumPy's booleans included, as a bool, or ``ValueError`` naming it."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}, expected True or False")
    return bool(value)


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """``value``, or ``ValueError`` naming it when it is none of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def settle(config: Any, check: Callable[..., Any], fields: Iterable[str], *arguments: Any, **options: Any) -> None:
    """Replace fields of a frozen configuration by what a check makes of them."""
    for field in fields:
        name = f"{type(config).__name__}.{field}"
        object.__setattr__(config, field, check(name, getattr(config, field), *arguments, **options))


def checked_bounds(
    owner: str, names: tuple[str, str], low: Any, high: Any
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Bounds of actions as tuples of floats. Raises ``ValueError`` unless finite, of one length, and low <= high."""
    ends = []
    for name, value in zip(names, (low, high), strict=True):
        numbers = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
        if not numbers or not all(isinstance(one, Real) and math.isfinite(one) for one in numbers):
            raise ValueError(f"{owner}.{name} is {value!r}, expected at least one finite number")
        ends.append(tuple(float(one) for one in numbers))
    if len(ends[0]) != len(ends[1]):
        raise ValueError(
            f"{owner}.{names[0]} has {len(ends[0])} entries and {names[1]} {len(ends[1])}, expected as many"
        )
    for index, (one, other) in enumerate(zip(*ends, strict=True)):
        if one > other:
            raise ValueError(f"{owner}.{names[0]} is {one:g} in entry {index}, expected at most {names[1]}, {other:g}")
    return ends[0], ends[1]


def check_known_keys(owner: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Raise ``ValueError`` naming every key of ``given`` that is not in ``known``, each with the closest known one.

    Likewise for what is no mapping, such as the null of a JSON file.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{owner} is {given!r}, expected its fields by name")
    unknown = [key for key in given if key not in known]
    if unknown:
        hints = []
        for key in unknown:
            close = difflib.get_close_matches(str(key), known, n=1)
            hints.append(f"{key!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
        raise ValueError(f"{owner} has no field {', '.join(hints)}; its fields are: {', '.join(known)}")


@dataclasses.dataclass(frozen=True)
class TransportBudget:
    """How far particles may move: the only regularisation of VGF (paper, section on the transport budget).

    Raises ``ValueError`` when a field is outside its range.
    """

    steps: int = 5  # L, flow steps; 0 is best-of-N
    step_size: float = 0.1  # eps, learning rate of the particle update, in units of the action
    temperature: float = 0.1  # alpha, weight of the entropy: the flow's target is exp(Q / alpha)

    def __post_init__(self) -> None:
        settle(self, integer, ["steps"], 0)
        settle(self, real, ["step_size"], 0.0, LARGEST)
        settle(self, real, ["temperature"], SMALLEST, LARGEST)


@dataclasses.dataclass(frozen=True)
class VGFConfig:
    """The policy: its networks, its particles, and how far they move when training and when acting.

    Defaults are the paper's main setting (D4RL AntMaze): networks and optimiser as in the public release, N = 10,
    K = 10, L = 5. Raises ``ValueError`` when a field is outside its range.
    """

    observation_dim: int  # O, length of an observation vector
    action_dim: int  # A, length of an action vector; inside the policy actions lie in [-1, 1]
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # widths of the critic's hidden layers
    members: int = 2  # E, critics in the ensemble
    layer_norm: bool = True  # LayerNorm before the activation in the critic
    activation: Activation = "relu"  # of all networks; gelu is its tanh approximation
    behavior: Behavior = "flow"  # model of the behaviour in the data
    behavior_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # widths of the behaviour model's hidden layers
    behavior_layer_norm: bool = False  # LayerNorm in the behaviour model
    behavior_steps: int = 10  # K, Euler steps of the flow-matching sampler
    gaussian_tanh: bool = False  # squash the Gaussian behaviour model by tanh
    particles: int = 10  # N, particles a state
    flow_q_aggregation: Aggregation = "mean"  # over members, for the score that moves the particles
    target_q_aggregation: Aggregation = "min"  # over members, for the TD target and for choosing a particle
    train_budget: TransportBudget = TransportBudget()  # how far particles move for the TD target
    test_budget: TransportBudget = TransportBudget()  # how far they move when acting
    particle_optimizer: ParticleOptimizer = "adam"  # "ascent" is the paper's equation, "adam" its experiments
    kernel: ParticleKernel = "rbf"  # between particles; "imq" is the inverse multiquadric, of the same median bandwidth
    repulsion: bool = True  # False: the paper's simplified direction, alpha -> 0 and no repulsion
    amortized: bool = False  # AVGF: a network of the critic's widths, trained on its scores, moves the particles
    bandwidth_gradient: bool = False  # True: differentiate the median bandwidth too, as the public release does
    selection: Selection = "max"  # how the acting particle is chosen
    selection_temperature: float = 1.0  # of the softmax over Q when selection is "softmax"
    action_low: tuple[float, ...] | None = None  # what -1 stands for in the environment's units; None: not known, or -1
    action_high: tuple[float, ...] | None = None  # what 1 stands for

    def __post_init__(self) -> None:
        settle(self, integers, ["hidden_dims", "behavior_hidden_dims"], 1, least=1)
        settle(self, integer, ["observation_dim", "action_dim", "members", "behavior_steps", "particles"], 1)
        flags = ["layer_norm", "behavior_layer_norm", "gaussian_tanh", "repulsion", "bandwidth_gradient", "amortized"]
        settle(self, boolean, flags)
        settle(self, choice, ["activation"], get_args(Activation))
        settle(self, choice, ["behavior"], get_args(Behavior))
        settle(self, choice, ["flow_q_aggregation", "target_q_aggregation"], get_args(Aggregation))
        settle(self, choice, ["particle_optimizer"], get_args(ParticleOptimizer))
        settle(self, choice, ["kernel"], get_args(ParticleKernel))
        settle(self, choice, ["selection"], get_args(Selection))
        settle(self, real, ["selection_temperature"], SMALLEST, LARGEST)
        if self.amortized and self.particle_optimizer != "adam":
            raise ValueError(
                f"VGFConfig.particle_optimizer is {self.particle_optimizer!r}, expected 'adam': amortized is True"
            )
        for field in ("train_budget", "test_budget"):
            if not isinstance(getattr(self, field), TransportBudget):
                raise ValueError(f"VGFConfig.{field} is {getattr(self, field)!r}, expected a TransportBudget")
        if self.action_low is not None or self.action_high is not None:
            names = ("action_low", "action_high")
            for name, end in zip(
                names, checked_bounds("VGFConfig", names, self.action_low, self.action_high), strict=True
            ):
                if len(end) != self.action_dim:
                    raise ValueError(f"VGFConfig.{name} has {len(end)} entries, expected {self.action_dim}: action_dim")
                object.__setattr__(self, name, end)

    def flow(self, budget: TransportBudget) -> Flow:
        """What a flow step does within a budget."""
        return Flow(
            budget.step_size,
            budget.temperature,
            self.flow_q_aggregation,
            self.bandwidth_gradient,
            self.repulsion,
            self.particle_optimizer,
            self.kernel,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types; ``VGFConfig.from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VGFConfig:
        """Inverse of ``to_dict``. Raises ``ValueError`` for unknown keys, with the closest known one."""
        check_known_keys(cls.__name__, values, [f.name for f in dataclasses.fields(cls)])
        values = dict(values)
        for field in ("train_budget", "test_budget"):
            if isinstance(values.get(field), Mapping):
                known = [f.name for f in dataclasses.fields(TransportBudget)]
                check_known_keys(f"VGFConfig.{field}", values[field], known)
                values[field] = TransportBudget(**values[field])
        missing = [name for name in ("observation_dim", "action_dim") if name not in values]
        if missing:
            raise ValueError(f"VGFConfig needs {' and '.join(missing)}, which were not given")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training update; defaults are the public release's. Raises ``ValueError`` for a field outside its range."""

    batch_size: int = 256  # transitions an update
    critic_learning_rate: float = 3e-4  # Adam's, for the critic
    behavior_learning_rate: float = 3e-4  # Adam's, for the behaviour model
    discount: float = 0.99  # of the return
    tau: float = 0.005  # Polyak weight of the critic in its target
    critic_loss: CriticLoss = "td"  # "expectile" and "sql" are the release's "iql-q" and "sql-q"
    expectile: float = 0.9  # expectile of the "expectile" loss; SQL's alpha in the "sql" loss
    target_reduce: TargetReduce = "mean"  # over particles, in the TD target
    normalize_score: bool = False  # AVGF: the score field learns the critic's scores at length one
    max_gradient_norm: float | None = None  # of each network's gradient; None: as they are
    precision: Precision = "float32"  # of the matrix products; weights, optimiser and particles stay float32
    seed: int = 0  # of every random number of training

    def __post_init__(self) -> None:
        settle(self, integer, ["batch_size"], 1)
        settle(self, integer, ["seed"], 0, MAX_SEED)
        settle(self, real, ["critic_learning_rate", "behavior_learning_rate"], 0.0)
        settle(self, real, ["discount", "tau"], 0.0, 1.0)
        settle(self, choice, ["critic_loss"], get_args(CriticLoss))
        settle(self, choice, ["target_reduce"], get_args(TargetReduce))
        settle(self, choice, ["precision"], get_args(Precision))
        settle(self, real, ["expectile"], 0.0, 1.0 if self.critic_loss == "expectile" else math.inf, low_open=True)
        settle(self, boolean, ["normalize_score"])
        if self.max_gradient_norm is not None:
            settle(self, real, ["max_gradient_norm"], 0.0, low_open=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types; ``TrainConfig.from_dict`` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Inverse of ``to_dict``. Raises ``ValueError`` for unknown keys, with the closest known one."""
        check_known_keys(cls.__name__, values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)


# What the release's own get_config() gives a key that a configuration leaves out.
_REFERENCE_DEFAULTS: dict[str, Any] = {
    "agent_name": "vgf",
    "value_lr": 3e-4,
    "actor_lr": 3e-4,
    "batch_size": 256,
    "activations": "relu",
    "value_hidden_dims": (512, 512, 512, 512),
    "actor_hidden_dims": (512, 512, 512, 512),
    "layer_norm": True,
    "actor_layer_norm": False,
    "discount": 0.99,
    "tau": 0.005,
    "critic_loss": "td",
    "expectile": 0.9,
    "train_q_agg": "min",
    "vgf_q_agg": "mean",
    "bc_policy_type": "flow",
    "bc_flow_steps": 5,
    "bc_use_tanh": False,
    "vgf_particles": 10,
    "train_particle_select": "mean",
    "eval_particle_select": "max",
    "train_vgf_steps": 1,
    "vgf_lr": 0.1,
    "vgf_alpha": 1.0,
    "softmax_temp": 1.0,
    "q_grad_norm": False,
    "encoder": None,
}
_REFERENCE_CRITIC_LOSS: dict[str, CriticLoss] = {"td": "td", "iql-q": "expectile", "sql-q": "sql"}
_REFERENCE_BEHAVIOR: dict[str, Behavior] = {"flow": "flow", "gau": "gaussian"}


def config_from_reference(config: Mapping[str, Any]) -> tuple[VGFConfig, TrainConfig]:
    """Translate a configuration of the public release, in the release's own key names.

    ``ob_dims`` and ``action_dim`` must be there; any other missing key takes the release's default. The result has
    ``bandwidth_gradient=True``, so that the policy moves as it did in the release, and a test budget equal to the
    training budget (the release is told the number of test steps with every call).

    Raises ``ValueError`` for unknown keys and for what this library does not compute: pixel encoders, other agents.
    """
    known = [*_REFERENCE_DEFAULTS, "ob_dims", "action_dim", "max_steps"]
    check_known_keys("the release's configuration", config, known)
    for key in ("ob_dims", "action_dim"):
        if config.get(key) is None:
            raise ValueError(
                f"the release's configuration has no {key!r}; add it, e.g. {key}={[29] if key == 'ob_dims' else 8}"
            )
    ref = {**_REFERENCE_DEFAULTS, **config}

    def whole(key: str) -> int:
        return integer(f"the release's {key}", ref[key], 0)

    def number(key: str) -> float:
        return float(real(f"the release's {key}", ref[key], -math.inf))

    choice("the release's agent_name", ref["agent_name"], ("vgf", "avgf"))
    amortized = ref["agent_name"] == "avgf"
    if ref["encoder"] is not None:
        raise ValueError(
            f"the release's configuration has encoder={ref['encoder']!r}: pixel encoders are not supported"
        )
    ob_dims = ref["ob_dims"]
    if isinstance(ob_dims, int):
        ob_dims = (ob_dims,)
    if not isinstance(ob_dims, (tuple, list)) or len(ob_dims) != 1:
        raise ValueError(
            f"the release's configuration has ob_dims={ref['ob_dims']!r}, expected one number: state vectors"
        )
    choice("the release's critic_loss", ref["critic_loss"], tuple(_REFERENCE_CRITIC_LOSS))
    choice("the release's bc_policy_type", ref["bc_policy_type"], tuple(_REFERENCE_BEHAVIOR))
    # The release takes "softmax" and "max" by name and chooses at random for every other word.
    selection: Selection = (
        ref["eval_particle_select"] if ref["eval_particle_select"] in ("max", "softmax") else "random"
    )
    budget = TransportBudget(whole("train_vgf_steps"), number("vgf_lr"), number("vgf_alpha"))
    policy = VGFConfig(
        observation_dim=integer("the release's ob_dims", ob_dims[0], 1),
        action_dim=whole("action_dim"),
        hidden_dims=integers("the release's value_hidden_dims", ref["value_hidden_dims"], 1),
        members=2,
        layer_norm=ref["layer_norm"],
        activation=ref["activations"],
        behavior=_REFERENCE_BEHAVIOR[ref["bc_policy_type"]],
        behavior_hidden_dims=integers("the release's actor_hidden_dims", ref["actor_hidden_dims"], 1),
        behavior_layer_norm=ref["actor_layer_norm"],
        behavior_steps=ref["bc_flow_steps"],
        gaussian_tanh=ref["bc_use_tanh"],
        particles=ref["vgf_particles"],
        flow_q_aggregation="min" if ref["vgf_q_agg"] == "min" else "mean",
        target_q_aggregation="min" if ref["train_q_agg"] == "min" else "mean",
        train_budget=budget,
        test_budget=budget,
        amortized=amortized,
        bandwidth_gradient=True,
        selection=selection,
        selection_temperature=number("softmax_temp"),
    )
    train = TrainConfig(
        batch_size=ref["batch_size"],
        critic_learning_rate=number("value_lr"),
        behavior_learning_rate=number("actor_lr"),
        discount=number("discount"),
        tau=number("tau"),
        critic_loss=_REFERENCE_CRITIC_LOSS[ref["critic_loss"]],
        expectile=number("expectile"),
        target_reduce="max" if ref["train_particle_select"] == "max" else "mean",
        normalize_score=bool(ref["q_grad_norm"]),
        # The release clips the gradients of its amortised agent, and of no other.
        max_gradient_norm=1.0 if amortized else None,
    )
    return policy, train
