"""The operations of VGF: inputs, work, implementations and their check. ``bench ops`` and the roofline use them.

An operation is one entry of ``OPS``. ``sizes.batch`` is the number of states. An implementation is prepared once for
its inputs; then every call of ``run`` does the operation. Matrix products are in the inputs' dtype, particles and
moments in float32; bfloat16 is autocast's for the plain implementations.

Shapes: B states, N particles, A action, O observation, E members, H hidden width, R = B * N rows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from profiling import compiled, eager, machine
from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent
from profiling.torch_methods import configurations
from profiling.worker import Sizes
from vgf_fast import VGFPolicy, functional, fused, native, reference
from vgf_fast.functional import Backend
from vgf_fast.networks import EnsembleMLP, VelocityField

GRIDS = {
    "paper": Sizes(),
    "one state": Sizes(batch=1),
    "64k rows": Sizes(batch=8192, particles=8),
    "wide": Sizes(hidden=1024),
    "odd": Sizes(17, 5, batch=37, particles=7, behavior_steps=7, flow_steps=3, hidden=129, layers=3, members=3),
}
IMPLEMENTATIONS = ("triton", "torch", "eager", "compile")
FLOAT_BYTES = 4
ADAM_STEP = 3  # of the one flow step that starts from given moments
DRAWS = 5  # of inputs, before an implementation is called wrong
SHAKE = 0.2  # size of the random biases: a fresh network's are zero

Outputs = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])
Compiler = Callable[[Function], Function]


@dataclasses.dataclass
class Inputs:
    """What an operation reads, and for some what it writes: networks and data on one device."""

    sizes: Sizes
    dtype: torch.dtype  # of the matrix products
    policy: VGFPolicy
    data: dict[str, Any]  # tensors; the keys are the arguments' names

    def clone(self) -> Inputs:
        """The same numbers in other memory."""
        data = {name: tensor.clone() for name, tensor in self.data.items()}
        return Inputs(self.sizes, self.dtype, copy.deepcopy(self.policy), data)

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with weights and data in another dtype, for the truth."""
        data = {name: tensor.to(dtype) for name, tensor in self.data.items()}
        return Inputs(self.sizes, dtype, copy.deepcopy(self.policy).to(dtype), data)

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.policy.device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An implementation bound to inputs."""

    run: Callable[[], Outputs]
    state: Callable[[], Outputs] = dict  # what ``run`` wrote besides, named and shaped as the reference's


def plain_run(outputs: Callable[[], Outputs], state: Callable[[], Outputs] = dict) -> Prepared:
    """Prepared from functions that want no autograd graph."""
    return Prepared(torch.no_grad()(outputs), state)


# --- work ------------------------------------------------------------------------------------------------------------


def _widths(sizes: Sizes, inputs: int, outputs: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise((inputs, *(sizes.hidden,) * sizes.layers, outputs)))


def critic_parameters(sizes: Sizes) -> int:
    """Numbers in an ensemble critic with LayerNorm."""
    layers = _widths(sizes, sizes.observation_dim + sizes.action_dim, 1)
    return sizes.members * (sum(i * o + o for i, o in layers) + 2 * sizes.hidden * sizes.layers)


def behavior_parameters(sizes: Sizes) -> int:
    """Numbers in a velocity field."""
    return sum(i * o + o for i, o in _widths(sizes, sizes.observation_dim + sizes.action_dim + 1, sizes.action_dim))


def _critic_products(sizes: Sizes, passes: int, scores: int, values: int, needed: bool) -> int:
    """FLOPs of E critics' matrix products at every particle.

    Plainly, ``passes`` are on the concatenated input and so are ``scores`` gradients. What is needed is less: the
    state's share of the first layer once, the action's gradient alone, the last layer for ``values`` of the passes, and
    no product for its gradient, which is its weight.
    """
    rows, (first, *middle, last) = _rows(sizes), _widths(sizes, sizes.observation_dim + sizes.action_dim, 1)
    inner = sum(i * o for i, o in middle)
    if not needed:
        return 2 * sizes.members * rows * (passes + scores) * (first[0] * first[1] + inner + last[0])
    each = (passes + scores) * (sizes.action_dim * sizes.hidden + inner) + values * last[0]
    return 2 * sizes.members * (rows * each + sizes.batch * sizes.observation_dim * sizes.hidden)


def _behavior_products(sizes: Sizes, needed: bool) -> int:
    """FLOPs of the velocity field's matrix products in K Euler steps; the state's share is needed once."""
    rows, (_, *rest) = _rows(sizes), _widths(sizes, 1, sizes.action_dim)
    width = sizes.action_dim if needed else sizes.observation_dim + sizes.action_dim + 1
    states = sizes.batch * sizes.observation_dim * sizes.hidden if needed else 0
    return 2 * (sizes.behavior_steps * rows * (sum(i * o for i, o in rest) + width * sizes.hidden) + states)


def _training_products(sizes: Sizes, members: int, inputs: int, outputs: int) -> int:
    """FLOPs of the products of one gradient step: forward, weights, and all layers' inputs but the first's."""
    first, *rest = (i * o for i, o in _widths(sizes, inputs, outputs))
    return 2 * members * sizes.batch * (2 * first + 3 * sum(rest))


def _svgd_products(sizes: Sizes) -> int:
    """FLOPs of the kernel matrix by the score."""
    return 2 * sizes.batch * sizes.particles**2 * sizes.action_dim


def _svgd_pairs(sizes: Sizes) -> int:
    """FLOPs of each pair's distance, kernel entry and repulsion; finding the median is comparisons."""
    return sizes.batch * sizes.particles**2 * (3 * sizes.action_dim + 2 + 3 * sizes.action_dim)


def _rows(sizes: Sizes) -> int:
    return sizes.batch * sizes.particles


def _particle_bytes(sizes: Sizes, copies: int) -> int:
    return FLOAT_BYTES * copies * _rows(sizes) * sizes.action_dim


def _state_bytes(sizes: Sizes) -> int:
    return FLOAT_BYTES * sizes.batch * sizes.observation_dim


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation. Functions of sizes count; of inputs, compute."""

    name: str
    build: Callable[[Sizes, torch.dtype, torch.device, torch.Generator], Inputs]
    reference: Callable[[Inputs], Outputs]  # in the dtype of the inputs; in float64 it is the truth
    library: Callable[[Inputs, Backend], Prepared]  # this library on a backend, "triton" or "torch"
    plain: Callable[[Inputs, EagerAgent, Compiler[Any]], Prepared]  # as one writes it in PyTorch, compiled or not
    bounds: Mapping[str, str]  # output, before any number -> its entry in the tests' table of bounds
    networks: tuple[str, ...]  # those it reads; without any, everything is float32
    matmul_flops: Callable[[Sizes, bool], int]  # True: as an implementation needs; False: as the plain one does it
    moved: Callable[[Sizes, int], int]  # bytes of inputs and outputs, each once, by the bytes of a weight
    other_flops: Callable[[Sizes], int] = lambda sizes: 0  # of SVGD's pairs; LayerNorm, activations, Adam: not counted

    def flops(self, sizes: Sizes) -> int:
        """Floating-point operations it needs: those of matrix products, and of SVGD's pairs."""
        return self.matmul_flops(sizes, True) + self.other_flops(sizes)

    def bytes(self, sizes: Sizes, dtype: torch.dtype) -> int:
        """Bytes it must move with cold caches: what it reads and writes, weights included, once."""
        return self.moved(sizes, dtype.itemsize)

    def bytes_of(self, inputs: Inputs) -> int:
        """Bytes of the inputs in memory, without those networks it does not read."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors(inputs))

    def tensors(self, inputs: Inputs) -> Iterator[Tensor]:
        """What it reads, or writes in place."""
        yield from inputs.data.values()
        for name in self.networks:
            yield from getattr(inputs.policy, name).parameters()

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the matrix products it may be asked for."""
        return (torch.float32, torch.bfloat16) if self.networks else (torch.float32,)

    def prepare(self, implementation: str, inputs: Inputs, compiler: str = "inductor") -> Prepared:
        """Bind an implementation to inputs, which it may write. ``compiler`` is torch.compile's backend.

        Raises ``ValueError`` for an unknown implementation, and for what cannot run here.
        """
        if implementation == "triton":
            return self.library(inputs, "triton")
        if implementation == "torch":
            return self.library(inputs, "torch")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
        _, train = configurations(inputs.sizes)
        if implementation == "eager":
            prepared = self.plain(inputs, EagerAgent(_in_float32(inputs.policy), train), lambda function: function)
        else:
            agent = CompiledAgent(_in_float32(inputs.policy), train)
            prepared = self.plain(inputs, agent, functools.partial(_compile, backend=compiler))
        return Prepared(_with_autocast(prepared.run, inputs), prepared.state)


def obstacle(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on this machine, or None."""
    if implementation == "triton":
        if not functional.triton_installed():
            return "Triton is not installed"
        if device.type != "cuda" and not functional.triton_interpreted():
            return "Triton needs a GPU"
    if implementation == "compile" and device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler"
    return None


def _in_float32(policy: VGFPolicy) -> VGFPolicy:
    """The policy, its weights widened: autocast narrows them again at every call."""
    return policy if policy.dtype == torch.float32 else copy.deepcopy(policy).float()


def _with_autocast(run: Callable[[], Outputs], inputs: Inputs) -> Callable[[], Outputs]:
    if inputs.dtype == torch.float32:
        return run

    def autocast() -> Outputs:
        with torch.autocast(inputs.device.type, inputs.dtype):
            return run()

    return autocast


@functools.cache
def _compile(function: Function, backend: str) -> Function:
    """One compilation serves all copies of inputs. CUDA graphs are the bench's, the same for all implementations."""
    options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if backend == "inductor" else {}
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, **options)  # type: ignore[return-value]


# --- correctness -----------------------------------------------------------------------------------------------------


@functools.cache
def tolerances() -> Any:
    """The tests' table of bounds; there is no other."""
    path = machine.REPOSITORY / "tests" / "tolerances.py"
    spec = importlib.util.spec_from_file_location("profiling_tolerances", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Truth:
    """An operation's outputs at given inputs, in float64 and by the same formulas in the inputs' dtype."""

    exact: Outputs
    plain: Outputs
    dtype: torch.dtype  # of the inputs


def truth(op: Op, inputs: Inputs) -> Truth:
    """The reference in float64, and in PyTorch's operations in the inputs' own dtype. Writes no input."""
    with native.off():
        return Truth(op.reference(inputs.to(torch.float64)), op.reference(inputs.clone()), inputs.dtype)


def fault(op: Op, prepared: Prepared, expected: Truth) -> str | None:
    """Run once and compare: what is wrong, or None.

    An output passes within its bound of the table, relative to its largest entry, or if its root mean square error is
    at most twice that of PyTorch's operations in the same dtype: the tests' rules, whose table is of exact products.
    """
    found = {name: tensor.detach() for name, tensor in (prepared.run() | prepared.state()).items()}
    if found.keys() != expected.exact.keys():
        return f"outputs are {sorted(found)}, expected {sorted(expected.exact)}"
    for name, exact in expected.exact.items():
        value = found[name]
        if value.shape != exact.shape:
            return f"{name} has shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
        if not value.isfinite().all():
            return f"{name} has values that are not finite"
        if not value.is_floating_point():
            if not torch.equal(value, exact):
                return f"{name} differs from the reference"
            continue
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        error, plain_error = ((t.double() - exact) / scale for t in (value, expected.plain[name]))
        # Outputs are float32, whatever the products; the table holds those of exact float32 products.
        table = tolerances().BOUNDS[op.bounds[name.partition(" ")[0]]]
        exact_by_luck = tolerances().FLOOR[torch.float32]
        bound = max(table[torch.float32], exact_by_luck) if expected.dtype == torch.float32 else exact_by_luck
        mean, plain_mean = (float(e.square().mean().sqrt()) for e in (error, plain_error))
        if float(error.abs().max()) > bound and mean > 2.0 * plain_mean:
            return (
                f"{name} errs by {float(error.abs().max()):.1e} (bound {bound:.0e}), root mean square {mean:.1e} "
                f"(PyTorch's {plain_mean:.1e})"
            )
    return None


def check(
    op: Op,
    implementations: Sequence[str],
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    compiler: str = "inductor",
) -> dict[str, str | None]:
    """What is wrong with each implementation, or None; an implementation that raises is wrong too.

    Where rounding puts a unit of a relu network on the other side of its kink, the score jumps, in any arithmetic. So
    inputs are drawn anew up to ``DRAWS`` times: what is wrong is wrong in all of them.
    """
    draws: list[tuple[Inputs, Truth]] = []
    found: dict[str, str | None] = {}
    for implementation in implementations:
        for draw in range(DRAWS):
            if draw == len(draws):
                inputs = op.build(sizes, dtype, device, torch.Generator().manual_seed(seed + draw))
                draws.append((inputs, truth(op, inputs)))
            inputs, expected = draws[draw]
            try:
                found[implementation] = fault(op, op.prepare(implementation, inputs.clone(), compiler), expected)
            except Exception as error:  # whatever a compiler or a driver objects to
                found[implementation] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                break
            if found[implementation] is None:
                break
    return found


# --- inputs ----------------------------------------------------------------------------------------------------------


def _policy(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> VGFPolicy:
    """A policy whose biases and LayerNorms are not those of a fresh network."""
    config, _ = configurations(sizes)
    policy = VGFPolicy(config, seed=int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "weights" not in name:
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.add_(SHAKE * noise.to(parameter.device))
    return policy.to(device, dtype)


def _draw(shape: tuple[int, ...], device: torch.device, generator: torch.Generator, uniform: bool = False) -> Tensor:
    """Standard normal numbers, or uniform ones in [-1, 1]."""
    if uniform:
        return (torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0).to(device)
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def _builder(
    shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]],
    uniform: tuple[str, ...] = (),
    networks: bool = True,
    training: bool = False,
) -> Callable[[Sizes, torch.dtype, torch.device, torch.Generator], Inputs]:
    """Inputs of the given shapes: normal, or uniform in [-1, 1]. In training the weights are float32 always."""

    def build(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        held = sizes if networks else dataclasses.replace(sizes, hidden=1, layers=1)
        policy = _policy(held, torch.float32 if training else dtype, device, generator)
        data = {name: _draw(shape, device, generator, name in uniform) for name, shape in shapes(sizes).items()}
        return Inputs(sizes, dtype, policy, data)

    return build


def _at_particles(*names: str) -> Callable[[Sizes], dict[str, tuple[int, ...]]]:
    """Observations, and tensors [B, N, A]."""

    def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
        rows = (sizes.batch, sizes.particles, sizes.action_dim)
        return {"observations": (sizes.batch, sizes.observation_dim), **dict.fromkeys(names, rows)}

    return shapes


def _moving(*names: str) -> Callable[[Sizes], dict[str, tuple[int, ...]]]:
    """Tensors [B, N, A] alone."""
    return lambda sizes: dict.fromkeys(names, (sizes.batch, sizes.particles, sizes.action_dim))


# --- networks at particles -------------------------------------------------------------------------------------------


def _repeated(observations: Tensor, particles: Tensor) -> Tensor:
    """States beside every particle: [B, O], [B, N, A] -> [B, N, O]."""
    return observations.unsqueeze(1).expand(-1, particles.shape[1], -1)


def _critic_reference(inputs: Inputs) -> Outputs:
    critic = inputs.policy.critic.stacked().to(inputs.dtype)
    at_states = reference.CriticAtStates(critic, inputs.data["observations"])
    q, score = at_states.values_and_score(inputs.data["actions"])
    return {"q": q, "score": score}


def _critic_library(inputs: Inputs, backend: Backend) -> Prepared:
    def outputs() -> Outputs:
        q, score = functional.critic_value_and_score(inputs.policy.critic, **inputs.data, backend=backend)
        return {"q": q, "score": score}

    return plain_run(outputs)


def _values_and_score(agent: EagerAgent, observations: Tensor, actions: Tensor) -> Outputs:
    states = _repeated(observations, actions)

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        q = agent.critic(states, x)
        return q.mean(dim=0).sum(), q

    if isinstance(agent, CompiledAgent):
        score, q = torch.func.grad(total, has_aux=True)(actions)
        return {"q": q.float(), "score": score}
    with torch.enable_grad():
        x = actions.detach().requires_grad_()
        value, q = total(x)
        return {"q": q.detach().float(), "score": torch.autograd.grad(value, x)[0]}


def _critic_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function = compiler(_values_and_score)
    return plain_run(lambda: function(agent, **inputs.data))


def _behavior_reference(inputs: Inputs) -> Outputs:
    velocity = inputs.policy.behavior.stacked().to(inputs.dtype)
    return {"particles": reference.behavior_flow(velocity, **inputs.data, steps=inputs.sizes.behavior_steps)}


def _behavior_library(inputs: Inputs, backend: Backend) -> Prepared:
    assert isinstance(inputs.policy.behavior, VelocityField)
    velocity, steps = inputs.policy.behavior, inputs.sizes.behavior_steps
    return plain_run(
        lambda: {"particles": functional.behavior_flow(velocity, **inputs.data, steps=steps, backend=backend)}
    )


def _behavior_draw(agent: EagerAgent, observations: Tensor, noise: Tensor) -> Outputs:
    return {"particles": agent.draw(_repeated(observations, noise), noise)}


def _behavior_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function = compiler(_behavior_draw)
    return plain_run(lambda: function(agent, **inputs.data))


# --- particles -------------------------------------------------------------------------------------------------------


def _direction_reference(inputs: Inputs) -> Outputs:
    temperature = inputs.policy.config.train_budget.temperature
    return {"phi": reference.svgd_direction(**inputs.data, temperature=temperature)}


def _direction_library(inputs: Inputs, backend: Backend) -> Prepared:
    temperature = inputs.policy.config.train_budget.temperature
    return plain_run(
        lambda: {"phi": functional.svgd_direction(**inputs.data, temperature=temperature, backend=backend)}
    )


def _plain_direction(agent: EagerAgent, particles: Tensor, score: Tensor) -> Tensor:
    module = compiled if isinstance(agent, CompiledAgent) else eager
    return module.svgd_direction(particles, score, agent.config.train_budget.temperature)


def _direction_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function = compiler(_plain_direction)
    return plain_run(lambda: {"phi": function(agent, **inputs.data)})


def _moments(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return _moving("particles", "score", "first_moment", "root_second_moment")(sizes)


def _build_step(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """As after some steps: moments that are not zero, the second one positive."""
    inputs = _builder(_moments, ("particles",), networks=False)(sizes, dtype, device, generator)
    inputs.data["second_moment"] = inputs.data.pop("root_second_moment").square()
    return inputs


def _step_state(inputs: Inputs) -> Outputs:
    return {name: inputs.data[name] for name in ("particles", "first_moment", "second_moment")}


def _step_reference(inputs: Inputs) -> Outputs:
    budget = inputs.policy.config.train_budget
    reference.svgd_step_(**inputs.data, step=ADAM_STEP, step_size=budget.step_size, temperature=budget.temperature)
    return _step_state(inputs)


def _step_library(inputs: Inputs, backend: Backend) -> Prepared:
    budget = inputs.policy.config.train_budget
    options = {"step": ADAM_STEP, "step_size": budget.step_size, "temperature": budget.temperature}
    if backend == "triton":
        from vgf_fast.kernels import svgd

        step: Callable[..., None] = svgd.svgd_step_
    else:
        step = reference.svgd_step_

    def outputs() -> Outputs:
        step(**inputs.data, **options)
        return {}

    return plain_run(outputs, lambda: _step_state(inputs))


def _plain_step(
    agent: EagerAgent, particles: Tensor, score: Tensor, first_moment: Tensor, second_moment: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Direction, Adam and clip, out of place."""
    phi = _plain_direction(agent, particles, score)
    m = compiled.BETA1 * first_moment + (1.0 - compiled.BETA1) * phi
    v = compiled.BETA2 * second_moment + (1.0 - compiled.BETA2) * phi.square()
    root = (v / (1.0 - compiled.BETA2**ADAM_STEP)).sqrt() + compiled.EPS
    step_size = agent.config.train_budget.step_size
    return (particles + step_size * (m / (1.0 - compiled.BETA1**ADAM_STEP)) / root).clamp(-1.0, 1.0), m, v


def _step_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function = compiler(_plain_step)

    def outputs() -> Outputs:
        return dict(zip(("particles", "first_moment", "second_moment"), function(agent, **inputs.data), strict=True))

    return plain_run(outputs)


def _flow_reference(inputs: Inputs, steps: int, evaluate: bool) -> Outputs:
    budget = inputs.policy.config.train_budget
    result = reference.value_gradient_flow(
        inputs.policy.critic.stacked().to(inputs.dtype),
        **inputs.data,
        steps=steps,
        step_size=budget.step_size,
        temperature=budget.temperature,
        evaluate=evaluate,
    )
    return {"particles": result.particles, **({} if result.q is None else {"q": result.q})}


def _flow_library(inputs: Inputs, backend: Backend, steps: int, evaluate: bool) -> Prepared:
    budget = dataclasses.replace(inputs.policy.config.train_budget, steps=steps)
    critic: EnsembleMLP = inputs.policy.critic

    def outputs() -> Outputs:
        result = functional.value_gradient_flow(
            critic, **inputs.data, budget=budget, evaluate=evaluate, backend=backend
        )
        return {"particles": result.particles, **({} if result.q is None else {"q": result.q})}

    return plain_run(outputs)


def _plain_flow(agent: EagerAgent, observations: Tensor, particles: Tensor, steps: int, evaluate: bool) -> Outputs:
    states = _repeated(observations, particles)
    budget = dataclasses.replace(agent.config.train_budget, steps=steps)
    x = agent.flow(states, particles, budget)[-1]
    return {"particles": x, **({"q": agent.critic(states, x).float()} if evaluate else {})}


def _flow_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any], steps: int, evaluate: bool) -> Prepared:
    function = compiler(_plain_flow)
    return plain_run(lambda: function(agent, **inputs.data, steps=steps, evaluate=evaluate))


def _select_reference(inputs: Inputs) -> Outputs:
    return dict(zip(("action", "index"), reference.select_particle(**inputs.data), strict=True))


def _select_library(inputs: Inputs, backend: Backend) -> Prepared:
    def outputs() -> Outputs:
        chosen = functional.select_particle(**inputs.data, backend=backend)
        return dict(zip(("action", "index"), chosen, strict=True))

    return plain_run(outputs)


def _plain_select(particles: Tensor, q: Tensor) -> Outputs:
    index = q.argmax(dim=1)
    return {"action": particles.take_along_dim(index.view(-1, 1, 1), dim=1).squeeze(1), "index": index}


def _select_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function = compiler(_plain_select)
    return plain_run(lambda: function(**inputs.data))


def _target_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    return {"q": (sizes.members, sizes.batch, sizes.particles), "rewards": (sizes.batch,), "masks": (sizes.batch,)}


def _target_reference(inputs: Inputs) -> Outputs:
    return {"target": reference.td_target(**inputs.data, discount=configurations(inputs.sizes)[1].discount)}


def _target_library(inputs: Inputs, backend: Backend) -> Prepared:
    discount = configurations(inputs.sizes)[1].discount
    return plain_run(lambda: {"target": functional.td_target(**inputs.data, discount=discount, backend=backend)})


def _plain_target(q: Tensor, rewards: Tensor, masks: Tensor, discount: float) -> Outputs:
    return {"target": rewards + discount * masks * q.amin(dim=0).mean(dim=1)}


def _target_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
    function, discount = compiler(_plain_target), agent.train.discount
    return plain_run(lambda: function(**inputs.data, discount=discount))


# --- gradient steps --------------------------------------------------------------------------------------------------


def _critic_batch(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    batch = sizes.batch
    return {
        "observations": (batch, sizes.observation_dim),
        "actions": (batch, sizes.action_dim),
        "target": (batch,),
    }


def _behavior_batch(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    actions = (sizes.batch, sizes.action_dim)
    return {
        "observations": (sizes.batch, sizes.observation_dim),
        "actions": actions,
        "noise": actions,
        "time": (sizes.batch, 1),
    }


def _adam(parameters: Any, rate: float, device: torch.device, fused_step: bool) -> torch.optim.Adam:
    """PyTorch's; on a GPU one that a CUDA graph can hold."""
    return torch.optim.Adam(parameters, lr=rate, fused=fused_step or None, capturable=device.type == "cuda")


def _training_state(
    parameters: list[Tensor],
    adam: torch.optim.Adam,
    targets: list[Tensor],
    gather: Callable[[list[Tensor]], list[Tensor]],
) -> Outputs:
    """Moments, parameters and target critic after a step, in the order of a stack's parameters."""
    groups = {
        "first_moment": [adam.state[p]["exp_avg"] for p in parameters],
        "second_moment": [adam.state[p]["exp_avg_sq"] for p in parameters],
        "average": targets,
    }
    found = {f"{name} {i}": t.detach() for name, group in groups.items() for i, t in enumerate(gather(group)) if group}
    # All at once: Adam's first step is the gradient's sign, a matter of luck where the gradient is rounding.
    return {**found, "parameters": torch.cat([t.detach().flatten() for t in gather(parameters)])}


def _stack_loss(inputs: Inputs, name: str) -> Tensor:
    """The loss of the critic or of the behaviour model, by the library's formulas; differentiable."""
    data, weights = inputs.data, getattr(inputs.policy, name).stacked().to(inputs.dtype)
    if name == "critic":
        return reference.td_loss(
            reference.member_values(weights, data["observations"], data["actions"]), data["target"]
        )
    x, velocity = reference.flow_matching_inputs(data["actions"], data["noise"], data["time"])
    rows = torch.cat([data["observations"], x, data["time"]], dim=-1)
    return reference.flow_matching_loss(reference.mlp_forward(weights, rows).squeeze(0).to(x.dtype), velocity)


def _training_torch(inputs: Inputs, name: str, fused_step: bool = True) -> Prepared:
    _, train = configurations(inputs.sizes)
    policy = inputs.policy
    parameters: list[Tensor] = list(getattr(policy, name).parameters())
    targets: list[Tensor] = list(policy.target_critic.parameters()) if name == "critic" else []
    rate = train.critic_learning_rate if name == "critic" else train.behavior_learning_rate
    adam = _adam(parameters, rate, inputs.device, fused_step)

    def outputs() -> Outputs:
        loss = _stack_loss(inputs, name)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        if targets:
            reference.polyak_(targets, parameters, train.tau)
        adam.step()
        return {"loss": loss.detach()}

    return Prepared(outputs, lambda: _training_state(parameters, adam, targets, list))


def _training_reference(inputs: Inputs, name: str) -> Outputs:
    prepared = _training_torch(inputs, name, fused_step=False)
    return prepared.run() | prepared.state()


def _training_library(inputs: Inputs, backend: Backend, name: str) -> Prepared:
    if backend == "torch":
        return _training_torch(inputs, name)
    from vgf_fast.kernels.mlp_training import Batch, training_step_
    from vgf_fast.kernels.packing import pack_many

    _, train = configurations(inputs.sizes)
    policy, data = inputs.policy, inputs.data
    stack = fused.stack(getattr(policy, name))
    parameters = list(stack.parameters)
    if name == "critic":
        targets, rate = list(fused.stack(policy.target_critic).parameters), train.critic_learning_rate
        batch = Batch(data["observations"], data["actions"], target=data["target"].unsqueeze(1))
    else:
        targets, rate = [], train.behavior_learning_rate
        batch = Batch(data["observations"], data["actions"], data["time"], data["noise"])
    adam = torch.optim.Adam(parameters, lr=rate, fused=True)

    def outputs() -> Outputs:
        (packed,) = pack_many([stack], inputs.dtype)
        return {"loss": training_step_(stack, packed, batch, adam, targets=targets, tau=train.tau)[0]}

    return plain_run(outputs, lambda: _training_state(parameters, adam, targets, list))


def _plain_critic_loss(agent: EagerAgent, observations: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    return (target - agent.critic(observations, actions)).square().sum(dim=0).mean()


def _plain_behavior_loss(
    agent: EagerAgent, observations: Tensor, actions: Tensor, noise: Tensor, time: Tensor
) -> Tensor:
    velocity = agent.behavior(observations, (1.0 - time) * noise + time * actions, time)
    return (velocity - (actions - noise)).square().mean()


def _training_plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any], name: str) -> Prepared:
    function = compiler(_plain_critic_loss if name == "critic" else _plain_behavior_loss)
    members = list(agent.critic.members) if name == "critic" else [agent.behavior]
    parameters: list[Tensor] = [parameter for member in members for parameter in member.parameters()]
    rate = agent.train.critic_learning_rate if name == "critic" else agent.train.behavior_learning_rate
    adam = _adam(parameters, rate, inputs.device, isinstance(agent, CompiledAgent))
    targets: list[Tensor] = list(agent.target_critic.parameters()) if name == "critic" else []

    def outputs() -> Outputs:
        loss = function(agent, **inputs.data)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        if targets:
            with torch.no_grad():
                for target, parameter in zip(targets, parameters, strict=True):
                    target.mul_(1.0 - agent.train.tau).add_(parameter, alpha=agent.train.tau)
        adam.step()
        return {"loss": loss.detach()}

    def gather(tensors: list[Tensor]) -> list[Tensor]:
        """Modules' parameters, or tensors of their shapes, in the order and layout of a stack's."""
        if not tensors:
            return []
        each = len(tensors) // len(members)
        by_member = [tensors[e * each : (e + 1) * each] for e in range(len(members))]
        found = [torch.stack(group) for group in zip(*by_member, strict=True)]
        weights = [t.transpose(1, 2) for t in found if t.ndim == 3]
        vectors = [t for t in found if t.ndim == 2]
        # Of every hidden layer: linear bias, then LayerNorm's scale and shift where there is one.
        hidden = len(weights) - 1
        per_layer = (len(vectors) - 1) // hidden
        layers = [vectors[i * per_layer : (i + 1) * per_layer] for i in range(hidden)]
        groups = [[layer[k] for layer in layers] for k in range(per_layer)]
        return [*weights, *groups[0], vectors[-1], *itertools.chain(*groups[1:])]

    return Prepared(outputs, lambda: _training_state(parameters, adam, targets, gather))


def _training_op(
    name: str,
    network: str,
    shapes: Callable[[Sizes], Mapping[str, tuple[int, ...]]],
    matmul_flops: Callable[[Sizes, bool], int],
    moved: Callable[[Sizes, int], int],
) -> Op:
    return Op(
        name,
        _builder(shapes, ("actions",), training=True),
        functools.partial(_training_reference, name=network),
        functools.partial(_training_library, name=network),
        functools.partial(_training_plain, name=network),
        {
            "loss": "training_loss",
            "first_moment": "training_gradient",
            "second_moment": "update_moments",
            "parameters": "update_parameters",
            "average": "update_parameters",
        },
        ("critic", "target_critic") if network == "critic" else ("behavior",),
        matmul_flops,
        moved,
    )


# --- the registry ----------------------------------------------------------------------------------------------------


def _flow_op(name: str, steps: Callable[[Sizes], int], evaluate: bool) -> Op:
    return Op(
        name,
        _builder(_at_particles("particles"), ("particles",)),
        lambda inputs: _flow_reference(inputs, steps(inputs.sizes), evaluate),
        lambda inputs, backend: _flow_library(inputs, backend, steps(inputs.sizes), evaluate),
        lambda inputs, agent, compiler: _flow_plain(inputs, agent, compiler, steps(inputs.sizes), evaluate),
        {"particles": "flow_step", **({"q": "flow_step"} if evaluate else {})},
        ("critic",),
        lambda sizes, needed: (
            _critic_products(sizes, steps(sizes) + evaluate, steps(sizes), int(evaluate), needed)
            + steps(sizes) * _svgd_products(sizes)
        ),
        lambda sizes, width: (
            width * critic_parameters(sizes)
            + _state_bytes(sizes)
            + _particle_bytes(sizes, 2)
            + evaluate * FLOAT_BYTES * sizes.members * _rows(sizes)
        ),
        lambda sizes: steps(sizes) * _svgd_pairs(sizes),
    )


ALL = (
    Op(
        "critic_value_and_score",
        _builder(_at_particles("actions"), ("actions",)),
        _critic_reference,
        _critic_library,
        _critic_plain,
        {"q": "critic_value", "score": "critic_score"},
        ("critic",),
        lambda sizes, needed: _critic_products(sizes, 1, 1, 1, needed),
        lambda sizes, width: (
            width * critic_parameters(sizes)
            + _state_bytes(sizes)
            + _particle_bytes(sizes, 2)
            + FLOAT_BYTES * sizes.members * _rows(sizes)
        ),
    ),
    Op(
        "behavior_flow",
        _builder(_at_particles("noise")),
        _behavior_reference,
        _behavior_library,
        _behavior_plain,
        {"particles": "behavior_flow"},
        ("behavior",),
        _behavior_products,
        lambda sizes, width: width * behavior_parameters(sizes) + _state_bytes(sizes) + _particle_bytes(sizes, 2),
    ),
    Op(
        "svgd_direction",
        _builder(_moving("particles", "score"), ("particles",), networks=False),
        _direction_reference,
        _direction_library,
        _direction_plain,
        {"phi": "svgd_direction"},
        (),
        lambda sizes, needed: _svgd_products(sizes),
        lambda sizes, width: _particle_bytes(sizes, 3),
        _svgd_pairs,
    ),
    Op(
        "svgd_step",
        _build_step,
        _step_reference,
        _step_library,
        _step_plain,
        {"particles": "svgd_step", "first_moment": "svgd_moment", "second_moment": "svgd_moment"},
        (),
        lambda sizes, needed: _svgd_products(sizes),
        lambda sizes, width: _particle_bytes(sizes, 7),
        _svgd_pairs,
    ),
    _flow_op("flow_step", lambda sizes: 1, evaluate=False),
    _flow_op("value_gradient_flow", lambda sizes: sizes.flow_steps, evaluate=True),
    Op(
        "select_particle",
        _builder(lambda sizes: {**_moving("particles")(sizes), "q": (sizes.batch, sizes.particles)}, networks=False),
        _select_reference,
        _select_library,
        _select_plain,
        {"action": "aggregate", "index": "aggregate"},
        (),
        lambda sizes, needed: 0,
        lambda sizes, width: (
            _particle_bytes(sizes, 1) + FLOAT_BYTES * (_rows(sizes) + sizes.batch * (sizes.action_dim + 2))
        ),
    ),
    Op(
        "td_target",
        _builder(_target_shapes, networks=False),
        _target_reference,
        _target_library,
        _target_plain,
        {"target": "td_target"},
        (),
        lambda sizes, needed: 0,
        lambda sizes, width: FLOAT_BYTES * (sizes.members * _rows(sizes) + 3 * sizes.batch),
        lambda sizes: sizes.members * _rows(sizes) + 3 * sizes.batch,
    ),
    _training_op(
        "critic_training_step",
        "critic",
        _critic_batch,
        lambda sizes, needed: _training_products(sizes, sizes.members, sizes.observation_dim + sizes.action_dim, 1),
        lambda sizes, width: (
            8 * FLOAT_BYTES * critic_parameters(sizes)
            + _state_bytes(sizes)
            + FLOAT_BYTES * (sizes.batch * (sizes.action_dim + 1) + 1)
        ),
    ),
    _training_op(
        "behavior_training_step",
        "behavior",
        _behavior_batch,
        lambda sizes, needed: _training_products(
            sizes, 1, sizes.observation_dim + sizes.action_dim + 1, sizes.action_dim
        ),
        lambda sizes, width: (
            6 * FLOAT_BYTES * behavior_parameters(sizes)
            + _state_bytes(sizes)
            + FLOAT_BYTES * (sizes.batch * (2 * sizes.action_dim + 1) + 1)
        ),
    ),
)
OPS = {op.name: op for op in ALL}
