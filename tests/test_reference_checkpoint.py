"""Reading the release's pickles: arrays and nothing else."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from release import DATA

import vgf_fast as vgf
from vgf_fast.common.checkpoints import CheckpointError
from vgf_fast.reference_checkpoint import UnsafePickleError, read_parameters

FOLDER = DATA / "reference_checkpoint"


class Runs:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def agent_with(value):
    return {"agent": {name: {"params": {"x": value}} for name in ("critic", "target_critic", "actor_bc")}}


def test_reads_every_network():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    assert arrays["critic/value_net/Dense_0/kernel"].shape == (2, 14, 32)
    assert arrays["bc/mlp/Dense_2/bias"].shape == (3,)
    assert {name.split("/")[0] for name in arrays} == {"critic", "target_critic", "bc"}
    assert all(array.dtype == np.float32 for array in arrays.values())


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 2))]
)
def test_plain_numpy_arrays(tmp_path, array, protocol):
    path = tmp_path / "params_1.pkl"
    path.write_bytes(pickle.dumps(agent_with(array), protocol=protocol))
    read = read_parameters(path)["critic/x"]
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    "function", [os.system, os.remove, eval, exec, __import__, getattr, np.load, np.frombuffer, torch.load, print, dict]
)
def test_a_malicious_pickle_runs_nothing(tmp_path, function):
    victim = tmp_path / "victim"
    victim.write_text("here")
    path = tmp_path / "params_1.pkl"
    path.write_bytes(pickle.dumps(agent_with(Runs(function, f"touch {tmp_path}/ran; rm {victim}"))))
    with pytest.raises(UnsafePickleError, match=rf"asks for .*{function.__name__}.*refused"):
        read_parameters(path)
    assert victim.read_text() == "here"
    assert not (tmp_path / "ran").exists()


def test_a_call_hidden_in_a_persistent_id_or_an_object_array_is_refused(tmp_path):
    path = tmp_path / "params_1.pkl"

    class Persistent(pickle.Pickler):
        def persistent_id(self, value):
            return "elsewhere" if isinstance(value, Runs) else None

    buffer = io.BytesIO()
    Persistent(buffer).dump(agent_with(Runs(print, "x")))
    path.write_bytes(buffer.getvalue())
    with pytest.raises(UnsafePickleError, match="outside of it"):
        read_parameters(path)

    path.write_bytes(pickle.dumps(agent_with(np.array([Runs(print, "x")], dtype=object))))
    with pytest.raises(UnsafePickleError, match=r"dtype 'O8'|asks for"):
        read_parameters(path)


def hand_written(*opcodes):
    return b"\x80\x04" + b"".join(opcodes) + b"."


def named(module, name):
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # Call numpy.ndarray itself.
        (hand_written(named("numpy", "ndarray"), b")R"), "calls numpy.ndarray"),
        # Build a function with a state of one's own: (None, {"_call": ...}).
        (hand_written(named("numpy", "dtype"), b"N}\x8c\x05_call\x8c\x01xs\x86b"), "state of a function"),
        # Let JAX's rebuild call another function.
        (
            hand_written(
                named("jax._src.array", "_reconstruct_array"), b"(", named("numpy", "dtype"), b"\x8c\x02f4\x85NNtR"
            ),
            "something other than a NumPy array",
        ),
        # An array whose bytes are fewer than its shape says.
        (
            hand_written(
                named("numpy._core.multiarray", "_reconstruct"),
                b"(",
                named("numpy", "ndarray"),
                b"K\x00\x85C\x01btR(K\x01K\x64\x85",
                named("numpy", "dtype"),
                b"\x8c\x02f4\x89\x88\x87R\x89C\x04abcdtb",
            ),
            "4 bytes",
        ),
    ],
)
def test_hand_written_pickles(tmp_path, program, message):
    path = tmp_path / "params_1.pkl"
    path.write_bytes(program)
    with pytest.raises(CheckpointError, match=message):
        read_parameters(path)


def test_damaged_files(tmp_path):
    whole = (FOLDER / "params_3.pkl").read_bytes()
    path = tmp_path / "params_3.pkl"
    for content in (b"", b"not a pickle", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"params_3\.pkl is damaged or not a pickle"):
            read_parameters(path)
    path.write_bytes(pickle.dumps({"agent": {"critic": {}}}))
    with pytest.raises(CheckpointError, match="has no agent/critic/params"):
        read_parameters(path)
    path.write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError, match="not a checkpoint of the release"):
        read_parameters(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_parameters(tmp_path / "absent.pkl")


def test_arrays_that_do_not_fit_the_configuration():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    config = FOLDER / "config.json"
    less = {name: a for name, a in arrays.items() if name != "critic/value_net/LayerNorm_1/scale"}
    with pytest.raises(CheckpointError, match="lack 'critic/value_net/LayerNorm_1/scale'"):
        vgf.VGFPolicy.from_reference_parameters(less, config)
    with pytest.raises(CheckpointError, match=r"hold more .*: bc/mlp/Dense_9/kernel"):
        vgf.VGFPolicy.from_reference_parameters({**arrays, "bc/mlp/Dense_9/kernel": np.zeros(2)}, config)
    wrong = {**arrays, "bc/mlp/Dense_0/bias": np.zeros(31, np.float32)}
    with pytest.raises(CheckpointError, match=r"bc/mlp/Dense_0/bias has shape \(31,\), expected \(32,\)"):
        vgf.VGFPolicy.from_reference_parameters(wrong, config)


def test_without_a_target_critic_it_is_a_copy():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    arrays = {name: a for name, a in arrays.items() if not name.startswith("target_critic")}
    policy = vgf.VGFPolicy.from_reference_parameters(arrays, FOLDER / "config.json")
    for ours, target in zip(policy.critic.parameters(), policy.target_critic.parameters(), strict=True):
        assert torch.equal(ours, target)


def test_gaussian_behavior_of_the_release():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    arrays = {name: a for name, a in arrays.items() if not name.startswith("bc/")}
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    arrays |= {
        "bc/actor_net/Dense_0/kernel": normal(11, 32),
        "bc/actor_net/Dense_0/bias": normal(32),
        "bc/actor_net/Dense_1/kernel": normal(32, 32),
        "bc/actor_net/Dense_1/bias": normal(32),
        "bc/mean_net/kernel": normal(32, 3),
        "bc/mean_net/bias": normal(3),
        "bc/log_stds": normal(3),
    }
    config = {**json.loads((FOLDER / "config.json").read_text()), "bc_policy_type": "gau", "bc_use_tanh": True}
    policy = vgf.VGFPolicy.from_reference_parameters(arrays, config)
    observations = normal(5, 11)
    h = observations
    for i in range(2):
        h = np.maximum(h @ arrays[f"bc/actor_net/Dense_{i}/kernel"] + arrays[f"bc/actor_net/Dense_{i}/bias"], 0)
    mean = h @ arrays["bc/mean_net/kernel"] + arrays["bc/mean_net/bias"]
    noise = normal(5, 10, 3)
    expected = np.tanh(mean[:, None] + np.exp(arrays["bc/log_stds"]) * noise)
    particles = policy.draw_particles(torch.from_numpy(observations), torch.from_numpy(noise))
    np.testing.assert_allclose(particles.numpy(), expected, atol=1e-5)


def test_config_from_reference():
    policy, train = vgf.config_from_reference(
        {"ob_dims": (11,), "action_dim": 3, "critic_loss": "sql-q", "train_particle_select": "max", "vgf_alpha": 0.5}
    )
    assert (policy.behavior_steps, policy.particles, policy.train_budget) == (5, 10, vgf.TransportBudget(1, 0.1, 0.5))
    assert policy.bandwidth_gradient
    assert not vgf.VGFConfig(observation_dim=1, action_dim=1).bandwidth_gradient
    assert (train.critic_loss, train.target_reduce, train.discount) == ("sql", "max", 0.99)
    with pytest.raises(ValueError, match="'vgf_aplha' \\(did you mean 'vgf_alpha'\\?\\)"):
        vgf.config_from_reference({"ob_dims": (11,), "action_dim": 3, "vgf_aplha": 0.5})
    with pytest.raises(ValueError, match="no 'action_dim'"):
        vgf.config_from_reference({"ob_dims": (11,)})
    with pytest.raises(ValueError, match="pixel encoders"):
        vgf.config_from_reference({"ob_dims": (64, 64, 3), "action_dim": 3, "encoder": "impala_small"})
    with pytest.raises(ValueError, match="agent_name is 'fql', expected one of 'vgf', 'avgf'$"):
        vgf.config_from_reference({"ob_dims": (11,), "action_dim": 3, "agent_name": "fql"})


def with_critics(arrays, count):
    """The release's arrays with another number of critics."""
    return {name: np.concatenate([array] * 3)[:count] if "critic/" in name else array for name, array in arrays.items()}


@pytest.mark.parametrize("members", [1, 5])
def test_the_arrays_tell_how_many_critics_there_are(members):
    arrays = with_critics(read_parameters(FOLDER / "params_3.pkl"), members)
    policy = vgf.VGFPolicy.from_reference_parameters(arrays, FOLDER / "config.json")
    assert policy.config.members == members
    assert len(policy.critic.weights[0]) == len(policy.target_critic.weights[0]) == members
    assert policy.sample_actions(torch.zeros(11)).isfinite().all()


def test_critics_that_disagree_about_their_number():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    five = with_critics(arrays, 5)
    mixed = {name: (five if name.startswith("critic/") else arrays)[name] for name in arrays}
    with pytest.raises(
        CheckpointError, match=r"disagree about the number of critics: 5 in critic/.*2 in target_critic/"
    ):
        vgf.VGFPolicy.from_reference_parameters(mixed, FOLDER / "config.json")
    with pytest.raises(CheckpointError, match="have no critics: critic/ is empty"):
        vgf.VGFPolicy.from_reference_parameters({}, FOLDER / "config.json")


def test_arrays_of_another_byte_order_and_numbers_that_are_none():
    arrays = read_parameters(FOLDER / "params_3.pkl")
    config = FOLDER / "config.json"
    policy = vgf.VGFPolicy.from_reference_parameters(arrays, config)
    foreign = {name: array.astype(">f8")[::-1][::-1] for name, array in arrays.items()}
    same = vgf.VGFPolicy.from_reference_parameters(foreign, config)
    assert all(map(torch.equal, policy.parameters(), same.parameters()))
    foreign["bc/mlp/Dense_0/bias"][3] = 1e300
    with pytest.raises(CheckpointError, match="bc/mlp/Dense_0/bias has values that are not finite in torch.float32"):
        vgf.VGFPolicy.from_reference_parameters(foreign, config)
