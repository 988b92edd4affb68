"""Odd data, files, environments and states of PyTorch, each call held as ``test_hostile`` holds functions."""

import contextlib
import copy
import io
import itertools
import json
import pickle
from functools import cache, partial

import hostile
import numpy as np
import pytest
import torch
from hostile import (
    ARRAYS,
    INF,
    LISTS,
    NAN,
    NO_ARRAYS,
    NO_INTEGERS,
    NO_NUMBERS,
    Case,
    named,
    policy,
)
from release import DATA

import vgf_fast as vgf
from vgf_fast.common.bounds import ActionBounds
from vgf_fast.data.replay import ReplayBuffer
from vgf_fast.reference_checkpoint import read_parameters

RANDOM = np.random.default_rng(11)
ROWS = 6
FIELDS = {
    "observations": RANDOM.standard_normal((ROWS, 4)).astype(np.float32),
    "actions": np.tanh(RANDOM.standard_normal((ROWS, 2))).astype(np.float32),
    "next_observations": RANDOM.standard_normal((ROWS, 4)).astype(np.float32),
    "rewards": RANDOM.standard_normal(ROWS).astype(np.float32),
    "masks": np.array([1, 1, 0, 1, 0.5, 0], np.float32),
    "terminals": np.array([0, 0, 1, 0, 0, 1], np.float32),
}
NO_DEVICES = ("nowhere", "cuda:99", "meta", 5.5, "", "cpu:x", [], object, -1)
NO_DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", np.float32, 3, [], object)
NO_GENERATORS = (0, "seed", np.random.default_rng(0), torch.Generator, [])


def dataset(**changes):
    return vgf.Dataset.from_arrays(**{**FIELDS, **changes})


def seeded():
    return torch.Generator("cpu").manual_seed(2)


def data_calls():
    for name, array in FIELDS.items():

        def changed(change, name=name, array=array, **options):
            return dataset(**{name: change(array)}, **options)

        for kind, change in ARRAYS.items():
            yield Case(f"from_arrays: {name} {kind}", partial(changed, change), dataset)
        for kind, change in {**LISTS, **NO_ARRAYS}.items():
            if (name, kind) != ("terminals", "None"):
                yield Case(f"from_arrays: {name} {kind}", partial(changed, change), names=(name,))
        for label, change in {"longer": lambda a: np.concatenate([a, a]), "shorter": lambda a: a[1:]}.items():
            yield Case(f"from_arrays: {name} {label}", partial(changed, change), names=("observations",))
        if name != "terminals":
            wide = partial(changed, lambda a: a.astype(np.float64) * 1e6, dtype=torch.float16)
            yield Case(f"from_arrays: {name} beyond float16", wide, names=(name,))
    integers = {name: FIELDS[name].round().astype(np.int32) for name in ("rewards", "masks", "terminals")}
    floats = {name: array.astype(np.float32) for name, array in integers.items()}
    yield Case("from_arrays: integers", partial(dataset, **integers), partial(dataset, **floats))
    for name, values in {
        "device": NO_DEVICES,
        "dtype": (None, *NO_DTYPES),
        "action_clip": (0, -1.0, 1.5, True, *NO_NUMBERS),
        "action_bounds": (
            3,
            "ab",
            (1.0,),
            (1.0, -1.0),
            (-0.1, 0.1),
            (NAN, 1.0),
            (-1, INF),
            ([-1] * 3, [1] * 3),
            {},
            (None, 1),
        ),
    }.items():
        for value in values:
            names = (name, "actions", "ActionBounds.low", "ActionBounds.high")[: 1 if name != "action_bounds" else 4]
            yield Case(f"from_arrays: {name}={named(value)}", partial(dataset, **{name: value}), names=names)
    for label, (low, high) in {
        "numbers": (-2, 3.0), "arrays": (np.full(2, -2.0), np.float32([3, 4])),
        "a locked one": ([-2, 0.5], [2, 0.5]),
    }.items():  # fmt: skip
        bounds = ActionBounds.of((low, high), 2)

        def units(bounds=bounds, given=(low, high)):
            found = dataset(actions=bounds.to_environment(FIELDS["actions"].astype(np.float64)), action_bounds=given)
            return found.observations, found.actions, found.rewards

        def plain(bounds=bounds):
            found = dataset()
            found.actions[:, np.equal(bounds.low, bounds.high)] = 0.0
            return found.observations, found.actions, found.rewards

        yield Case(f"from_arrays: bounds of {label}", units, plain, tolerance=1e-6)
    made = dataset()
    for value in NO_DEVICES:
        yield Case(f"to: device={named(value)}", partial(made.to, value), names=("device",))
    for value in NO_DTYPES:
        yield Case(f"to: dtype={named(value)}", partial(made.to, dtype=value), names=("dtype",))
    for dtype in (torch.float64, torch.float32, "default"):
        kept = {} if dtype == "default" else {"dtype": dtype}
        yield Case(f"to: {dtype}", lambda kept=kept: dataset().to(**kept).to(dtype=torch.float32), dataset)
    buffer = ReplayBuffer.of(made, 9)
    for label, source in {"sample": made, "buffer": buffer}.items():
        for value in (0, *NO_INTEGERS):
            yield Case(f"{label}: {named(value)}", partial(source.sample, value), names=("batch_size",))
        for value in NO_GENERATORS:
            yield Case(f"{label}: generator={named(value)}", partial(source.sample, 3, value), names=("generator",))
        for size in (1, np.int8(7), 50):
            index = torch.randint(ROWS, (int(size),), generator=seeded())
            drawn = partial(lambda source, size: source.sample(size, seeded()), source, size)
            yield Case(f"{label}: {size} rows", drawn, partial(made.take, index))
    for value in ([6], [-1], [0.5], "0", None, [[0]], {}, [True], torch.tensor([10**9]), np.array(0), [2**70], ["a"]):
        yield Case(f"take: {named(value)}", partial(made.take, value), names=("index",))
    for value in (
        (0, 5),
        range(6),
        np.array([5, 0], np.uint8),
        torch.tensor([3], dtype=torch.int16),
        np.array([1, 2])[::-1],
    ):
        rows = np.array(list(value), dtype=np.int64)
        fields = [name for name in FIELDS if name != "terminals"]
        right = [getattr(made, name)[torch.from_numpy(rows.copy())] for name in fields]
        yield Case(f"take: {named(value)}", partial(made.take, value), partial(list, right))


# --- replay buffers --------------------------------------------------------------------------------------------------

TRANSITION = {
    "observation": FIELDS["observations"][0],
    "action": FIELDS["actions"][0],
    "next_observation": FIELDS["next_observations"][0],
    "reward": np.float32(0.5),
    "mask": np.float32(1.0),
}


def add(**changes):
    buffer = ReplayBuffer(3, 4, 2)
    before = [number.clone() for number in hostile.numbers(buffer)]
    try:
        buffer.add(**{**TRANSITION, **changes})
    except Exception:
        assert all(map(torch.equal, hostile.numbers(buffer), before)), "an error changed the buffer"
        raise
    return buffer


def buffer_calls():
    for name in ("capacity", "observation_dim", "action_dim"):
        sizes = {"capacity": 3, "observation_dim": 4, "action_dim": 2}
        for value in (0, *NO_INTEGERS):
            yield Case(
                f"ReplayBuffer: {name}={named(value)}",
                lambda sizes=sizes, name=name, value=value: ReplayBuffer(**{**sizes, name: value}),
                names=(name,),
            )
        huge = {**sizes, name: 2**62}
        yield Case(f"ReplayBuffer: huge {name}", partial(ReplayBuffer, **huge), names=("transitions",))
    for value in NO_DEVICES:
        yield Case(
            f"ReplayBuffer: device={named(value)}", partial(ReplayBuffer, 3, 4, 2, device=value), names=("device",)
        )
    for value in NO_DTYPES:
        yield Case(f"ReplayBuffer: dtype={named(value)}", partial(ReplayBuffer, 3, 4, 2, dtype=value), names=("dtype",))
    yield Case("sample: empty", lambda: ReplayBuffer(3, 4, 2).sample(1), names=("empty",))
    for name, array in TRANSITION.items():
        if array.ndim:
            for kind, change in {**ARRAYS, **LISTS}.items():
                yield Case(f"add: {name} {kind}", lambda n=name, a=array, c=change: add(**{n: c(a)}), add)
            for kind, change in NO_ARRAYS.items():
                if kind != "of another rank":  # as many numbers
                    yield Case(f"add: {name} {kind}", lambda n=name, a=array, c=change: add(**{n: c(a)}), names=(name,))
        else:
            for value in without_numbers():
                yield Case(f"add: {name}={named(value)}", partial(add, **{name: value}), names=(name,))
    for name, value in {"action": [1.5, 0.0], "mask": 1.5, "reward": 1e39, "observation": [1e39] * 4}.items():
        yield Case(f"add: {name} of {value}", partial(add, **{name: value}), names=(name,))


def without_numbers():
    """One number in a list is one number."""
    return [value for value in NO_NUMBERS if not (isinstance(value, list) and value)]


# --- files -----------------------------------------------------------------------------------------------------------


@cache
def learner():
    made = vgf.Learner(copy.deepcopy(policy()), vgf.TrainConfig(batch_size=3))
    made.update(dataset().take([0, 1, 2]))
    made.policy.sample_actions(FIELDS["observations"])
    return made


def damaged(folder, change):
    """What is read of both kinds of files after a change of their bytes: an error of each."""
    for name, save, load in (
        ("learner.safetensors", learner().save, vgf.Learner.resume),
        ("model.safetensors", learner().policy.save_pretrained, vgf.VGFPolicy.from_pretrained),
    ):
        save(folder)
        path = folder / name
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(ValueError, match=name):
            load(folder)


@pytest.mark.parametrize("place", np.linspace(0.0, 0.999, 15).tolist())
def test_damaged_files(place, tmp_path):
    for middle in (lambda byte: b"", lambda byte: bytes([byte[0] ^ 1]), lambda byte: 2 * byte):
        for rest in (slice(1, None), slice(0)):

            def change(data, middle=middle, rest=rest):
                at = int(place * len(data))
                return data[:at] + middle(data[at : at + 1]) + data[at:][rest]

            damaged(tmp_path, change)


SIZES = '"observation_dim": 4, "action_dim": 2'
EDITS = (
    "", "null", "[]", "3", "{", "\x00", "{" * 5000, '{"observation_dim": 4}', '{"particles": 0}',
    '{"hidden_dims": [16, 1e400]}', '{"observation_dim": null, "action_dim": 2}',
    '{"observation_dim": 9, "action_dim": 2}',
    *("{" + f"{SIZES}, {rest}" + "}" for rest in (
        '"members": 1e9', '"hidden_dims": "16"', '"x": 1', '"test_budget": {"steps": NaN}', '"test_budget": [1]',
        '"train_budget": {"l": 1}', '"action_low": [0, 0]', '"action_low": 1, "action_high": 2', '"particles": "5"',
    )),
)  # fmt: skip


@pytest.mark.parametrize("text", EDITS, ids=range(len(EDITS)))
def test_edited_configurations(text, tmp_path):
    learner().policy.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    names = ("config.json", "model.safetensors")
    hostile.hold_all([Case("edited", partial(vgf.VGFPolicy.from_pretrained, tmp_path), names=names)])


@pytest.mark.parametrize("value", [None, 3, 1.5, b"x", [], {}, "\0", len], ids=named)
def test_folders(value):
    made = learner()
    for call in (made.save, made.policy.save_pretrained, vgf.Learner.resume, vgf.VGFPolicy.from_pretrained):
        hostile.hold_all([Case(call.__name__, partial(call, value), names=("directory",))])


@pytest.mark.parametrize("value", NO_DEVICES, ids=named)
def test_devices_of_what_is_loaded(value, tmp_path):
    if value == "meta":
        return
    learner().save(tmp_path)
    learner().policy.save_pretrained(tmp_path)
    for load in (vgf.Learner.resume, vgf.VGFPolicy.from_pretrained):
        hostile.hold_all([Case("device", partial(load, tmp_path, value), names=("device",))])


# --- copies ----------------------------------------------------------------------------------------------------------


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": through_a_file,
}


def copy_calls():
    bounds = {"actions": FIELDS["actions"] * 2.0, "action_bounds": (-2.0, 2.0)}
    things = {
        "a learner": learner, "a policy": policy, "its configuration": lambda: policy().config, "data": dataset,
        "data with bounds": lambda: dataset(**bounds), "a buffer": lambda: ReplayBuffer.of(dataset(), 9),
        "bounds": lambda: ActionBounds((-1.0,), (2.0,)), "a critic": lambda: policy().critic,
    }  # fmt: skip
    for (name, make), (kind, change) in itertools.product(things.items(), COPIES.items()):
        yield Case(f"copies: {kind} of {name}", lambda make=make, change=change: change(make()), make)


# --- the release's arrays --------------------------------------------------------------------------------------------

RELEASE = DATA / "reference_checkpoint"


@cache
def release():
    return read_parameters(RELEASE / "params_3.pkl")


def from_release(arrays=None, **changes):
    config = json.loads((RELEASE / "config.json").read_text())
    return vgf.VGFPolicy.from_reference_parameters(release() if arrays is None else arrays, {**config, **changes})


def release_calls():
    wrong = (
        "NaN", "texts", "objects", "None", "without width", "masked", "complex", "a text", "without memory",
    )  # fmt: skip
    for name in sorted(release()):

        def changed(change, name=name):
            return from_release({**release(), name: change(release()[name])})

        for kind in ("Fortran's order", "big-endian", "float64", "read-only", "a list"):
            change = {**ARRAYS, **LISTS}[kind]
            yield Case(f"release: {name} {kind}", partial(changed, change), from_release)
        for kind in wrong:
            yield Case(f"release: {name} {kind}", partial(changed, NO_ARRAYS[kind]), names=(name,))
        left = {other: array for other, array in release().items() if other != name}
        yield Case(f"release: without {name}", partial(from_release, left), names=(name,))


# --- the state of PyTorch --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


STATES = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "a device": lambda: torch.device("meta"),
    "a default device": lambda: switched(torch.set_default_device, "meta", None),
    "float64 by default": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "float16 by default": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "four threads": lambda: switched(torch.set_num_threads, 4, 1),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "other random numbers": lambda: switched(torch.manual_seed, 99, 0),
}


def tensors():
    return [torch.from_numpy(FIELDS[name].copy()) for name in ("observations", "rewards", "masks")]


def drawn(*shape):
    return torch.from_numpy(np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32))


def trained():
    made = vgf.Learner(vgf.VGFPolicy(policy().config), vgf.TrainConfig(batch_size=4))
    records = made.fit(dataset(), 2, progress=False)
    return made, [list(record.values()) for record in records]


def under(state, call):
    with STATES[state]():
        return call()


def release_config_calls():
    for name, values in {
        "ob_dims": ([], [0], [3, 3], "11", [1.5], [-1], {}), "action_dim": (0, -1, 1.5, "3", [], NAN),
        "vgf_particles": (0, -1, 1.5, "3", None, NAN), "vgf_alpha": (0.0, -1.0, NAN, "x", None, []),
        "train_vgf_steps": (-1, "x", None, NAN, INF, []), "value_hidden_dims": ([], [0], "16", 16, None),
        "agent_name": ("iql", None, 3), "critic_loss": ("x", None, 3, []), "bc_policy_type": ("x", None, []),
        "activations": ("tanh", None, 3), "encoder": ("impala", 3), "layer_norm": (None, "yes", 1), "x": (1,),
        "discount": (-1.0, 2.0, NAN, None, "x"), "softmax_temp": (0.0, NAN, None, "x", []), "batch_size": (0, 1.5, "x"),
    }.items():  # fmt: skip
        for value in values:
            told = (name, *RENAMED.get(name, ()))
            yield Case(
                f"the release's configuration: {name}={named(value)}",
                partial(from_release, **{name: value}),
                names=told,
            )


def state_calls():
    budget = vgf.TransportBudget(2, 0.1, 0.5)
    seen = FIELDS["observations"]
    plain = {
        "critic": lambda: vgf.critic_value_and_score(policy().critic, tensors()[0], drawn(ROWS, 5, 2), "min"),
        "flow": lambda: vgf.value_gradient_flow(policy().critic, tensors()[0], drawn(ROWS, 5, 2), budget),
        "behavior": lambda: vgf.behavior_flow(policy().behavior, tensors()[0], drawn(ROWS, 5, 2), 3),
        "svgd": lambda: vgf.svgd_direction(drawn(ROWS, 5, 2), drawn(ROWS, 5, 2), 0.5, True),
        "select": lambda: vgf.select_particle(drawn(ROWS, 5, 2), drawn(ROWS, 5), "softmax", 1.0, seeded()),
        "target": lambda: vgf.td_target(drawn(2, ROWS, 5), *tensors()[1:], 0.9),
        "act": lambda: policy().sample_actions(seen, generator=seeded()),
        "act alone": lambda: policy("ascent").sample_actions(seen[0], generator=seeded()),
        "act by a Gaussian": lambda: policy("gaussian").sample_actions(seen, generator=seeded()),
        "act amortised": lambda: policy("amortized").sample_actions(seen, generator=seeded()),
        "predict": lambda: policy().predict(seen)[0],
        "policy": lambda: vgf.VGFPolicy(policy().config, seed=4),
        "data": dataset,
        "sample": lambda: dataset().sample(7, seeded()),
        "buffer": add,
        "copy": lambda: copy.deepcopy(learner()),
        "fit": trained,
        "release": from_release,
    }
    for state, (name, call) in itertools.product(STATES, plain.items()):
        yield Case(f"{state}: {name}", partial(under, state, call), call)


# The release's keys, as the errors of a configuration call them.
RENAMED = {
    "ob_dims": ["VGFConfig.observation_dim"], "action_dim": ["VGFConfig.action_dim"],
    "vgf_particles": ["VGFConfig.particles"], "vgf_alpha": ["TransportBudget.temperature"],
    "train_vgf_steps": ["TransportBudget.steps"], "value_hidden_dims": ["VGFConfig.hidden_dims"],
    "activations": ["VGFConfig.activation"], "layer_norm": ["VGFConfig.layer_norm"],
    "discount": ["TrainConfig.discount"], "softmax_temp": ["VGFConfig.selection_temperature"],
    "batch_size": ["TrainConfig.batch_size"],
}  # fmt: skip
TABLES = (release_config_calls, data_calls, buffer_calls, copy_calls, release_calls, state_calls)
CASES = hostile.grouped(case for table in TABLES for case in table())


@pytest.mark.parametrize("group", CASES)
def test_calls(group):
    hostile.hold_all(CASES[group])
