"""Files of one's own: equal to Dataset.from_arrays, in memory or mapped; what is wrong with them is named."""

import importlib.util

import numpy as np
import pytest
import torch
from properties import given, settings, st

from vgf_fast import Learner, VGFConfig, VGFPolicy
from vgf_fast.data import files
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.files import load

h5py = pytest.importorskip("h5py")
FORMATS = [
    "npz",
    "npz compressed",
    "hdf5",
    "hdf5 chunked",
    *(["parquet"] if importlib.util.find_spec("pyarrow") else []),
]


def make(rows=50, observation=3, action=2, seed=0, terminals=True, dtype=np.float32):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(rows + 1, observation)).astype(dtype)
    arrays = {
        "observations": states[:-1],
        "actions": rng.uniform(-1, 1, (rows, action)).astype(dtype),
        "next_observations": states[1:].copy(),
        "rewards": rng.normal(size=rows).astype(dtype),
        "masks": (rng.random(rows) < 0.9).astype(dtype),
    }
    if terminals:
        arrays["terminals"] = rng.random(rows) < 0.2
    return arrays


def write(folder, kind, arrays, name="data"):
    kind, _, option = kind.partition(" ")
    path = folder / f"{name}.{kind}"
    if kind == "npz":
        (np.savez_compressed if option else np.savez)(path, **arrays)
    elif kind == "hdf5":
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, compression="gzip" if option else None)
    else:
        import pyarrow
        import pyarrow.parquet

        columns = {key: array.tolist() if array.ndim > 1 else array for key, array in arrays.items()}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=17)
    return path


def assert_same(found, arrays):
    expected = Dataset.from_arrays(**arrays, dtype=found.dtype)
    for name in (*files.FIELDS, "terminals"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [1.0, 0.0], ids=["memory", "mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_its_arrays(tmp_path, monkeypatch, kind, share, dtype):
    # Many parts, the last one smaller.
    monkeypatch.setattr(files, "CHUNK_BYTES", 8 * 3 * 7)
    arrays = make()
    found = load(write(tmp_path, kind, arrays), memory_share=share, dtype=dtype)
    assert found.dtype == dtype
    assert_same(found, arrays)
    batch = found.sample(8, torch.Generator().manual_seed(0))
    assert torch.isfinite(batch["observations"]).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**16), st.booleans(),
    st.sampled_from(["npz", "hdf5"]), st.sampled_from([np.float32, np.float64, np.float16]), st.integers(1, 400),
)  # fmt: skip
def test_any_shape(tmp_path_factory, rows, observation, action, seed, terminals, kind, dtype, chunk):
    arrays = make(rows, observation, action, seed, terminals, dtype)
    path = write(tmp_path_factory.mktemp("any"), kind, arrays)
    before, files.CHUNK_BYTES = files.CHUNK_BYTES, chunk
    try:
        assert_same(load(path), arrays)
    finally:
        files.CHUNK_BYTES = before


def test_what_is_mapped_is_written_once_and_never_changed(tmp_path):
    arrays = make(terminals=False)
    path = write(tmp_path, "npz", arrays)
    first = load(path, memory_share=0.0, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").iterdir()
    written = (cached.stat().st_mtime_ns, cached.read_bytes())
    assert len(written[1]) == 4 * 50 * (3 + 2 + 3 + 2)
    first.rewards.zero_()
    again = load(path, memory_share=0.0, cache_dir=tmp_path / "cache")
    assert (cached.stat().st_mtime_ns, cached.read_bytes()) == written
    assert_same(again, arrays)
    # Another file of the same name is another data set.
    other = make(seed=1, terminals=False)
    write(tmp_path, "npz", other)
    assert_same(load(path, memory_share=0.0, cache_dir=tmp_path / "cache"), other)


def test_a_map_that_broke_off_is_not_taken(tmp_path, monkeypatch):
    path = write(tmp_path, "hdf5", make())
    monkeypatch.setattr(files, "check_column", lambda *given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        load(path, memory_share=0.0)
    assert [file.name for file in tmp_path.iterdir()] == ["data.hdf5"]


def test_what_is_mapped_trains(tmp_path):
    path = write(tmp_path, "npz", make())
    config = VGFConfig(3, 2, hidden_dims=(8,), behavior_hidden_dims=(8,), particles=3, behavior_steps=2)
    losses = []
    for share, dtype in ((0.0, torch.float32), (1.0, torch.float32), (0.0, torch.bfloat16)):
        learner = Learner(VGFPolicy(config, seed=0))
        losses.append(learner.fit(load(path, memory_share=share, dtype=dtype), 3, progress=False)[-1]["critic_loss"])
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == pytest.approx(losses[0], rel=0.1)


# --- what is wrong ---


def changed(**changes):
    arrays = make()
    for name, change in changes.items():
        arrays[name] = change(arrays[name].copy())
    return {name: array for name, array in arrays.items() if array is not None}


def put(row, value):
    def change(array):
        array[row] = value
        return array

    return change


@pytest.mark.parametrize("kind", ["npz", "hdf5"])
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(masks=lambda a: None, rewards=lambda a: None), "has no rewards and no masks"),
        (changed(actions=lambda a: a[:-1]), "actions has 49 rows but observations has 50"),
        (changed(observations=put(41, np.nan)), "observations holds nan in row 41, column 0"),
        (changed(rewards=put(41, np.inf)), "rewards holds inf in row 41"),
        (changed(actions=put(41, 2.0)), r"actions holds 2 in row 41, column 0, expected in \[-1, 1\]: rescale"),
        (changed(masks=put(3, 0.5 + 1)), r"masks holds 1.5 in row 3, expected in \[0, 1\]"),
        (changed(terminals=lambda a: put(7, 2)(a.astype(int))), "terminals holds 2 in row 7, expected 0 or 1"),
        (changed(observations=lambda a: a.astype(int)), "integer observations are not supported, because"),
        (changed(observations=lambda a: np.zeros((50, 4, 4, 3), np.uint8)), "pixel and integer observations are not"),
        (changed(actions=lambda a: np.zeros(50, np.int64)), "discrete actions are not supported, because"),
        (changed(next_observations=lambda a: a[:, :-1]), "next_observations has width 2, expected 3"),
        (changed(rewards=lambda a: np.zeros((50, 2))), r"rewards has shape \(50, 2\), expected \(M,\)"),
        ({name: array[:0] for name, array in make().items()}, "is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, monkeypatch, kind, arrays, message):
    monkeypatch.setattr(files, "CHUNK_BYTES", 8 * 3 * 7)
    path = write(tmp_path, kind, arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
def test_damaged_files_are_named(tmp_path, kind, cut):
    path = write(tmp_path, kind, make(400))
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError, match=r"is damaged|Parquet") as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of transitions at"):
        load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"ends in '.csv', expected one of .npz, .hdf5, .h5, .parquet"):
        load(tmp_path / "none.csv")
    path = write(tmp_path, "npz", make())
    with pytest.raises(ValueError, match=r"memory_share is 2, expected a number in \[0, 1\]"):
        load(path, memory_share=2)
    with pytest.raises(TypeError, match=r"dtype is torch.int32, expected a floating dtype"):
        load(path, dtype=torch.int32)


def test_one_episode_is_enough(tmp_path):
    arrays = make(5, terminals=False)
    assert load(write(tmp_path, "npz", arrays)).statistics().trajectories == 1
