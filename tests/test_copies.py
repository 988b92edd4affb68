"""A policy, a learner and their data survive copies, pickles and files, and other processes, fresh and used."""

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.replay import ReplayBuffer

OBSERVATIONS = np.linspace(-1.0, 1.0, 300, dtype=np.float32).reshape(60, 5)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved_and_loaded,
}


def made(used):
    """A learner; where ``used``, one that has acted and learned."""
    policy = vgf.VGFPolicy(vgf.VGFConfig(5, 3, hidden_dims=(32, 32), behavior_hidden_dims=(32,), selection="softmax"))
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=8))
    if used:
        policy.sample_actions(OBSERVATIONS)
        learner.update(dataset().take(range(8)))
    return learner


def dataset():
    ones = np.ones(60, np.float32)
    return Dataset.from_arrays(
        observations=OBSERVATIONS,
        actions=OBSERVATIONS[:, :3],
        next_observations=OBSERVATIONS,
        rewards=ones,
        masks=ones,
    )


def lived(learner):
    """What comes next: actions, an update, and actions again, by numbers of the generators."""
    numbers = [learner.policy.sample_actions(OBSERVATIONS)]
    learner.update(dataset().take(range(8)))
    numbers += [learner.policy.sample_actions(OBSERVATIONS), *learner.policy.parameters()]
    return [np.asarray(tensor.detach()) for tensor in numbers]


def same(found, right):
    return all(np.array_equal(one, other) for one, other in zip(found, right, strict=True))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_as_the_original(how, used):
    learner = made(used)
    twin = COPIES[how](learner)
    policy = COPIES[how](learner.policy)
    right = lived(learner)
    assert same(lived(twin), right)
    assert np.array_equal(np.asarray(policy.sample_actions(OBSERVATIONS)), right[0])


@pytest.mark.parametrize("how", COPIES)
def test_a_copys_fields_are_views_of_its_rows(how):
    twin = COPIES[how](dataset())
    twin._storage.zero_()
    assert not twin.observations.any()
    buffer = COPIES[how](ReplayBuffer.of(dataset(), 61))
    buffer.add(np.full(5, 7.0), np.zeros(3), np.zeros(5), 0.0, 0.0)
    batch = buffer.sample(500, torch.Generator().manual_seed(0))
    assert (batch["observations"] == 7.0).any()


def _in_a_process(learners, results, threads):
    if threads:
        torch.set_num_threads(threads)
    results.put([lived(learner) for learner in learners])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_goes_on_as_this_one(method):
    """After threads of this one have worked, which a forked process is without."""
    wide = vgf.VGFPolicy(vgf.VGFConfig(5, 3, hidden_dims=(256, 256), behavior_hidden_dims=(256,)))
    learners = [made(False), made(True), vgf.Learner(wide)]
    # Beforehand: PyTorch shares the parameters with a process that was spawned.
    right = [lived(copy.deepcopy(learner)) for learner in learners]
    torch.set_num_threads(2)
    try:
        copy.deepcopy(wide).sample_actions(OBSERVATIONS)
        torch.ones(2**20).sum()
        context = multiprocessing.get_context(method)
        results = context.Queue()
        threads = 1 if method == "spawn" else None
        process = context.Process(target=_in_a_process, args=(learners, results, threads), daemon=True)
        process.start()
        try:
            found = results.get(timeout=100)
        finally:
            process.kill()
            process.join()
    finally:
        torch.set_num_threads(1)
    assert all(same(one, other) for one, other in zip(found, right, strict=True))
