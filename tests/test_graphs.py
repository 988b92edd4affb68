"""CUDA graphs: what is recorded, when it is recorded anew, and what happens where recording fails.

Where there is no GPU a recording is a function that runs again: keys, fixed memory and chunks are tested all the same.
"""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from launches import count_launches

import vgf_fast as vgf
import vgf_fast.learner
from vgf_fast.backends import graphs
from vgf_fast.data.dataset import Dataset

pytest.importorskip("triton")


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


CONFIG = vgf.VGFConfig(
    4,
    2,
    hidden_dims=(16,),
    behavior_hidden_dims=(16,),
    particles=3,
    behavior_steps=2,
    train_budget=vgf.TransportBudget(1),
    test_budget=vgf.TransportBudget(1),
)
TRAIN = vgf.TrainConfig(batch_size=4)


def fake_capture(function, inputs, generators):
    """Runs the function at every replay, into the memory of fixed outputs."""
    outputs: list[torch.Tensor] = []

    def replay():
        results = function(*inputs)
        if not outputs:
            outputs.extend(torch.zeros_like(result) for result in results)
        for target, result in zip(outputs, results, strict=True):
            target.copy_(result)

    return graphs.Capture(inputs, outputs, replay)


@pytest.fixture
def recorded(monkeypatch):
    """How often something was recorded, with recordings that need no GPU."""
    calls = []

    def capture(function, inputs, generators):
        calls.append(inputs)
        return fake_capture(function, inputs, generators)

    monkeypatch.setattr(graphs, "capture", capture)
    return calls


@pytest.fixture
def dataset(device):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 4, generator=generator)
    return Dataset.from_arrays(
        observations=states,
        actions=torch.rand(50, 2, generator=generator) * 2.0 - 1.0,
        next_observations=states.roll(-1, 0),
        rewards=torch.ones(50),
        masks=torch.ones(50),
        device=device,
    )


class TestCache:
    def run(self, cache, key, x, **options):
        return cache.run(key, lambda t: (t + 1.0,), (x,), **options)[0]

    def test_the_second_call_of_a_key_records(self, recorded):
        cache, x = graphs.GraphCache("work"), torch.arange(3.0)
        for factor in (1.0, 2.0, 3.0):
            assert torch.equal(self.run(cache, 1, factor * x), factor * x + 1.0)
        assert len(recorded) == 1
        self.run(cache, 2, x)
        assert len(recorded) == 1

    def test_results_outlive_the_next_replay(self, recorded):
        cache, x = graphs.GraphCache("work"), torch.arange(3.0)
        results = [self.run(cache, 1, factor * x) for factor in (1.0, 2.0, 3.0)]
        assert torch.equal(results[1], 2.0 * x + 1.0)

    def test_inputs_are_padded_alike_before_and_after_recording(self, recorded):
        cache, seen = graphs.GraphCache("work"), []

        def function(t):
            seen.append(t.shape)
            return (t + 1.0,)

        for rows in (3, 2, 4):
            x = torch.arange(float(rows))
            assert torch.equal(cache.run(1, function, (x,), rows=4)[0][:rows], x + 1.0)
        assert set(seen) == {(4,)}

    def test_the_oldest_is_forgotten(self, recorded):
        cache, x = graphs.GraphCache("work", limit=2), torch.arange(3.0)
        for key in (1, 1, 2, 2, 1, 3):
            self.run(cache, key, x)
        assert len(recorded) == 2
        self.run(cache, 1, x)
        assert len(recorded) == 2
        for _ in range(2):
            self.run(cache, 2, x)
        assert len(recorded) == 3

    def test_failure_is_said_once_and_leaves_no_graph(self, monkeypatch, caplog):
        def capture(function, inputs, generators):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(graphs, "capture", capture)
        cache, x = graphs.GraphCache("acting"), torch.arange(3.0)
        for _ in range(4):
            assert torch.equal(self.run(cache, 1, x), x + 1.0)
        (record,) = caplog.records
        assert "acting runs without a CUDA graph" in record.message
        assert "not permitted when stream is capturing" in record.message

    def test_a_copy_is_empty(self, recorded):
        cache, x = graphs.GraphCache("work", limit=3), torch.arange(3.0)
        self.run(cache, 1, x)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert (other.work, other.limit) == ("work", 3)
            self.run(other, 1, x)
            assert recorded == []


def train(dataset, device, steps, **options):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG, device=device, backend="triton"), TRAIN, **options)
    records = learner.fit(dataset, steps, log_interval=3, progress=False)
    return learner, records


def test_fit_by_replays_gives_the_same(dataset, device, recorded, monkeypatch):
    monkeypatch.setattr(vgf_fast.learner, "UPDATES_PER_REPLAY", 2)
    plain, plain_records = train(dataset, device, 9, cuda_graph=False)
    assert recorded == []
    monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self: True)
    learner, records = train(dataset, device, 9)
    # Two at a time and one at a time, to the logs after 3, 6 and 9 updates.
    assert len(recorded) == 2
    assert records == plain_records
    assert [record["step"] for record in records] == [3, 6, 9]
    assert torch.equal(learner.generator.get_state(), plain.generator.get_state())
    for ours, theirs in zip(learner.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Streams:
    """Fake streams of a GPU, on which everything is done at once: what was issued where, and who waited for whom."""

    def __init__(self, monkeypatch):
        self.log, self.current = [], "main"
        streams = self

        class Stream:
            def __init__(self, device=None, name=None):
                self.name = name or "side"

            def wait_stream(self, other):
                streams.log.append((self.name, "waits for", other.name))

        @contextlib.contextmanager
        def stream(one):
            before, streams.current = streams.current, one.name
            yield
            streams.current = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(name=streams.current))
        fork = graphs.fork
        monkeypatch.setattr(graphs, "fork", lambda device, work: fork(torch.device("cuda"), work))

    def launched(self, name):
        self.log.append((self.current, "launches", name))


def test_branches_of_a_pipelined_fit(dataset, monkeypatch):
    """The behaviour model's step and the next particles on one stream, the critic's flow and step on the other."""
    monkeypatch.setattr(vgf_fast.learner, "UPDATES_PER_REPLAY", 2)
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG, backend="triton"), TRAIN)
    monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self: True)
    streams = Streams(monkeypatch)
    with count_launches(streams.launched):
        learner._updates(dataset, 2)
    fork, join = ("side", "waits for", "main"), ("main", "waits for", "side")
    assert [entry for entry in streams.log if entry[1] == "waits for"] == [fork, join, fork, join]
    places = [i for i, entry in enumerate(streams.log) if entry in (fork, join)]
    parts = [streams.log[i:j] for i, j in itertools.pairwise([0, *places, len(streams.log)])]
    launches = [
        {name: [what for *where, what in part if where == [name, "launches"]] for name in ("main", "side")}
        for part in parts
    ]
    # Before the first fork its particles are drawn; after a join nothing is left to do but for the next update.
    assert launches[0]["main"][0] == "packing_kernel"
    assert "euler_kernel" in launches[0]["main"]
    assert [launches[i]["side"] for i in (0, 2, 4)] == [[]] * 3
    for update, (now, is_last) in enumerate(((launches[1], False), (launches[3], True))):
        step = now["side"].index("weight_gradient_kernel")
        assert "euler_kernel" not in now["side"][:step], update
        # The next particles come from the weights after the step.
        assert now["side"][step + 1 :] == ([] if is_last else launches[0]["main"]), update
        assert "euler_kernel" not in now["main"], update
        assert now["main"].count("flow_step_kernel") == 2, update
        assert now["main"][-1] == "weight_gradient_kernel", update


def test_branches_may_run_in_either_order(dataset, monkeypatch):
    """Numbers do not depend on whether a branch is through before the other begins, or begins after its end."""
    monkeypatch.setattr(vgf_fast.learner, "UPDATES_PER_REPLAY", 3)
    monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self: True)
    results = []
    # On the CPU a fork does its work at once; the other is the work itself, done when its result is asked for.
    for fork in (graphs.fork, lambda device, work: work):
        monkeypatch.setattr(graphs, "fork", fork)
        learner = vgf.Learner(vgf.VGFPolicy(CONFIG, backend="triton"), TRAIN)
        metrics = learner._updates(dataset, 3)
        results.append([*metrics.values(), *learner.policy.parameters(), learner.generator.get_state()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_pipelined_fit_resumes_exactly(dataset, monkeypatch, tmp_path):
    """Nothing drawn ahead is left over: saved between replays, resumed with or without them."""
    monkeypatch.setattr(vgf_fast.learner, "UPDATES_PER_REPLAY", 2)
    whole = vgf.Learner(vgf.VGFPolicy(CONFIG, backend="triton"), TRAIN)
    whole.fit(dataset, 3, progress=False)
    for pipelined in (True, False):
        monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self, pipelined=pipelined: pipelined)
        first = vgf.Learner(vgf.VGFPolicy(CONFIG, backend="triton"), TRAIN)
        first.fit(dataset, 2, progress=False)
        first.save(tmp_path)
        monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self, pipelined=pipelined: not pipelined)
        second = vgf.Learner.resume(tmp_path, backend="triton")
        second.fit(dataset, 1, progress=False)
        for ours, theirs in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
            assert torch.equal(ours, theirs)


class TestFailedRecording:
    """With a fake of CUDA's part, as PyTorch leaves it where the driver breaks a recording off."""

    class Generator:
        state = "free"

        def clone_state(self):
            return self.state

        def graphsafe_set_state(self, state):
            self.state = state

    @pytest.fixture
    def cuda(self, monkeypatch):
        calls = []

        class Graph:
            def register_generator_state(self, generator):
                generator.state = "recording"

            def reset(self):
                calls.append("reset")
                raise RuntimeError("an illegal state")

        class Recording:
            def __init__(self, graph, capture_error_mode):
                calls.append(capture_error_mode)

            def __enter__(self):
                calls.append("side stream")

            def __exit__(self, *error):
                raise RuntimeError("operation failed due to a previous error during capture")

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "main stream")
        monkeypatch.setattr(torch.cuda, "set_stream", calls.append)
        return calls

    def test_stream_and_generators_are_as_before(self, cuda, caplog):
        generator, cache = self.Generator(), graphs.GraphCache("training")
        for _ in range(3):
            (result,) = cache.run(1, lambda t: (t + 1.0,), (torch.ones(2),), generators=[generator])
            assert torch.equal(result, torch.full((2,), 2.0))
            assert generator.state == "free"
        assert cuda == ["thread_local", "side stream", "main stream", "reset"]
        (record,) = caplog.records
        assert "training runs without a CUDA graph" in record.message


def test_fit_records_anew_when_something_has_moved(dataset, device, recorded, monkeypatch):
    monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self: True)
    learner, _ = train(dataset, device, 3)
    assert len(recorded) == 1
    learner.fit(dataset, 2, progress=False)
    assert len(recorded) == 1
    weight = learner.policy.critic.weights[0]
    weight.data = weight.data.clone()
    learner.fit(dataset, 2, progress=False)
    assert len(recorded) == 2


def test_updates_by_replays_give_the_same(dataset, device, recorded, monkeypatch):
    """A batch of the caller's is copied to where the recording reads it; given noise is not recorded."""
    noise = {"particles": torch.ones(4, 3, 2), "bc_x0": torch.ones(4, 2), "bc_t": torch.full((4, 1), 0.5)}
    noise = {name: tensor.to(device) for name, tensor in noise.items()}
    histories = []
    for flag in (False, True):
        monkeypatch.setattr(vgf.Learner, "_can_capture", lambda self, flag=flag: flag)
        learner = vgf.Learner(vgf.VGFPolicy(CONFIG, device=device, backend="triton"), TRAIN)
        batches = [dataset.take(torch.arange(4) + 4 * i) for i in range(4)]
        history = [learner.update(batch) for batch in batches] + [learner.update(batches[0], noise)]
        histories.append([{name: value.item() for name, value in metrics.items()} for metrics in history])
        assert learner.step == 5
    assert len(recorded) == 1
    assert histories[0] == histories[1]


@pytest.mark.parametrize("selection", ["max", "softmax"])
def test_acting_by_replays_gives_the_same(device, recorded, monkeypatch, selection):
    """Batches of three and four states share a recording, padded to four."""
    policy = vgf.VGFPolicy(CONFIG, device=device, backend="triton")
    states = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    actions = []
    for flag in (False, True):
        monkeypatch.setattr(vgf.VGFPolicy, "_can_capture", lambda self, flag=flag: flag)
        generator = torch.Generator(device).manual_seed(0)
        actions.append(
            [policy.sample_actions(states[:n], generator=generator, selection=selection) for n in (3, 4, 3, 1)]
        )
    assert len(recorded) == 1
    for plain, graphed in zip(*actions, strict=True):
        assert torch.equal(plain, graphed)


@needs_gpu
def test_training_with_and_without_a_graph_is_equal(dataset, device):
    (graphed, records), (plain, plain_records) = (train(dataset, device, 60, cuda_graph=flag) for flag in (True, False))
    assert not graphed._graphs.impossible
    assert records == plain_records
    for ours, theirs in zip(graphed.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("selection", ["max", "softmax"])
def test_acting_with_and_without_a_graph_is_equal(device, batch, selection):
    policy = vgf.VGFPolicy(CONFIG, device=device)
    states = torch.randn(batch, 4, device=device)
    actions = []
    for flag in (False, True):
        policy.cuda_graph = flag
        generator = torch.Generator(device).manual_seed(0)
        actions.append([policy.sample_actions(states, generator=generator, selection=selection) for _ in range(4)])
    assert not policy._graphs.impossible
    for plain, graphed in zip(*actions, strict=True):
        assert torch.equal(plain, graphed)
