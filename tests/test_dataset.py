"""Dataset: what is accepted, what is refused and with which words, and what sampling returns."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from properties import given, settings, st

from vgf_fast.data import Dataset

FIELDS = ("observations", "actions", "next_observations", "rewards", "masks")


def make_arrays(size: int = 12, observation_dim: int = 3, action_dim: int = 2, seed: int = 0) -> dict[str, Any]:
    """Fields in which the first observation and the reward are the number of the row."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(size, observation_dim))
    observations[:, 0] = np.arange(size)
    return {
        "observations": observations,
        "actions": rng.uniform(-0.99, 0.99, size=(size, action_dim)),
        "next_observations": rng.normal(size=(size, observation_dim)),
        "rewards": np.arange(size, dtype=np.float64),
        "masks": (np.arange(size) % 4 != 3).astype(np.float64),
        "terminals": np.arange(size) % 6 == 5,
    }


def make(**changes: Any) -> Dataset:
    return Dataset.from_arrays(**{**make_arrays(), **changes})


def with_value(name: str, row: Any, value: float) -> dict[str, np.ndarray]:
    array = make_arrays()[name].copy()
    array[row] = value
    return {name: array}


@pytest.mark.parametrize("source", [np.float16, np.float32, np.float64, torch.float32, torch.bfloat16])
def test_keeps_every_field(source: Any) -> None:
    arrays = make_arrays()
    cast = {
        name: torch.from_numpy(arrays[name]).to(source)
        if isinstance(source, torch.dtype)
        else arrays[name].astype(source)
        for name in FIELDS
    }
    dataset = Dataset.from_arrays(**cast, terminals=arrays["terminals"], dtype=torch.float64)
    for name in FIELDS:
        expected = torch.as_tensor(cast[name]).double()
        assert getattr(dataset, name).dtype == torch.float64
        assert torch.equal(getattr(dataset, name), expected), name
    assert torch.equal(dataset.terminals, torch.from_numpy(arrays["terminals"]))
    assert (len(dataset), dataset.size, dataset.observation_dim, dataset.action_dim) == (12, 12, 3, 2)
    assert dataset.device == torch.device("cpu")
    assert "size=12, observation_dim=3, action_dim=2" in repr(dataset)


def test_default_dtype_is_float32_and_arrays_are_copied() -> None:
    arrays = make_arrays()
    dataset = Dataset.from_arrays(**arrays)
    assert dataset.dtype == torch.float32
    arrays["observations"][:] = 7.0
    assert float(dataset.observations[3, 0]) == 3.0


def test_takes_read_only_reversed_strided_and_foreign_arrays() -> None:
    arrays = make_arrays()
    read_only = arrays["observations"].copy()
    read_only.flags.writeable = False
    wide = np.zeros((12, 4))
    wide[:, ::2] = arrays["actions"]
    dataset = make(
        observations=read_only,
        actions=wide[:, ::2],
        next_observations=np.ascontiguousarray(arrays["next_observations"][::-1])[::-1],
        rewards=arrays["rewards"].astype(">f8"),
    )
    for name in FIELDS:
        torch.testing.assert_close(getattr(dataset, name), torch.from_numpy(arrays[name]).float())


def test_takes_integer_rewards_and_boolean_masks() -> None:
    arrays = make_arrays()
    dataset = make(rewards=arrays["rewards"].astype(np.int64), masks=arrays["masks"].astype(bool))
    assert torch.equal(dataset.rewards, torch.arange(12.0))
    assert torch.equal(dataset.masks, torch.from_numpy(arrays["masks"]).float())


def test_clips_actions_to_the_releases_bound() -> None:
    values = np.array([[1.0, -1.0], [1.0 + 9e-6, 0.5]])
    dataset = make(**{name: make_arrays(2)[name] for name in (*FIELDS, "terminals")} | {"actions": values})
    bound = np.float32(1 - 1e-5)
    np.testing.assert_array_equal(dataset.actions.numpy(), np.array([[bound, -bound], [bound, 0.5]], np.float32))
    loose = make(
        **{name: make_arrays(2)[name] for name in FIELDS} | {"actions": values, "terminals": None}, action_clip=1
    )
    assert float(loose.actions.max()) == 1.0


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": np.zeros(11)}, ValueError, "rewards has 11 rows but observations has 12"),
        ({"terminals": np.zeros(3)}, ValueError, "terminals has 3 rows but observations has 12"),
        ({"masks": np.ones((12, 1))}, ValueError, "masks has shape (12, 1), expected (M,)"),
        ({"observations": np.zeros(12)}, ValueError, "observations has shape (12,), expected (M, width)"),
        ({"observations": np.zeros((12, 8, 8, 3))}, ValueError, "observations has shape (12, 8, 8, 3)"),
        ({"next_observations": np.zeros((12, 4))}, ValueError, "next_observations has shape (12, 4), expected (*, 3)"),
        ({"actions": np.zeros((12, 0))}, ValueError, "widths 3 and 0"),
        ({"observations": np.zeros((12, 3), np.uint8)}, TypeError, "observations has dtype uint8"),
        ({"next_observations": np.zeros((12, 3), np.int64)}, TypeError, "not supported, because"),
        ({"actions": np.zeros((12, 2), np.int32)}, TypeError, "actions has dtype int32, expected floating point"),
        ({"rewards": np.zeros(12, np.complex64)}, TypeError, "rewards has dtype complex64"),
        ({"rewards": torch.zeros(12, dtype=torch.complex64)}, TypeError, "rewards has dtype torch.complex64"),
        ({"observations": np.full((12, 3), "a")}, TypeError, "observations has dtype <U1"),
        ({"rewards": [0.0] * 12}, TypeError, "rewards is a list, expected a NumPy array or a torch tensor"),
        (with_value("observations", (5, 1), np.nan), ValueError, "observations holds nan in row 5, column 1"),
        (with_value("next_observations", (2, 0), np.inf), ValueError, "next_observations holds inf in row 2, column 0"),
        (with_value("rewards", 7, -np.inf), ValueError, "rewards holds -inf in row 7"),
        (with_value("masks", 4, np.nan), ValueError, "masks holds nan in row 4"),
        (with_value("rewards", 1, 1e300), ValueError, "expected finite numbers in torch.float32"),
        (with_value("actions", (9, 1), 1.5), ValueError, "actions holds 1.5 in row 9, column 1, expected in [-1, 1]"),
        (with_value("actions", (0, 0), -1.0001), ValueError, "actions holds -1.0001 in row 0, column 0"),
        (with_value("masks", 3, 1.5), ValueError, "masks holds 1.5 in row 3, expected in [0, 1]"),
        (with_value("masks", 3, -0.5), ValueError, "masks holds -0.5 in row 3"),
        ({"terminals": np.full(12, 2)}, ValueError, "terminals holds 2 in row 0, expected 0 or 1"),
        ({"dtype": torch.int32}, TypeError, "dtype is torch.int32"),
        ({"dtype": np.float32}, TypeError, "expected a floating dtype of torch"),
        ({"action_clip": 0.0}, ValueError, "action_clip is 0.0, expected a number in (0, 1]"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        make(**changes)
    assert "\n" not in str(raised.value)


def test_refuses_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        Dataset.from_arrays(**make_arrays(0))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    observation_dim=st.integers(1, 6),
    action_dim=st.integers(1, 5),
    batch_size=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_a_batch_is_rows_of_the_dataset(
    size: int, observation_dim: int, action_dim: int, batch_size: int, seed: int
) -> None:
    arrays = make_arrays(size, observation_dim, action_dim)
    dataset = Dataset.from_arrays(**arrays)
    batch = dataset.sample(batch_size, torch.Generator().manual_seed(seed))
    assert set(batch) == set(FIELDS)
    rows = batch["rewards"].long()
    for name in FIELDS:
        expected = torch.from_numpy(arrays[name]).float()[rows]
        assert batch[name].shape == (batch_size, *arrays[name].shape[1:])
        assert torch.equal(batch[name], expected), name


def test_the_generator_alone_decides_the_batch() -> None:
    dataset = Dataset.from_arrays(**make_arrays(1000))

    def draw(generator: torch.Generator, count: int) -> list[torch.Tensor]:
        return [dataset.sample(64, generator)["observations"] for _ in range(count)]

    generator = torch.Generator().manual_seed(3)
    first = draw(generator, 4)
    state = generator.get_state()
    following = draw(generator, 4)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, draw(torch.Generator().manual_seed(3), 4)))
    assert not torch.equal(first[0], draw(torch.Generator().manual_seed(4), 1)[0])
    resumed = torch.Generator()
    resumed.set_state(state)
    assert all(map(torch.equal, following, draw(resumed, 4)))


def test_without_a_generator_torchs_default_one_decides() -> None:
    dataset = Dataset.from_arrays(**make_arrays(1000))
    torch.manual_seed(5)
    first = dataset.sample(32)["rewards"]
    torch.manual_seed(5)
    assert torch.equal(first, dataset.sample(32)["rewards"])
    assert not torch.equal(first, dataset.sample(32)["rewards"])


def test_sampling_is_uniform_and_with_replacement() -> None:
    dataset = Dataset.from_arrays(**make_arrays(10))
    draws = 100_000
    rows = dataset.sample(draws, torch.Generator().manual_seed(0))["rewards"].long()
    counts = torch.bincount(rows, minlength=10).double()
    # Chi square with 9 degrees of freedom exceeds 33.7 once in ten thousand times.
    assert float(((counts - draws / 10) ** 2 / (draws / 10)).sum()) < 33.7
    # Successive draws are independent: the hundred pairs are uniform too; 99 degrees of freedom, once in ten thousand.
    pairs = torch.bincount(rows[0::2] * 10 + rows[1::2], minlength=100).double()
    assert float(((pairs - draws / 200) ** 2 / (draws / 200)).sum()) < 161.3


@pytest.mark.parametrize("batch_size", [0, -3])
def test_refuses_a_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}, expected at least 1"):
        make().sample(batch_size)


@pytest.mark.parametrize("batch_size", [2.0, "8", True, None])
def test_refuses_a_batch_size_that_is_no_integer(batch_size: Any) -> None:
    with pytest.raises(TypeError, match=r"batch_size is .*, expected an integer"):
        make().sample(batch_size)


def test_a_batch_is_not_a_view_of_the_dataset() -> None:
    dataset = make()
    dataset.sample(5)["rewards"].fill_(-1.0)
    dataset.take([0])["observations"].fill_(-1.0)
    assert torch.equal(dataset.rewards, torch.arange(12.0))
    assert torch.equal(dataset.observations[:, 0], torch.arange(12.0))


@pytest.mark.parametrize("index", [[3, 0, 3], np.array([3, 0, 3]), torch.tensor([3, 0, 3], dtype=torch.int32)])
def test_take(index: Any) -> None:
    batch = make().take(index)
    assert batch["rewards"].tolist() == [3.0, 0.0, 3.0]
    assert batch["actions"].shape == (3, 2)


def test_take_refuses_bad_indices() -> None:
    dataset = make()
    with pytest.raises(IndexError, match=re.escape("index holds 12, expected in [0, 12)")):
        dataset.take([0, 12])
    with pytest.raises(IndexError, match="index holds -1"):
        dataset.take([-1])
    with pytest.raises(TypeError, match=r"index has dtype torch.float32"):
        dataset.take(torch.zeros(2))
    with pytest.raises(TypeError, match=r"index has dtype torch.bool"):
        dataset.take(dataset.terminals)
    with pytest.raises(ValueError, match=re.escape("index has shape (1, 2), expected (B,)")):
        dataset.take(torch.zeros((1, 2), dtype=torch.long))


def test_to_another_dtype() -> None:
    dataset = make(dtype=torch.float64)
    single = dataset.to(dtype=torch.float32)
    assert single.dtype == torch.float32
    assert single.sample(4)["observations"].dtype == torch.float32
    assert torch.equal(single.actions, dataset.actions.float())
    assert torch.equal(single.terminals, dataset.terminals)
    assert dataset.to("cpu") is dataset
    with pytest.raises(TypeError, match=r"dtype is torch.int64"):
        dataset.to(dtype=torch.int64)


def test_statistics() -> None:
    # Rewards 0 to 11 in trajectories of six rows; masks are 0 in rows 3, 7 and 11.
    statistics = make().statistics()
    assert (statistics.transitions, statistics.trajectories) == (12, 2)
    assert (statistics.return_min, statistics.return_max) == (15.0, 51.0)
    assert (statistics.return_mean, statistics.return_std) == (33.0, 18.0)
    assert statistics.success_fraction == 1.0
    assert (statistics.reward_min, statistics.reward_max) == (0.0, 11.0)


def test_statistics_of_a_cut_trajectory_and_of_no_success() -> None:
    terminals = np.zeros(12, bool)
    terminals[4] = True
    masks = np.ones(12)
    statistics = make(terminals=terminals, masks=masks).statistics()
    assert (statistics.trajectories, statistics.success_fraction) == (2, 0.0)
    masks[2] = 0.0
    statistics = make(terminals=terminals, masks=masks).statistics()
    assert statistics.success_fraction == 0.5
    assert (statistics.return_min, statistics.return_max) == (10.0, 56.0)


def test_trajectories_are_found_without_terminals() -> None:
    states = np.random.default_rng(0).normal(size=(12, 3))
    following = np.roll(states, -1, axis=0)
    following[[4, 11]] += 1.0
    dataset = make(observations=states, next_observations=following, terminals=None)
    assert dataset.terminals.nonzero().flatten().tolist() == [4, 11]
    assert dataset.statistics().trajectories == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    dataset = make(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    batch = dataset.sample(64, generator)
    assert all(value.is_cuda for value in batch.values())
    rows = batch["rewards"].long().cpu()
    torch.testing.assert_close(
        batch["observations"].cpu(), torch.from_numpy(make_arrays()["observations"]).float()[rows]
    )
    assert dataset.statistics() == make().statistics()
    with pytest.raises(ValueError, match="generator is on cpu"):
        dataset.sample(4, torch.Generator())
    assert dataset.to("cpu").device.type == "cpu"
