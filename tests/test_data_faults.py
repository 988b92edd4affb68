"""Data that is odd, files and disks that fail: the right transitions, or an error that names what is wrong."""

import errno
import os
import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vgf_fast import Learner, VGFConfig, VGFPolicy
from vgf_fast.common import checkpoints
from vgf_fast.data import files
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.download import download
from vgf_fast.data.files import load
from vgf_fast.data.replay import ReplayBuffer

h5py = pytest.importorskip("h5py")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = 20


def make(rows=ROWS, observation=3, action=2, seed=0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(rows + 1, observation)).astype(np.float32)
    return {
        "observations": states[:-1],
        "actions": rng.uniform(-1, 1, (rows, action)).astype(np.float32),
        "next_observations": states[1:].copy(),
        "rewards": np.arange(rows, dtype=np.float32),
        "masks": np.ones(rows, np.float32),
    }


def write_hdf5(path, arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def write_parquet(path, columns):
    parquet.write_table(pyarrow.table(columns), path)
    return path


def lists(arrays):
    return {name: array.tolist() for name, array in arrays.items()}


def assert_same(found, arrays):
    expected = Dataset.from_arrays(**arrays, dtype=found.dtype)
    for name in (*files.FIELDS, "terminals"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# --- ragged lists ---


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list])
@pytest.mark.parametrize("chunk", [files.CHUNK_BYTES, 8 * 3 * 4])
def test_ragged_lists_are_refused_though_their_sum_fits(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(files, "CHUNK_BYTES", chunk)
    columns = lists(make())
    columns["observations"][5] = [0.0, 1.0]
    columns["observations"][6] = [2.0, 3.0, 4.0, 5.0]
    columns["observations"] = pyarrow.array(columns["observations"], kind(pyarrow.float32()))
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError, match="observations has a list of 2 numbers in row 5, expected 3 as in row"):
        load(path)


def test_lists_of_fixed_length(tmp_path):
    arrays = make()
    columns = lists(arrays)
    columns["observations"] = pyarrow.array(columns["observations"], pyarrow.list_(pyarrow.float32(), 3))
    assert_same(load(write_parquet(tmp_path / "a.parquet", columns)), arrays)


# --- which file a mapped one was made of ---


def test_files_that_only_content_tells_apart_have_mapped_files_of_their_own(tmp_path):
    loaded = []
    for folder, seed in (("a", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "data.npz"
        np.savez(path, **make(seed=seed))
        os.utime(path, (1, 1))
        loaded.append(load(path, memory_share=0.0, cache_dir=tmp_path / "cache"))
    # The same place, size and time, other content.
    np.savez(path, **make(seed=2))
    os.utime(path, (1, 1))
    loaded.append(load(path, memory_share=0.0, cache_dir=tmp_path / "cache"))
    for seed, dataset in enumerate(loaded):
        assert_same(dataset, make(seed=seed))


def test_a_large_file_is_known_by_its_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HASHED_PARTS", 4, raising=False)
    monkeypatch.setattr(files, "HASHED_BYTES", 64, raising=False)
    path = tmp_path / "data.npz"
    for seed in (0, 1):
        np.savez(path, **make(seed=seed))
        os.utime(path, (1, 1))
        assert_same(load(path, memory_share=0.0), make(seed=seed))


def test_a_download_goes_on_only_with_what_came_from_its_address(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"

    class Answer:
        status, headers = 206, {}

        def __init__(self, content):
            self.content = [content]

        def read(self, count):
            if self.content:
                return self.content.pop()
            raise ConnectionResetError("reset")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    asked = []
    monkeypatch.setattr(
        "vgf_fast.data.download.urlopen", lambda request, timeout: asked.append(request) or Answer(b"one")
    )
    for url in ("http://one/a.bin", "http://two/a.bin"):
        with pytest.raises(ConnectionError, match="reset"):
            download(url, file)
    assert [request.headers.get("Range") for request in asked] == [None, None]


# --- numbers that are none, in the precision in which they are used ---


def test_another_dtype_makes_no_infinity():
    arrays = make()
    arrays["rewards"][7] = 1e6
    dataset = Dataset.from_arrays(**arrays)
    with pytest.raises(ValueError, match=r"rewards holds 1000000 in row 7, expected finite numbers in torch.float16"):
        dataset.to(dtype=torch.float16)
    assert dataset.to(dtype=torch.bfloat16).rewards.isfinite().all()


@pytest.mark.parametrize("name", ["observations", "rewards", "masks", "terminals"])
def test_masked_arrays(name):
    arrays = {**make(), "terminals": np.zeros(ROWS, bool)}
    plain = np.ma.masked_array(arrays[name])
    assert_same(Dataset.from_arrays(**{**arrays, name: plain}), arrays)
    masked = np.ma.masked_array(arrays[name], np.zeros(arrays[name].shape, bool))
    masked[4] = np.ma.masked
    with pytest.raises(ValueError, match=rf"{name} has [13] masked entr.*, the first at \[4.*fill or drop them"):
        Dataset.from_arrays(**{**arrays, name: masked})


def test_masks_are_checked_as_they_are_stored():
    arrays = make()
    arrays["masks"] = arrays["masks"].astype(np.float64)
    arrays["masks"][2] = 1 + 1e-12
    assert Dataset.from_arrays(**arrays).masks.max() == 1
    arrays["masks"][2] = 1 + 1e-6
    with pytest.raises(ValueError, match=r"masks holds 1.000001 in row 2, expected in \[0, 1\]"):
        Dataset.from_arrays(**arrays)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": 5.0}, r"mask is 5, expected in \[0, 1\]"),
        ({"mask": -1.0}, r"mask is -1, expected in \[0, 1\]"),
        ({"reward": 1e6}, "reward has NaN or infinity in torch.float16"),
        ({"action": [np.inf]}, "action has NaN or infinity"),
        ({"observation": np.ma.masked_array([1.0, 2.0], [0, 1])}, "observation has 1 masked entries"),
    ],
)
def test_what_an_online_transition_may_not_hold(changes, message):
    buffer = ReplayBuffer(3, 2, 1, dtype=torch.float16)
    good = {"observation": [1, 2], "action": [0.5], "next_observation": [2, 3], "reward": 0.0, "mask": 1.0}
    with pytest.raises(ValueError, match=message):
        buffer.add(**{**good, **changes})
    assert buffer.size == 0


def test_d4rl_rewards_are_checked_in_float32(tmp_path):
    from vgf_fast.data import d4rl

    arrays = {
        "observations": np.zeros((8, 11)), "actions": np.zeros((8, 3)), "rewards": np.arange(8.0),
        "terminals": np.arange(8) % 4 == 3,
    }  # fmt: skip
    arrays["rewards"][2] = 1e300
    path = write_hdf5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(ValueError, match="a.hdf5: rewards has NaN or infinity in row 2"):
        d4rl.load("hopper-medium-v2", path)


# --- several processes ---


def test_who_comes_second_takes_what_the_first_one_mapped(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    np.savez(path, **make())
    check, second, others = files.check_column, [], []

    def meanwhile(*given):
        if not others:
            others.append(threading.Thread(target=lambda: second.append(load(path, memory_share=0.0, progress=False))))
            others[0].start()
            others[0].join(0.5)
        check(*given)

    fills = []
    fill = files._fill
    monkeypatch.setattr(files, "_fill", lambda *given: fills.append(0) or fill(*given))
    monkeypatch.setattr(files, "check_column", meanwhile)
    first = load(path, memory_share=0.0, progress=False)
    others[0].join(30)
    assert len(fills) == 1
    for dataset in (first, *second):
        assert_same(dataset, make())
    assert len(second) == 1
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npz", ".transitions"]


def test_who_downloads_second_waits_for_the_first(tmp_path, monkeypatch):
    file, others, asked = tmp_path / "a.bin", [], []

    class Answer:
        status, headers = 200, {"Content-Length": "3"}

        def __init__(self):
            self.content = [b"one"]

        def read(self, count):
            if not others:
                others.append(threading.Thread(target=download, args=("http://one/a.bin", file, False)))
                others[0].start()
                others[0].join(0.5)
            return self.content.pop() if self.content else b""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("vgf_fast.data.download.urlopen", lambda request, timeout: asked.append(0) or Answer())
    download("http://one/a.bin", file, False)
    others[0].join(30)
    assert (file.read_bytes(), len(asked)) == (b"one", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_lock_does_not_outlive_its_holder(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **make())
    program = (
        "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(60)"
    )
    key = files._key(files.open_source(path), torch.float32, files.ACTION_CLIP, None)
    file = tmp_path / f"data.npz.{key}.transitions"
    lock = file.with_name(f".{file.name}.lock")
    with subprocess.Popen([sys.executable, "-c", program, lock], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    assert_same(load(path, memory_share=0.0), make())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.npz", file.name]


def test_what_another_process_generated_meanwhile_is_not_replaced(tmp_path):
    from vgf_fast.envs.generate import _write

    path = tmp_path / "a.npz"
    path.write_bytes(b"another's")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        _write({path: {"a": np.zeros(3)}}, False)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.npz", b"another's")]


# --- disks ---


def test_a_full_disk_says_how_much_is_missing_and_keeps_nothing(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    np.savez(path, **make())

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**8))
    with pytest.raises(OSError, match=r"copy of data.npz takes 7.45e-07 GiB .*5.07e-07 GiB are missing") as caught:
        load(path, memory_share=0.0)
    assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_a_file_size_limit_is_met_before_anything_is_mapped(tmp_path):
    np.savez(tmp_path / "data.npz", **make(3000))
    program = (
        "import sys; from vgf_fast.data.files import load\n"
        "try: load(sys.argv[1], memory_share=0.0)\n"
        "except OSError as error: print(type(error).__name__, error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "data.npz"], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "cannot be written" in result.stdout
    assert "File too large" in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["data.npz"]


def test_a_download_that_has_no_room_is_no_server_that_is_away(tmp_path, monkeypatch):
    class Answer:
        status, headers = 200, {"Content-Length": str(2**50)}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("vgf_fast.data.download.urlopen", lambda request, timeout: Answer())
    with pytest.raises(OSError, match=r"takes 1.05e\+06 GiB: 1.0\de\+06 GiB are missing: .*a.bin") as caught:
        download("http://one/a.bin", tmp_path / "a.bin")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


# --- what is not damage ---


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(tmp_path, device):
    path = tmp_path / "data.npz"
    np.savez(path, **make())
    for call in (
        lambda: load(path, device=device),
        lambda: Dataset.from_arrays(**make(), device=device),
        lambda: Dataset.from_arrays(**make()).to(device),
        lambda: ReplayBuffer(3, 2, 1, device=device),
    ):
        with pytest.raises(
            ValueError, match=f"device is '{device}', which (transitions cannot lie on|cannot be used here)"
        ):
            call()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    path, taken = tmp_path / "data.npz", tmp_path / "taken"
    np.savez(path, **make())
    taken.write_text("a file")
    with pytest.raises(OSError, match=r"mapped copy .* give another folder as cache_dir.*taken"):
        load(path, memory_share=0.0, cache_dir=taken)


def refuse(*given, **options):
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("suffix", ["npz", "hdf5", "parquet"])
def test_a_file_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch, suffix):
    from vgf_fast.data import d4rl

    path = tmp_path / f"data.{suffix}"
    path.write_bytes(b"anything")
    for module, name in (("zipfile", "ZipFile"), ("h5py", "File"), ("pyarrow.parquet", "ParquetFile")):
        monkeypatch.setattr(f"{module}.{name}", refuse)
    with pytest.raises(PermissionError, match=rf"cannot be read: Permission denied: .*data.{suffix}"):
        load(path)
    if suffix == "hdf5":
        with pytest.raises(PermissionError, match=r"cannot be read: Permission denied: .*data.hdf5"):
            d4rl.load("hopper-medium-v2", path)


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(tmp_path, monkeypatch):
    from vgf_fast.reference_checkpoint import read_parameters

    path = tmp_path / "model.safetensors"
    checkpoints.save_tensors(path, "policy", {"a": torch.zeros(2)}, {})
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    for read in (lambda: checkpoints.load_tensors(path, "policy"), lambda: read_parameters(path)):
        with pytest.raises(PermissionError, match="Permission denied"):
            read()


def test_what_does_not_fit_says_how_much_it_takes(tmp_path):
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 3), np.float32))
    import zipfile

    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name, width in (
            ("observations", 3),
            ("actions", 2),
            ("next_observations", 3),
            ("rewards", 0),
            ("masks", 0),
        ):
            with archive.open(f"{name}.npy", "w") as stream:
                shape = (2**45, width) if width else (2**45,)
                np.lib.format.write_array_header_1_0(stream, {**header, "shape": shape})
    with pytest.raises(OSError, match=r"mapped copy of data.npz takes 1.31e\+06 GiB"):
        load(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=r"numbers in torch.float32 need at least 1,310,720.0 GiB, and cpu has"):
        files.allocate(2**45, 10, torch.float32, torch.device("cpu"))


# --- dict observations ---


def write_goal(path, arrays, suffix):
    """Observations as dicts: the first two numbers, and the rest."""
    if suffix == "parquet":
        columns = lists(arrays)
        for name in ("observations", "next_observations"):
            columns[name] = [{"goal": row[2], "observation": row[:2]} for row in columns[name]]
        return write_parquet(path, columns)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if name in ("observations", "next_observations"):
                file[f"{name}/goal"], file[f"{name}/observation"] = array[:, 2], array[:, :2]
            else:
                file[name] = array
    return path


@pytest.mark.parametrize("suffix", ["hdf5", "parquet"])
def test_dict_observations_are_chosen_by_their_keys(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(files, "CHUNK_BYTES", 8 * 3 * 7)
    arrays = make()
    path = write_goal(tmp_path / f"a.{suffix}", arrays, suffix)
    message = (
        r"observations is a dict of goal, observation: choose .* observation_keys=\('goal', 'observation'\) of "
        "vgf_fast.data.files.load"
    )
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match="observations is a dict of goal, observation, expected pixels among them"):
        load(path, observation_keys=("pixels",))
    assert_same(load(path, observation_keys=("observation", "goal")), arrays)
    goals = {name: arrays[name][:, 2:] if "obs" in name else arrays[name] for name in arrays}
    assert_same(load(path, observation_keys=("goal",), memory_share=0.0), goals)
    assert_same(load(path, observation_keys=("observation", "goal"), memory_share=0.0), arrays)


def test_other_groups_are_named(tmp_path):
    from vgf_fast.data import d4rl

    arrays = make()
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[f"{name}/left" if name == "actions" else name] = array
        file["terminals"] = np.zeros(ROWS)
    with pytest.raises(ValueError, match="actions is a dict of left, expected one array"):
        load(path)
    with pytest.raises(ValueError, match="actions is a group of left, expected one array"):
        d4rl.load("hopper-medium-v2", path)


# --- nested without end ---


def shared(depth):
    tree = {}
    for _ in range(depth):
        tree = {"a": tree, "b": tree}
    return tree


def cyclic():
    tree = {}
    tree["a"] = tree
    return tree


@pytest.mark.parametrize(
    ("tree", "message"),
    [(cyclic(), "a dict in more than one place"), (shared(100), "a dict in more than one place"),
     ([1], "has no agent/critic/params"), ({(): {}}, "has a tuple as key, expected names")],
)  # fmt: skip
def test_release_checkpoints_that_have_no_end_are_refused(tmp_path, tree, message):
    from vgf_fast.reference_checkpoint import CheckpointError, read_parameters

    path = tmp_path / "params_1.pkl"
    agent = {"critic": {"params": tree} if isinstance(tree, dict) else tree}
    path.write_bytes(pickle.dumps({"agent": agent}))
    with pytest.raises(CheckpointError, match=f"params_1.pkl.*{message}"):
        read_parameters(path)


def test_a_deep_release_checkpoint_needs_no_deep_stack(tmp_path):
    from vgf_fast.reference_checkpoint import read_parameters

    # Written by hand, because the pickler itself recurses.
    path = tmp_path / "params_1.pkl"
    body = b"}\x8c\x01a" * 5000 + b"}" + b"s" * 5000
    states = b"".join(
        b"\x8c" + bytes([len(name)]) + name + b"}\x8c\x06params" + body + b"ss"
        for name in (b"critic", b"target_critic", b"actor_bc")
    )
    path.write_bytes(b"\x80\x04}\x8c\x05agent}" + states + b"s.")
    assert read_parameters(path) == {}


# --- arrays ---


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a.astype(np.longdouble),
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: np.broadcast_to(a, a.shape),
        lambda a: np.lib.recfunctions.unstructured_to_structured(np.c_[a, a], np.dtype("f4,u1"))["f0"],
    ],
    ids=["reversed", "big-endian", "long double", "fortran", "strided", "read-only", "odd strides"],
)
def test_arrays_of_any_layout(change):
    import numpy.lib.recfunctions  # noqa: F401

    arrays = make()
    found = Dataset.from_arrays(**{**arrays, "rewards": change(arrays["rewards"])})
    assert_same(found, arrays)
    index = np.arange(ROWS)
    if change(index).dtype.kind == "i":
        assert torch.equal(found.take(change(index))["rewards"], found.rewards)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, bool, ">i4"])
def test_rewards_masks_and_terminals_of_any_real_dtype(dtype):
    arrays = make()
    ones = np.ones(ROWS, dtype)
    found = Dataset.from_arrays(**{**arrays, "rewards": ones, "masks": ones}, terminals=ones)
    assert found.rewards.eq(1).all()
    assert found.masks.eq(1).all()
    assert found.terminals.all()


def test_numpy_scalars_are_numbers():
    buffer = ReplayBuffer(np.int64(3), np.int32(2), np.uint8(1))
    buffer.add(np.arange(2)[::-1], np.array([1], ">f4"), torch.tensor([1, 2]), np.float32(3), np.bool_(True))
    batch = buffer.sample(np.int64(4))
    assert batch["rewards"].eq(3).all()
    assert batch["observations"][0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        buffer.sample(0)
    Dataset.from_arrays(**make(), action_clip=np.float32(0.5))


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, ::-1].copy()[:, ::-1],
        lambda a: a.astype(">f4"),
        lambda a: a.astype(np.longdouble),
        lambda a: np.broadcast_to(a, a.shape),
    ],
    ids=["reversed", "big-endian", "long double", "read-only"],
)
def test_a_policy_and_a_learner_take_arrays_of_any_layout(change):
    config = VGFConfig(3, 2, hidden_dims=(8,), behavior_hidden_dims=(8,), particles=3, behavior_steps=2)
    arrays = make(4)
    found = []
    for given in (arrays, {name: change(array) if array.ndim == 2 else array for name, array in arrays.items()}):
        policy = VGFPolicy(config, seed=0)
        found.append(policy.sample_actions(given["observations"]))
        found.append(Learner(policy).update(given)["critic_loss"])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_a_policy_refuses_masked_entries():
    policy = VGFPolicy(VGFConfig(3, 2, hidden_dims=(8,), behavior_hidden_dims=(8,)))
    with pytest.raises(ValueError, match=r"observations has 1 masked entries, the first at \[1\]"):
        policy.sample_actions(np.ma.masked_array([1.0, 2.0, 3.0], [0, 1, 0]))


@pytest.mark.parametrize("given", [torch.zeros(ROWS).to_sparse(), torch.zeros(ROWS, device="meta")])
def test_tensors_without_values_of_their_own(given):
    with pytest.raises(TypeError, match=r"rewards (has layout|is on the meta device)"):
        Dataset.from_arrays(**{**make(), "rewards": given})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, "float32", np.float32])
def test_a_dtype_that_nothing_computes_in(dtype):
    for call in (
        lambda: Dataset.from_arrays(**make(), dtype=dtype),
        lambda: Dataset.from_arrays(**make()).to(dtype=dtype),
        lambda: ReplayBuffer(3, 2, 1, dtype=dtype),
    ):
        with pytest.raises(TypeError, match=r"dtype is .*, expected a floating dtype of torch: torch.float16"):
            call()


# --- what surrounds a call changes nothing ---


@pytest.mark.parametrize(
    "ambient",
    [lambda: torch.device("meta"), lambda: torch.inference_mode(), lambda: torch.autocast("cpu", torch.bfloat16),
     lambda: torch.no_grad()],
    ids=["default device", "inference mode", "autocast", "no_grad"],
)  # fmt: skip
def test_ambient_state_changes_no_data(tmp_path, ambient):
    arrays = make()
    np.savez(tmp_path / "data.npz", **arrays, terminals=np.zeros(ROWS, bool))
    with ambient():
        made = Dataset.from_arrays(**arrays)
        loaded = [load(tmp_path / "data.npz", memory_share=share) for share in (0.0, 1.0)]
        buffer = ReplayBuffer.of(made, 3)
        buffer.add(np.zeros(3), np.zeros(2), np.zeros(3), 1.0, 1.0)
        drawn = made.sample(4, torch.Generator("cpu").manual_seed(0))
        taken = made.take([1, 2])
        statistics = made.statistics()
        single = made.to(dtype=torch.float64)
    buffer.add(np.zeros(3), np.zeros(2), np.zeros(3), 1.0, 1.0)
    assert (buffer.device.type, buffer.size) == ("cpu", ROWS + 1)
    outside = Dataset.from_arrays(**arrays)
    assert_same(made, arrays)
    assert_same(single, {name: array.astype(np.float64) for name, array in arrays.items()} | {"actions": made.actions})
    assert all(torch.equal(one.observations, outside.observations) for one in loaded)
    assert torch.equal(drawn["rewards"], outside.sample(4, torch.Generator().manual_seed(0))["rewards"])
    assert taken["rewards"].tolist() == [1, 2]
    assert statistics == outside.statistics()


# --- nothing to see, nothing to do ---


@pytest.mark.parametrize("name", ["observations", "actions"])
@pytest.mark.parametrize("kind", ["arrays", "npz", "hdf5", "parquet", "d4rl"])
def test_fields_without_width_are_refused_alike(tmp_path, name, kind):
    from vgf_fast.data import d4rl

    arrays = make()
    for field in {"observations": ("observations", "next_observations"), "actions": ("actions",)}[name]:
        arrays[field] = np.zeros((ROWS, 0), np.float32)
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "hdf5":
        write_hdf5(path, arrays)
    elif kind == "d4rl":
        write_hdf5(path, {**arrays, "terminals": np.arange(ROWS) % 7 == 6})
    elif kind == "parquet":
        columns = lists(arrays)
        empty = pyarrow.array([[]] * ROWS, pyarrow.list_(pyarrow.float32()))
        columns |= {field: empty for field, array in arrays.items() if array.ndim == 2 and not array.shape[1]}
        write_parquet(path, columns)
    call = {
        "arrays": lambda: Dataset.from_arrays(**arrays),
        "d4rl": lambda: d4rl.load("hopper-medium-v2", path, normalize_reward=False),
    }.get(kind, lambda: load(path))
    with pytest.raises(
        ValueError, match=r"observations and actions have widths \d and \d, expected at least 1"
    ) as caught:
        call()
    assert kind == "arrays" or str(path) in str(caught.value)


# --- libraries that download ---


def test_a_minari_data_set_that_is_here_and_damaged_is_not_away(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    from vgf_fast.data import minari

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path / "a" / "b-v0" / "data").mkdir(parents=True)
    (tmp_path / "a" / "b-v0" / "data" / "metadata.json").write_text("{")
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match=r"b-v0.data"):
            minari.load("a/b-v0", folder)


def test_a_minari_download_that_has_no_room_is_no_host_that_is_away(tmp_path, monkeypatch):
    library = pytest.importorskip("minari")
    from vgf_fast.data import minari

    def full(name, download):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(library, "load_dataset", full)
    with pytest.raises(OSError, match=r"cannot be written: No space left on device: .*b-v0") as caught:
        minari.load("a/b-v0")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_an_ogbench_download_that_has_no_room_names_the_folder(tmp_path, monkeypatch):
    library = pytest.importorskip("ogbench")
    from vgf_fast.data import ogbench

    def full(names, folder):
        (tmp_path / "cube-single-play-v0.npz.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(library, "download_datasets", full)
    with pytest.raises(OSError, match=f"cube-single-play-v0 cannot be written: No space left.*{tmp_path}"):
        ogbench.load("cube-single-play-singletask-v0")
    assert list(tmp_path.iterdir()) == []
