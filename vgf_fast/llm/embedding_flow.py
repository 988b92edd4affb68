"""Embedding flow: sampled responses as particles in embedding space, moved by the reward's gradient and decoded."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vgf_fast.config import TransportBudget
from vgf_fast.llm.aligner import Aligner, Run
from vgf_fast.llm.decoding import BeamDecoder, Decoding
from vgf_fast.llm.nearest import nearest_token
from vgf_fast.llm.reference_model import ReferenceModel
from vgf_fast.llm.result import Transport
from vgf_fast.llm.reward import Reward
from vgf_fast.llm.token_flow import token_svgd_direction

Mode = Literal["projected", "plain"]
Update = Literal["normalized", "adam", "ascent"]


class EmbeddingFlow(Aligner):
    """Value gradient flow of responses in embedding space.

    A response is a particle u [T, d], at first its tokens' embeddings. Every step moves it along the reward's gradient
    and, with ``svgd``, along SVGD's direction between the responses to one prompt, then decodes it.
    ``mode="projected"``: the gradient is taken at the decoded tokens, a beam decodes under closeness to u and the
    reference model's likelihood within the fluency bound, the particle's tokens always go there, u itself is never
    reset, and the best decoded text within the bound is returned. ``mode="plain"``, the paper's: the gradient is taken
    at u, and the last u alone goes to its nearest tokens, fluent or not.

    ``update``: the direction's length per token 1, Adam's, or as it is.

    Raises ``ValueError`` naming an argument that is none of its choices, or a reference model that is missing.
    """

    def __init__(
        self,
        reward_model: Reward | nn.Module,
        tokenizer: Any = None,
        *,
        reference: ReferenceModel | nn.Module | None = None,
        mode: Mode = "projected",
        update: Update = "normalized",
        svgd: bool = False,
        decoding: Decoding | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(reward_model, tokenizer, reference=reference, **arguments)
        if mode not in ("projected", "plain"):
            raise ValueError(f"mode is {mode!r}, expected 'projected' or 'plain'")
        if update not in ("normalized", "adam", "ascent"):
            raise ValueError(f"update is {update!r}, expected 'normalized', 'adam' or 'ascent'")
        if mode == "projected" and self.reference is None:
            raise ValueError("reference is None, expected a causal language model: mode='projected' decodes with it")
        self.mode = mode
        self.update = update
        self.svgd = svgd
        self.decoding = decoding or Decoding()
        self.method = f"embedding flow ({mode}{', SVGD' if svgd else ''})"

    def _improve(self, run: Run, budget: TransportBudget) -> None:
        if budget.steps == 0:
            run.evaluate(range(len(run.particles)), False, budget)
            return
        flow = _Flow(self, run, budget)
        if self.mode == "plain":
            flow.plain()
        else:
            flow.projected()
        flow.report()


class _Flow:
    """Moving embeddings of a run's particles."""

    def __init__(self, aligner: EmbeddingFlow, run: Run, budget: TransportBudget) -> None:
        self.aligner = aligner
        self.run = run
        self.budget = budget
        self.starts = run.embed([p.start for p in run.particles])
        self.u = self.starts.clone()
        self.lengths = [len(p.start) for p in run.particles]
        self.first_moment = torch.zeros_like(self.u)
        self.second_moment = torch.zeros_like(self.u)
        self.steps = 0
        self.longest = 0.0  # step of a particle
        self.real = torch.zeros(self.u.shape[:2], dtype=torch.bool, device=self.u.device)
        for row, length in enumerate(self.lengths):
            self.real[row, :length] = True
        self.groups = [
            [i for i, p in enumerate(run.particles) if p.prompt == prompt] for prompt in range(len(run.prompts))
        ]

    def decoder(self) -> BeamDecoder:
        aligner = self.aligner
        assert aligner.reference is not None
        return BeamDecoder(aligner.reference, aligner.vocabulary, aligner.reward.table, aligner.unit, aligner.decoding)

    def move(self, gradient: Tensor) -> None:
        """One step of all particles along the reward's gradient [M, T, d] at each."""
        budget = self.budget
        if self.aligner.svgd:
            direction = torch.zeros_like(gradient)
            for group in self.groups:
                flat = self.u[group].flatten(1), gradient[group].flatten(1)
                phi = token_svgd_direction(*flat, budget.temperature)
                direction[group] = phi.reshape(direction[group].shape)
        else:
            direction = gradient / budget.temperature
        size = budget.step_size * self.aligner.unit
        self.steps += 1
        if self.aligner.update == "normalized":
            step = size * direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        elif self.aligner.update == "adam":
            self.first_moment.lerp_(direction, 0.1)
            self.second_moment.lerp_(direction.square(), 0.001)
            mean = self.first_moment / (1 - 0.9**self.steps)
            square = self.second_moment / (1 - 0.999**self.steps)
            # Adam's step has length 1 in every coordinate; a token's is to be step_size.
            step = size / math.sqrt(self.u.shape[-1]) * mean / (square.sqrt() + 1e-8)
        else:
            step = size * direction
        step = step * self.real[..., None]
        self.longest = max(self.longest, float(step.flatten(1).norm(dim=1).max()))
        self.u += step
        radius = getattr(budget, "trust_radius", None)
        if radius is not None:
            away = self.u - self.starts
            length = away.norm(dim=-1, keepdim=True).clamp_min(1e-20)
            self.u = self.starts + away * (radius * self.aligner.unit / length).clamp_max(1.0)

    def projected(self) -> None:
        """Gradient at the decoded tokens; decoded after every step."""
        run, budget = self.run, self.budget
        decoder = self.decoder()
        # Half of the grid: the first search goes up or down from there.
        for particle in run.particles:
            particle.weight = len(self.aligner.decoding.weights) // 2
        active = run.begin(budget)
        for step in range(budget.steps):
            if not active:
                break
            gradient = torch.zeros_like(self.u)
            for i in active:
                particle = run.particles[i]
                gradient[i, : self.lengths[i]] = run.gradients[particle.prompt, particle.ids]
            self.move(gradient)
            moved = self._decode(decoder, active)
            last = step == budget.steps - 1
            reached = run.evaluate(moved, not last, budget)
            if not last:
                # What is left of the units buys rewards without gradients.
                stopped = [i for i in moved if i not in set(reached)]
                run.evaluate(stopped, False, budget)
                active = [i for i in active if i not in set(stopped)]

    def _decode(self, decoder: BeamDecoder, active: list[int]) -> list[int]:
        """Move the tokens of particles to what decodes from them; returns the particles whose tokens changed."""
        run = self.run
        particles = [run.particles[i] for i in active]
        bounds = [math.inf if b is None else b for b in (run.bounds[i] for i in active)]
        found, places = decoder.search(
            [run.contexts[p.prompt] for p in particles],
            self.u[active],
            [p.ids for p in particles],
            bounds,
            [p.weight for p in particles],
            run.usage,
        )
        moved = []
        for index, particle, hypothesis, place in zip(active, particles, found, places, strict=True):
            if hypothesis is not None:
                particle.ids, particle.weight = hypothesis.ids, place
                run.log_probabilities.setdefault((particle.prompt, hypothesis.ids), hypothesis.log_probability)
                moved.append(index)
        return moved

    def plain(self) -> None:
        """Gradient at the embeddings; nearest tokens once, at the end."""
        run, budget, aligner = self.run, self.budget, self.aligner
        limit = getattr(budget, "reward_units", None)
        prompts = [run.contexts[p.prompt] for p in run.particles]
        rows = [list(p.start) for p in run.particles]
        largest = max(len(group) for group in self.groups)
        for _ in range(budget.steps):
            # A step costs every prompt two units a particle; the last texts cost one each.
            if limit is not None and max(self.run.spent) + 3 * largest > limit:
                break
            _, gradient = aligner.reward.evaluate(prompts, rows, embeddings=self.u, gradient=True, usage=run.usage)
            for prompt, group in enumerate(self.groups):
                run.spent[prompt] += 2 * len(group)
            assert gradient is not None
            self.move(gradient)
        flat = self.u.flatten(0, 1)
        run.usage.vocabulary_rows += sum(self.lengths)
        _, nearest = nearest_token(flat, aligner.reward.table, mask=aligner.vocabulary.allowed)
        tokens = nearest.reshape(self.u.shape[:2]).tolist()
        for row, particle in enumerate(run.particles):
            text = aligner.vocabulary.decode(tokens[row][: self.lengths[row]])
            particle.ids = tuple(aligner.vocabulary.encode(text))
        run.score([(p.prompt, p.ids) for p in run.particles])
        run.evaluate(range(len(run.particles)), False, budget)
        for particle in run.particles:
            # The paper returns what was decoded, fluent or not.
            particle.best = particle.ids

    def report(self) -> None:
        """Leave with the run where the particles are, and how far that is."""
        self.run.embeddings = self.u
        for prompt, group in enumerate(self.groups):
            before, after = self.starts[group].flatten(1), self.u[group].flatten(1)
            self.run.transport[prompt] = transport(before, after, self.steps * self.longest)


def transport(before: Tensor, after: Tensor, path: float) -> Transport:
    """MMD^2 between particles [N, D] and [N, D], and its bound for paths no longer than ``path``."""
    distances = torch.cdist(before.double(), before.double()).square()
    sigma = math.sqrt(0.5 * float(distances.median())) or math.sqrt(before.shape[1])

    def mean(a: Tensor, b: Tensor) -> float:
        return float((-torch.cdist(a.double(), b.double()).square() / (2 * sigma**2)).exp().mean())

    squared = mean(before, before) - 2 * mean(before, after) + mean(after, after)
    return Transport(max(squared, 0.0), 2 * path / (sigma * math.sqrt(math.e)))
