"""What every method of alignment shares: models, first responses, the fluency bound, budget, counts and the report."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgf_fast.config import MAX_SEED, TransportBudget, integer, real, settle
from vgf_fast.llm.reference_model import ReferenceModel
from vgf_fast.llm.result import AlignResult, Response, Transport, Usage
from vgf_fast.llm.reward import Reward, RewardModel


@dataclasses.dataclass(frozen=True)
class TokenBudget(TransportBudget):
    """How far a response's embeddings may move. Raises ``ValueError`` when a field is outside its range."""

    steps: int = 20  # L; 0 is best-of-N
    step_size: float = 1.0  # eps, in median lengths of a token embedding
    temperature: float = 0.1  # alpha; between responses it weighs the reward against their repulsion
    trust_radius: float | None = None  # how far a token's embedding may get from the first one, in the same lengths
    reward_units: int | None = None  # of a prompt: a forward pass 1, forward and backward 2; stops the flow early

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trust_radius is not None:
            settle(self, real, ["trust_radius"], 0.0, low_open=True)
        if self.reward_units is not None:
            settle(self, integer, ["reward_units"], 1)


@dataclasses.dataclass
class Particle:
    """A response under way."""

    prompt: int
    start: tuple[int, ...]
    start_text: str
    ids: tuple[int, ...]
    best: tuple[int, ...] | None = None  # of highest reward within the bound
    weight: int = 0  # place of the last weight in the decoder's


class Aligner:
    """What every method shares: models, first responses, the fluency bound, and the report.

    ``reward_model``: a ``Reward``, or a sequence classifier of transformers. ``reference``: a ``ReferenceModel``, or a
    causal language model; without one, responses must be given and nothing bounds their fluency. ``fluency``: a
    response's perplexity under the reference may be this many times the lesser of its first text's and the median of
    its prompt's first texts'; None for no bound.

    Raises ``ValueError`` when the two models have different tokenizers.
    """

    method = ""

    def __init__(
        self,
        reward_model: Reward | nn.Module,
        tokenizer: Any = None,
        *,
        reference: ReferenceModel | nn.Module | None = None,
        fluency: float | None = 1.5,
        max_new_tokens: int = 32,
        min_new_tokens: int = 1,
        sampling_temperature: float = 1.0,
        sampling_top_k: int | None = None,
        report_continuous: bool = True,
    ) -> None:
        if not isinstance(reward_model, Reward):
            if tokenizer is None:
                raise ValueError("tokenizer is None, expected the reward model's")
            reward_model = RewardModel(reward_model, tokenizer)
        if reference is not None and not isinstance(reference, ReferenceModel):
            reference = ReferenceModel(reference, tokenizer or reward_model.vocabulary.tokenizer)
        if fluency is not None and not fluency > 0:
            raise ValueError(f"fluency is {fluency}, expected a positive ratio of perplexities or None")
        if reference is not None:
            reward_model.vocabulary.check_same(reference.vocabulary, ("reward model", "reference model"))
        self.reward = reward_model
        self.reference = reference
        self.vocabulary = reward_model.vocabulary
        self.fluency = fluency
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "temperature": sampling_temperature,
            "top_k": sampling_top_k,
        }
        self.report_continuous = report_continuous
        lengths = self.reward.table[self.vocabulary.allowed].float().norm(dim=-1)
        self.unit = float(lengths.median())

    def align(
        self,
        prompts: Sequence[str],
        responses: Sequence[Sequence[str]] | None = None,
        *,
        budget: TransportBudget | None = None,
        num_particles: int = 8,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        max_perplexity: float | None = None,
    ) -> AlignResult:
        """Better responses to every prompt.

        ``responses[i]``: first responses to prompt i; without them the reference model samples ``num_particles``.
        ``generator`` or ``seed`` makes the sampling repeatable. ``max_perplexity`` bounds every response's perplexity
        too.

        Raises ``ValueError`` for an empty prompt or response, rows too long for a model, rewards that are not finite.
        """
        began = time.perf_counter()
        budget = budget or TokenBudget()
        num_particles = integer("num_particles", num_particles, 1)
        usage = Usage()
        if isinstance(prompts, str) or isinstance(responses, str):
            raise ValueError("prompts and responses are sequences: of texts, and of a sequence of texts a prompt")
        if generator is not None and seed is not None:
            raise ValueError("both generator and seed are given, expected one of them")
        if seed is not None:
            device = self.reference.device if self.reference is not None else self.reward.device
            generator = torch.Generator(device).manual_seed(integer("seed", seed, -MAX_SEED, 2 * MAX_SEED))
        contexts = self._contexts(prompts)
        first = self._first(contexts, responses, self._samples(budget, num_particles), generator, usage)
        run = Run(self, list(prompts), contexts, first, max_perplexity, usage)
        limit = getattr(budget, "reward_units", None)
        most = max((len(texts) for texts in first), default=0)
        if limit is not None and limit < most:
            raise ValueError(f"reward_units is {limit}, expected at least one for each of {most} responses to a prompt")
        self._improve(run, budget)
        return run.result(self.method, budget, began)

    def _contexts(self, prompts: Sequence[str]) -> list[list[int]]:
        contexts = [self.vocabulary.encode(prompt) for prompt in prompts]
        for prompt, ids in zip(prompts, contexts, strict=True):
            if not ids:
                raise ValueError(f"prompt {prompt!r} is empty, expected at least one token")
        return contexts

    def _samples(self, budget: TransportBudget, num_particles: int) -> int:
        return num_particles

    def _improve(self, run: Run, budget: TransportBudget) -> None:
        raise NotImplementedError

    def _first(
        self,
        contexts: list[list[int]],
        responses: Sequence[Sequence[str]] | None,
        count: int,
        generator: torch.Generator | None,
        usage: Usage,
    ) -> list[list[str]]:
        if responses is None:
            if self.reference is None:
                raise ValueError("neither responses nor a reference model to sample them from were given")
            drawn = self.reference.sample(contexts, count, generator=generator, usage=usage, **self.sampling)
            return [[self.vocabulary.decode(ids) for ids in rows] for rows in drawn]
        if len(responses) != len(contexts):
            raise ValueError(
                f"responses has {len(responses)} entries, expected one for each of {len(contexts)} prompts"
            )
        if any(isinstance(rows, str) or not rows for rows in responses):
            raise ValueError("an entry of responses is empty or a text, expected a sequence of texts for every prompt")
        return [list(rows) for rows in responses]


class Run:
    """One call: its particles, what is known of the texts that came up, and how much was used.

    Raises ``ValueError`` for an empty response.
    """

    def __init__(
        self,
        aligner: Aligner,
        prompts: list[str],
        contexts: list[list[int]],
        first: list[list[str]],
        max_perplexity: float | None,
        usage: Usage,
    ) -> None:
        self.aligner = aligner
        self.prompts = prompts
        self.contexts = contexts
        self.usage = usage
        self.particles: list[Particle] = []
        for prompt, texts in enumerate(first):
            for text in texts:
                ids = tuple(aligner.vocabulary.encode(text))
                if not ids:
                    raise ValueError(f"a response to prompt {prompts[prompt]!r} is empty, expected at least one token")
                self.particles.append(Particle(prompt, ids, text, ids))
        self.rewards: dict[tuple[int, tuple[int, ...]], float] = {}
        self.gradients: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self.log_probabilities: dict[tuple[int, tuple[int, ...]], float] = {}
        self.spent = [0] * len(prompts)
        self.continuous: list[float | None] = [None] * len(self.particles)
        self.embeddings: Tensor | None = None  # where the particles are [M, T, d]
        self.transport: list[Transport | None] = [None] * len(prompts)
        self.score([(p.prompt, p.ids) for p in self.particles])
        self.bounds = self._bounds(max_perplexity)

    def _bounds(self, max_perplexity: float | None) -> list[float | None]:
        fluency = self.aligner.fluency if self.aligner.reference is not None else None
        if fluency is None:
            return [max_perplexity] * len(self.particles)
        bounds: list[float | None] = []
        for prompt in range(len(self.prompts)):
            own = [self.perplexity(p.prompt, p.start) for p in self.particles if p.prompt == prompt]
            median = float(torch.tensor(own, dtype=torch.float64, device="cpu").median())
            bounds += [min(fluency * min(x, median), max_perplexity or math.inf) for x in own]
        return bounds

    def score(self, texts: list[tuple[int, tuple[int, ...]]]) -> None:
        """Log-probabilities of (prompt, ids) pairs that have none yet."""
        new = [key for key in dict.fromkeys(texts) if key not in self.log_probabilities]
        if self.aligner.reference is None or not new:
            return
        values = self.aligner.reference.score([self.contexts[p] for p, _ in new], [list(i) for _, i in new], self.usage)
        self.log_probabilities.update(zip(new, values.tolist(), strict=True))

    def perplexity(self, prompt: int, ids: tuple[int, ...]) -> float:
        """Perplexity per token under the reference model, the end included."""
        return math.exp(-self.log_probabilities[prompt, ids] / (len(ids) + 1))

    def feasible(self, index: int, ids: tuple[int, ...]) -> bool:
        """Whether particle ``index`` would keep to its bound with these ids."""
        bound = self.bounds[index]
        return bound is None or self.perplexity(self.particles[index].prompt, ids) <= bound * (1 + 1e-6)

    def evaluate(self, indices: Sequence[int], gradient: bool, budget: TransportBudget) -> list[int]:
        """Rewards (and gradients) at these particles' ids, where not known; returns the particles that have them now.

        Keeps each prompt within ``budget.reward_units``, and the best feasible text of every particle.
        """
        limit = getattr(budget, "reward_units", None)
        cost = 1 + gradient
        known = self.gradients if gradient else self.rewards
        new: list[tuple[int, tuple[int, ...]]] = []
        reached: list[int] = []
        for index in indices:
            particle = self.particles[index]
            key = (particle.prompt, particle.ids)
            if key not in known and key not in new:
                if limit is not None and self.spent[particle.prompt] + cost > limit:
                    continue
                self.spent[particle.prompt] += cost
                new.append(key)
            reached.append(index)
        if new:
            rewards, gradients = self.aligner.reward.evaluate(
                [self.contexts[p] for p, _ in new], [list(i) for _, i in new], gradient=gradient, usage=self.usage
            )
            self.rewards.update(zip(new, rewards.tolist(), strict=True))
            if gradients is not None:
                for row, key in enumerate(new):
                    self.gradients[key] = gradients[row, : len(key[1])]
        for index in reached:
            particle = self.particles[index]
            old = None if particle.best is None else self.rewards[particle.prompt, particle.best]
            better = old is None or self.rewards[particle.prompt, particle.ids] > old
            if better and self.feasible(index, particle.ids):
                particle.best = particle.ids
        return reached

    def begin(self, budget: TransportBudget) -> list[int]:
        """Rewards at every first text, and gradients at as many as the units pay for: those particles."""
        limit = getattr(budget, "reward_units", None)
        everyone = range(len(self.particles))
        if limit is None:
            return self.evaluate(everyone, True, budget)
        left = [limit - sum(p.prompt == prompt for p in self.particles) for prompt in range(len(self.prompts))]
        chosen = []
        for index in everyone:
            if left[self.particles[index].prompt] > 0:
                left[self.particles[index].prompt] -= 1
                chosen.append(index)
        active = self.evaluate(chosen, True, budget)
        self.evaluate([index for index in everyone if index not in set(chosen)], False, budget)
        return active

    def embed(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Embeddings [R, T, d] of rows of ids, zero beyond their lengths."""
        table = self.aligner.reward
        shape = (len(rows), max(map(len, rows), default=0), table.table.shape[1])
        out = torch.zeros(shape, dtype=torch.float32, device=table.device)
        for i, row in enumerate(rows):
            out[i, : len(row)] = table.embed(torch.tensor(row, dtype=torch.long, device=table.device))
        return out

    def result(self, method: str, budget: TransportBudget, began: float) -> AlignResult:
        """The best text of every particle, with rewards and counts. Raises what ``score`` raises."""
        final = [p.best if p.best is not None else self._fallback(p) for p in self.particles]
        self.score([(p.prompt, ids) for p, ids in zip(self.particles, final, strict=True)])
        if self.embeddings is not None and self.aligner.report_continuous:
            rows = [(self.contexts[p.prompt], list(p.start)) for p in self.particles]
            before = self.usage.reward_forward
            values, _ = self.aligner.reward.evaluate(
                [r[0] for r in rows], [r[1] for r in rows], embeddings=self.embeddings, usage=self.usage
            )
            self.usage.reward_report += self.usage.reward_forward - before
            self.continuous = list(values.tolist())
        starts = self.embed([p.start for p in self.particles])
        moved = starts if self.embeddings is None else self.embeddings
        travelled = (moved - starts).flatten(1).norm(dim=1).tolist()
        responses: list[list[Response]] = [[] for _ in self.prompts]
        for index, (particle, ids) in enumerate(zip(self.particles, final, strict=True)):
            key, start = (particle.prompt, ids), (particle.prompt, particle.start)
            scored = key in self.log_probabilities
            same_length = len(ids) == len(particle.start)
            here = self.embed([ids])[0]
            shift = (here - starts[index, : len(ids)]).norm().item() if same_length else math.nan
            responses[particle.prompt].append(
                Response(
                    text=particle.start_text if ids == particle.start else self.aligner.vocabulary.decode(list(ids)),
                    reward=self.rewards[key],
                    start_text=particle.start_text,
                    start_reward=self.rewards.get(start),
                    continuous_reward=self.continuous[index],
                    log_probability=self.log_probabilities.get(key),
                    start_log_probability=self.log_probabilities.get(start),
                    perplexity=self.perplexity(*key) if scored else None,
                    start_perplexity=self.perplexity(*start) if scored else None,
                    perplexity_bound=self.bounds[index],
                    tokens=len(ids),
                    tokens_changed=_changes(ids, particle.start),
                    distance=shift,
                    travelled=travelled[index],
                )
            )
        seconds = time.perf_counter() - began
        return AlignResult(method, self.prompts, responses, self.transport, self.usage, seconds)

    def _fallback(self, particle: Particle) -> tuple[int, ...]:
        """Nothing feasible came up: the first text, or where it was not evaluated, the last."""
        return particle.start if (particle.prompt, particle.start) in self.rewards else particle.ids


def _changes(ids: tuple[int, ...], start: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(ids, start, strict=False)) + abs(len(ids) - len(start))
