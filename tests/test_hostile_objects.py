"""Odd calls of policies, learners, data and configurations, each held as ``test_hostile`` holds functions."""

import copy
import dataclasses
import itertools
from functools import partial

import hostile
import numpy as np
import pytest
import torch
from hostile import (
    ARRAYS,
    CLOSE,
    CONFIGURATIONS,
    INF,
    LISTS,
    NAN,
    NO_ARRAYS,
    NO_BOOLEANS,
    NO_CHOICES,
    NO_INTEGERS,
    NO_NUMBERS,
    NO_TENSORS,
    SIZES,
    TENSORS,
    Case,
    named,
    policy,
)

import vgf_fast as vgf
from vgf_fast.common.bounds import ActionBounds

RANDOM = np.random.default_rng(7)
OBSERVATIONS = RANDOM.standard_normal((3, 4)).astype(np.float32)
NOISE = RANDOM.standard_normal((3, 5, 2)).astype(np.float32)


def without(values, *dropped):
    return [value for value in values if not any(value is one for one in dropped)]


# --- acting ----------------------------------------------------------------------------------------------------------


def act(observations=OBSERVATIONS, noise=NOISE, made=None, **options):
    options = {"generator": torch.Generator("cpu").manual_seed(1), **options}
    return (policy() if made is None else made).sample_actions(observations, noise=noise, **options)


def predict(observation):
    return policy().predict(observation)[0]


def select(observation):
    made = copy.deepcopy(policy())
    return made.select_action({"observation.state": observation})


def acting_calls():
    for name, steps, choice in itertools.product(
        CONFIGURATIONS, (0, 1, np.int8(2), None), ("max", "softmax", "random", None)
    ):
        options = {"flow_steps": steps, "selection": choice}
        yield Case(
            f"{name}: flow_steps={steps}, selection={choice}",
            lambda name=name, options=options: act(made=policy(name), **options),
            lambda name=name, options=options: act(made=copy.deepcopy(policy(name)).double(), **options),
            tolerance=CLOSE,
        )
    for label, call in {"act": act, "predict": predict, "select": select}.items():
        for kind, change in {**ARRAYS, **LISTS}.items():
            yield Case(f"{label}: {kind}", lambda c=call, f=change: c(f(OBSERVATIONS)), partial(call, OBSERVATIONS))
        for kind, change in TENSORS.items():

            def tensor(convert, call=call, change=change):
                return call(convert(change(torch.from_numpy(OBSERVATIONS))))

            plain = partial(tensor, lambda t: t.detach().float().resolve_neg().numpy().copy())
            yield Case(f"{label}: tensor {kind}", partial(tensor, lambda t: t), plain)
        for kind, change in NO_ARRAYS.items():
            yield Case(
                f"{label}: {kind}", lambda c=call, f=change: c(f(OBSERVATIONS)), names=("observations", "observation")
            )
        for kind in ("of higher rank", "nothing", "wider", "narrower", "integers", "float8", "infinite", "a function"):
            change = NO_TENSORS[kind]
            wrong = partial(lambda c, f: c(f(torch.from_numpy(OBSERVATIONS))), call, change)
            yield Case(f"{label}: tensor {kind}", wrong, names=("observations",))
    for kind, change in {**ARRAYS, "a list": np.ndarray.tolist}.items():
        yield Case(f"act: noise {kind}", lambda f=change: act(noise=f(NOISE)), act)
    for kind, change in NO_ARRAYS.items():
        if kind != "None":
            yield Case(f"act: noise {kind}", lambda f=change: act(noise=f(NOISE)), names=("noise",))
    for name, values in {
        "flow_steps": without(NO_INTEGERS, None),
        "selection": without(NO_CHOICES, None),
        "generator": (0, "seed", np.random.default_rng(0), torch.Generator),
    }.items():
        for value in values:
            yield Case(f"act: {name}={named(value)}", partial(act, **{name: value}), names=(name,))
    for value in ({}, {"state": OBSERVATIONS}, {"observation.state": None}, {"observation.state": {}}, {1: 2, "b": 3}):
        yield Case(
            f"select: {named(value)}", partial(policy().select_action, value), names=("observation", "observations")
        )


def made_calls():
    """Constructors of policies and learners."""
    config = policy().config
    for name, values in {
        "config": (None, {}, config.to_dict(), 3, vgf.TrainConfig(), vgf.VGFConfig),
        "device": ("nowhere", "cuda:99", 5.5, "", "cpu:x", [], object),
        "backend": ("cuda", *NO_CHOICES),
        "seed": without(NO_INTEGERS, -1, -(2**70)),
    }.items():
        for value in values:
            yield Case(
                f"VGFPolicy: {name}={named(value)}",
                lambda name=name, value=value: vgf.VGFPolicy(**{"config": config, name: value}),
                names=(name,),
            )
    for value in (None, {}, 3, config, vgf.VGFPolicy, policy().critic):
        yield Case(f"Learner: policy={named(value)}", partial(vgf.Learner, value), names=("policy",))
        if value is not None:
            yield Case(f"Learner: config={named(value)}", partial(vgf.Learner, policy(), value), names=("config",))
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(policy()).to(dtype)
        yield Case(f"Learner: {dtype}", partial(vgf.Learner, half), names=("policy",))


# --- bounds ----------------------------------------------------------------------------------------------------------

BOUNDS = {
    "wide": ((-2.0, -2.0), (2.0, 2.0)),
    "narrow": ((-0.4, -0.4), (0.4, 0.4)),
    "skew": ((0.0, -5.0), (1.0, 7.0)),
    "locked": ((0.5, -1.0), (0.5, 1.0)),
    "all locked": ((0.0, 3.0), (0.0, 3.0)),
    "huge": ((-1e30, 0.0), (1e30, 1e38)),
    "tiny": ((-1e-30, 0.0), (1e-30, 1e-38)),
    "integers": ((-3, 0), (2, 9)),
    "far": ((1e6, -1e6), (1e6 + 1.0, -1e6 + 2.0)),
}
NO_BOUNDS = (
    (None, (1.0, 1.0)), ((-1.0, -1.0), None), ((-1.0,), (1.0,)), ((1.0, 1.0), (-1.0, -1.0)), ((NAN, -1.0), (1.0, 1.0)),
    ((-1.0, -1.0), (1.0, INF)), ("ab", "cd"), (1.0, 2.0), ((), ()), ((-1.0, -1.0), (1.0,)), ((None, 0), (1, 1)),
    (([-1.0], [-1.0]), (1.0, 1.0)), ((1j, 0), (1, 1)), ({}, {}),
)  # fmt: skip


def scaled(low, high, call):
    ends = [torch.tensor(end, dtype=torch.float64) for end in (low, high)]
    unit = torch.as_tensor(call(policy())).double()
    return (ends[0] + (unit + 1.0) / 2.0 * (ends[1] - ends[0])).float()


def bound_calls():
    acting = {
        "predict": lambda made: made.predict(OBSERVATIONS)[0],
        "select": lambda made: copy.deepcopy(made).select_action(OBSERVATIONS),
    }
    for label, (low, high) in BOUNDS.items():
        for kind, convert in {"tuples": tuple, "lists": list, "arrays": np.array}.items():

            def made(low=low, high=high, convert=convert):
                return policy_within(convert(low), convert(high))

            for name, call in acting.items():
                yield Case(
                    f"{name}: {label} bounds, {kind}",
                    lambda made=made, call=call: torch.as_tensor(call(made())),
                    partial(scaled, low, high, call),
                    tolerance=2e-7,
                )
        yield Case(f"act: {label} bounds", lambda made=made: act(made=made()), act)
    for low, high in NO_BOUNDS:
        bounds = {"action_low": low, "action_high": high}
        label = f"bounds {named(low)} to {named(high)}"
        yield Case(f"VGFConfig: {label}", lambda b=bounds: vgf.VGFConfig(**{**SIZES, **b}), names=tuple(bounds))
        if low != (-1.0,):
            names = ("ActionBounds.low", "ActionBounds.high")
            yield Case(f"ActionBounds: {label}", partial(ActionBounds, low, high), names=names)


def policy_within(low, high):
    made = copy.deepcopy(policy())
    made.config = dataclasses.replace(made.config, action_low=low, action_high=high)
    return made


# --- configurations --------------------------------------------------------------------------------------------------


def config_calls():
    for kind in (vgf.VGFConfig, vgf.TrainConfig, vgf.TransportBudget):
        start = kind(**(SIZES if kind is vgf.VGFConfig else {}))
        for field in dataclasses.fields(kind):
            now, name = getattr(start, field.name), field.name
            if isinstance(now, bool):
                values, right = NO_BOOLEANS, np.bool_
            elif isinstance(now, int):
                values, right = NO_INTEGERS, np.int32
            elif isinstance(now, float):
                values, right = (-1.0, True, *NO_NUMBERS), np.float64
            elif isinstance(now, str):
                values, right = NO_CHOICES, str
            elif isinstance(now, tuple):
                values, right = ((), (0,), (1.5,), (True,), 16, "16", None, {16}, {16: 16}, ((16,),), (NAN,), len), list
            elif isinstance(now, vgf.TransportBudget):
                values, right = (None, 3, (1, 0.1, 0.1), {"steps": 1}, "budget"), copy.copy
            else:
                values, right = ("3", -1, 0, NAN, [], {}, True), copy.copy
            for value in values:
                yield Case(
                    f"{kind.__name__}: {name}={named(value)}",
                    lambda start=start, name=name, value=value: dataclasses.replace(start, **{name: value}),
                    names=(f"{kind.__name__}.{name}", *(["VGFConfig.action_low"] if name == "action_high" else [])),
                )
            yield Case(
                f"{kind.__name__}: {name} by {right.__name__}",
                lambda start=start, name=name, right=right, now=now: dataclasses.replace(start, **{name: right(now)}),
                lambda start=start: start,
            )
    large = {"observation_dim", "action_dim", "members", "particles", "hidden_dims", "behavior_hidden_dims"}
    for name, size in itertools.product(sorted(large), (10**12, 2**62)):
        yield Case(
            f"too large: {name} of {size}", partial(too_large, name, size), names=("layers", "particles", "networks")
        )


def too_large(name, size):
    config = vgf.VGFConfig(**{**SIZES, name: (size, size) if name.endswith("dims") else size})
    return vgf.VGFPolicy(config).sample_actions(np.zeros((100, 4), np.float32))


# --- learning --------------------------------------------------------------------------------------------------------

BATCH = {
    "observations": OBSERVATIONS,
    "actions": np.tanh(RANDOM.standard_normal((3, 2))).astype(np.float32),
    "next_observations": RANDOM.standard_normal((3, 4)).astype(np.float32),
    "rewards": RANDOM.standard_normal(3).astype(np.float32),
    "masks": np.array([1.0, 0.0, 0.5], np.float32),
}
DRAWN = {
    "particles": NOISE,
    "bc_x0": RANDOM.standard_normal((3, 2)).astype(np.float32),
    "bc_t": RANDOM.random((3, 1)).astype(np.float32),
}


def learner(name="flow", dtype=torch.float32, **options):
    return vgf.Learner(copy.deepcopy(policy(name)).to(dtype), vgf.TrainConfig(batch_size=3, **options))


def update(batch=BATCH, noise=DRAWN, made=None):
    """The metrics of an update and all that it left; after an error, what it left must be what was there."""
    made = learner() if made is None else made
    before = [number.clone() for number in hostile.numbers(made)]
    try:
        metrics = made.update(batch, noise)
    except Exception:
        assert all(map(torch.equal, hostile.numbers(made), before)), "an error changed the learner"
        raise
    return metrics, made


def update_calls():
    for name, loss, reduce in itertools.product(CONFIGURATIONS, ("td", "expectile", "sql"), ("mean", "max")):
        options = {"critic_loss": loss, "target_reduce": reduce, "max_gradient_norm": 1.0}
        yield Case(
            f"{name}: {loss}, {reduce}",
            lambda name=name, options=options: update(made=learner(name, **options))[0],
            lambda name=name, options=options: update(made=learner(name, torch.float64, **options))[0],
            tolerance=CLOSE,
        )
    for argument, fields in {"batch": BATCH, "noise": DRAWN}.items():
        for name, array in fields.items():

            def changed(change, argument=argument, fields=fields, name=name, array=array):
                return update(**{argument: {**fields, name: change(array)}})

            for kind, change in {
                **ARRAYS,
                "a list": np.ndarray.tolist,
                "NumPy's protocol": hostile.Convertible,
            }.items():
                yield Case(f"update: {name} {kind}", partial(changed, change), update)
            for kind, change in NO_ARRAYS.items():
                yield Case(f"update: {name} {kind}", partial(changed, change), names=(f"{argument}['{name}']", "batch"))
            for value in (5.0, -2.0):
                limited = name in ("actions", "masks", "bc_t")
                if limited:
                    out = partial(changed, lambda array, value=value: np.full_like(array, value))
                    yield Case(f"update: {name} of {value}", out, names=(f"{argument}['{name}']",))
        for value in (3, "batch", [], {}, {"rewards": 1.0}, fields.values()):
            yield Case(f"update: {argument}={named(value)}", partial(update, **{argument: value}), names=(argument,))


CASES = hostile.grouped([*acting_calls(), *made_calls(), *bound_calls(), *config_calls(), *update_calls()])


@pytest.mark.parametrize("group", CASES)
def test_calls(group):
    hostile.hold_all(CASES[group])
