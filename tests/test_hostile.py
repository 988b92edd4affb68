"""Odd calls of the public API, each held to the right number or to an error that names the argument.

The tables below make the calls: odd values (``hostile``) by arguments. Right is ``reference`` in float64, or the plain
call, bit for bit.
"""

import itertools
from functools import partial

import hostile
import numpy as np
import pytest
import torch
from hostile import (
    ACTION_DIM,
    CLOSE,
    MAGNITUDES,
    NO_BOOLEANS,
    NO_CHOICES,
    NO_INTEGERS,
    NO_NUMBERS,
    NO_TENSORS,
    OBSERVATION_DIM,
    TENSORS,
    Case,
    named,
    policy,
)
from properties import given, settings, st

import vgf_fast as vgf
from vgf_fast import reference
from vgf_fast.backends import torch as torch_backend

# --- functions -------------------------------------------------------------------------------------------------------


def draw(*shape, seed=0, scale=0.7):
    return scale * torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


def exact(module):
    return module.stacked().detach().to(torch.float64)


def critic_truth(critic, observations, actions, q_aggregation="mean", **_):
    at_states = torch_backend.critic_at_states(exact(critic), observations, actions.shape[1])
    return at_states.values_and_score(actions, q_aggregation)


def flow_truth(critic, observations, particles, budget, flow_gradient="none", **options):
    numbers = (budget.steps, budget.step_size, budget.temperature)
    return reference.value_gradient_flow(exact(critic), observations, particles, *numbers, **options)


def behavior_truth(velocity, observations, noise, steps, **_):
    return reference.behavior_flow(exact(velocity), observations, noise, steps)


def select_truth(particles, q, mode="max", temperature=1.0, generator=None, **_):
    uniform = None if mode == "max" else torch.rand(len(q), generator=generator)
    return reference.select_particle(particles, q, mode, temperature, uniform)


def td_truth(q, rewards, masks, discount, q_aggregation="min", reduce="mean"):
    return reference.td_target(q, rewards, masks, discount, q_aggregation, reduce)


BUDGET = vgf.TransportBudget(2, 0.1, 0.5)
# Function, its truth, its networks, its tensors by name, its other arguments.
FUNCTIONS = {
    "critic": (vgf.critic_value_and_score, critic_truth, {"observations": "BO", "actions": "BNA"}, {}),
    "flow": (vgf.value_gradient_flow, flow_truth, {"observations": "BO", "particles": "BNA"}, {"budget": BUDGET}),
    "behavior": (vgf.behavior_flow, behavior_truth, {"observations": "BO", "noise": "BNA"}, {"steps": 3}),
    "svgd": (
        vgf.svgd_direction, reference.svgd_direction, {"particles": "BNA", "score": "BNA"}, {"temperature": 0.5},
    ),
    "select": (vgf.select_particle, select_truth, {"particles": "BNA", "q": "BN"}, {}),
    "target": (vgf.td_target, td_truth, {"q": "EBN", "rewards": "B", "masks": "B"}, {"discount": 0.9}),
}  # fmt: skip
NETWORKS = {"critic": ("critic", "critic"), "flow": ("critic", "critic"), "behavior": ("velocity", "behavior")}
LENGTHS = {"B": 3, "N": 5, "A": ACTION_DIM, "O": OBSERVATION_DIM, "E": 2}


def inputs(function, lengths=LENGTHS):
    tensors = {
        name: draw(*(lengths[axis] for axis in axes), seed=seed)
        for seed, (name, axes) in enumerate(FUNCTIONS[function][2].items())
    }
    if "masks" in tensors:
        tensors["masks"] = (tensors["masks"] > 0).float()
    return tensors


def call(function, tensors, options, network=None):
    made, _, _, always = FUNCTIONS[function]
    return made(**{**_network(function, network), **tensors, **always, **options})


def truth(function, tensors, options, network=None):
    _, made, _, always = FUNCTIONS[function]
    return made(
        *_network(function, network).values(),
        *(tensor.detach().double() for tensor in tensors.values()),
        **{**always, **options},
    )


def _network(function, network):
    if function not in NETWORKS:
        return {}
    name, part = NETWORKS[function]
    return {name: getattr(policy(), part) if network is None else network}


def calls(function, label, names=(), right=True, tensors=None, tolerance=CLOSE, **options):
    """A case that makes its tensors when it is run."""

    def made():
        return inputs(function) if tensors is None else tensors()

    return Case(
        f"{function}: {label}",
        lambda: call(function, made(), options),
        (lambda: truth(function, made(), options)) if right else None,
        tuple(names),
        tolerance,
    )


# Changes that leave an argument right, because nothing else says how large it must be, or a minimum leaves it out.
FINE = {
    ("select", "particles"): {"wider", "narrower", "without width", "NaN", "infinite"},
    ("target", "q"): {"wider", "narrower", "longer", "shorter", "infinite"},
}
PARTNERS = {("select", "particles"): "q"}  # what the message is about when shapes differ


def tensor_calls():
    for function, (_, _, names, _) in FUNCTIONS.items():
        for name in names:

            def changed(change, name=name, function=function):
                tensors = inputs(function)
                return {**tensors, name: change(tensors[name])}

            told = [name, PARTNERS.get((function, name), name)]
            fine = FINE.get((function, name), ())
            for kind, change in TENSORS.items():
                yield calls(function, f"{name} {kind}", tensors=partial(changed, change))
            for kind, change in NO_TENSORS.items():
                yield calls(function, f"{name} {kind}", told, kind in fine, partial(changed, change))
            for size in MAGNITUDES:
                yield calls(function, f"{name} times {size}", told, True, partial(changed, partial(torch.mul, size)))


# Options by function, with every value that is right and some that are not.
FLAGS = (False, True)
OPTIONS = {
    "critic": {"q_aggregation": ("mean", "min"), "flow_gradient": ("none", "exact"), "backend": ("auto", "torch")},
    "flow": {
        "q_aggregation": ("mean", "min"), "bandwidth_gradient": FLAGS, "repulsion": FLAGS,
        "optimizer": ("adam", "ascent"), "return_trajectory": FLAGS, "evaluate": FLAGS,
        "flow_gradient": ("none", "exact", "identity"),
    },
    "behavior": {"steps": (1, 2, np.int16(3)), "flow_gradient": ("none", "exact", "identity")},
    "svgd": {"temperature": (1e-12, 1, np.float32(2.0), 1e12), "bandwidth_gradient": FLAGS, "repulsion": FLAGS},
    "select": {"mode": ("max", "softmax", "random"), "temperature": (1e-12, 1, np.float64(2.0), 1e12)},
    "target": {"discount": (0, 0.5, np.float32(0.9), 1.0), "q_aggregation": ("mean", "min"), "reduce": ("mean", "max")},
}  # fmt: skip
NO_OPTIONS = {
    "temperature": (0, -1.0, 1e-40, 1e300, True, *NO_NUMBERS), "discount": (-0.1, 1.1, True, *NO_NUMBERS),
    "steps": (0, *NO_INTEGERS), "budget": (None, 3, (2, 0.1, 0.5), {"steps": 2}, "budget", vgf.TransportBudget),
    "generator": (0, "seed", np.random.default_rng(0), (), torch.Generator),
    "critic": (None, 0, "critic", torch.nn.Linear(6, 1), vgf.VGFConfig(4, 2), []), "backend": ("cuda", *NO_CHOICES),
}  # fmt: skip
NO_OPTIONS["velocity"] = NO_OPTIONS["critic"]


def option_calls():
    for function, choices in OPTIONS.items():
        for values in itertools.product(*choices.values()):
            chosen = dict(zip(choices, values, strict=True))
            label = ", ".join(f"{name}={value}" for name, value in chosen.items())
            drawn = chosen.get("mode", "max") != "max"

            def seeded(make, function=function, chosen=chosen, drawn=drawn):
                generator = {"generator": torch.Generator("cpu").manual_seed(1)} if drawn else {}
                return make(function, inputs(function), {**chosen, **generator})

            yield Case(f"{function}: {label}", partial(seeded, call), partial(seeded, truth), (), CLOSE)
        wrong = dict.fromkeys([*choices, *FUNCTIONS[function][3], "backend"])
        wrong |= dict.fromkeys(["generator"] if function == "select" else NETWORKS.get(function, ())[:1])
        for name in wrong:
            kinds = NO_BOOLEANS if choices.get(name) == FLAGS else NO_OPTIONS.get(name, NO_CHOICES)
            for value in kinds:
                options = {"mode": "random"} if name == "generator" else {}
                yield calls(function, f"{name}={named(value)}", [name], False, **{**options, name: value})


SHAPES = (
    {"B": 0}, {"B": 1}, {"B": 40}, {"N": 1}, {"N": 2}, {"N": 33}, {"N": 130}, {"A": 1}, {"A": 7}, {"O": 1}, {"O": 40},
    {"B": 1, "N": 1, "A": 1, "O": 1}, {"B": 0, "N": 1, "A": 3},
)  # fmt: skip


def shape_calls():
    for function in FUNCTIONS:
        for lengths in SHAPES:

            def shaped(make, function=function, lengths=lengths):
                sizes = {**LENGTHS, **lengths}
                part = NETWORKS.get(function, (None, None))[1]
                network = part and getattr(policy("flow", sizes["O"], sizes["A"]), part)
                return make(function, inputs(function, sizes), {}, network)

            yield Case(f"{function}: {lengths}", partial(shaped, call), partial(shaped, truth), (), CLOSE)


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(FUNCTIONS)),
    st.fixed_dictionaries(
        {"B": st.integers(0, 6), "N": st.integers(1, 9), "A": st.integers(1, 4), "O": st.integers(1, 5)}
    ),
    st.lists(st.sampled_from(sorted(TENSORS)), min_size=3, max_size=3),
    st.floats(-12, 12).map(lambda exponent: 10.0**exponent),
    st.integers(0, 99),
)
def test_any_call(function, lengths, kinds, scale, seed):
    """Shapes, layouts, dtypes and sizes of numbers, all at once."""
    lengths = {**LENGTHS, **lengths}
    tensors = {}
    for (name, axes), kind in zip(FUNCTIONS[function][2].items(), kinds, strict=False):
        plain = draw(*(lengths[axis] for axis in axes), seed=seed, scale=scale).clamp(-6e4, 6e4)
        tensors[name] = TENSORS[kind](plain)
    part = NETWORKS.get(function, (None, None))[1]
    network = part and getattr(policy("flow", lengths["O"], lengths["A"]), part)
    made = [partial(one, function, tensors, {}, network) for one in (call, truth)]
    hostile.hold_all([Case(f"{function}: {kinds}", *made, tuple(tensors), CLOSE)])


CASES = hostile.grouped([*tensor_calls(), *option_calls(), *shape_calls()])


@pytest.mark.parametrize("group", CASES)
def test_calls(group):
    hostile.hold_all(CASES[group])


def test_at_least_five_hundred_calls():
    assert sum(map(len, CASES.values())) >= 500
