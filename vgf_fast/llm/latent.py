"""The flow in a latent space: particles that a differentiable decoder turns into a response's embeddings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgf_fast.config import TransportBudget
from vgf_fast.llm.aligner import Aligner, Run
from vgf_fast.llm.embedding_flow import transport
from vgf_fast.llm.nearest import nearest_token
from vgf_fast.llm.reference_model import ReferenceModel
from vgf_fast.llm.result import AlignResult, Usage
from vgf_fast.llm.reward import Reward
from vgf_fast.llm.token_flow import token_svgd_direction


class LatentFlow(Aligner):
    """Value gradient flow of latents z, moved along (1 / alpha) J^T grad R with J the decoder's Jacobian.

    ``decoder`` maps latents [N, ...] to embeddings [N, T, d] in the reward model's table. Every step decodes: each
    place goes to its nearest token, the text is scored as the tokenizer cuts it, and the best within the fluency bound
    is kept. ``straight_through``: the reward's gradient is taken at the decoded tokens, else at the decoder's output.
    ``normalized``: a step has length ``budget.step_size``; else the direction is multiplied by it.

    Raises ``ValueError`` when the decoder's output is not of shape [N, T, d].
    """

    method = "latent flow"

    def __init__(
        self,
        reward_model: Reward | nn.Module,
        tokenizer: Any = None,
        *,
        decoder: Callable[[Tensor], Tensor],
        reference: ReferenceModel | nn.Module | None = None,
        svgd: bool = False,
        straight_through: bool = True,
        normalized: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(reward_model, tokenizer, reference=reference, **arguments)
        self.decoder = decoder
        self.svgd = svgd
        self.straight_through = straight_through
        self.normalized = normalized

    def align_latents(
        self, prompts: Sequence[str], latents: Sequence[Tensor], *, budget: TransportBudget | None = None
    ) -> AlignResult:
        """Better responses to every prompt, from its latents [N, ...]; ``budget.steps`` 0 decodes them as they are.

        Raises ``ValueError`` for an empty prompt, or latents that do not decode to embeddings.
        """
        began = time.perf_counter()
        budget = budget or TransportBudget()
        usage = Usage()
        if len(prompts) != len(latents):
            raise ValueError(f"latents has {len(latents)} entries, expected one for each of {len(prompts)} prompts")
        contexts = self._contexts(prompts)
        moving = [z.detach().clone() for z in latents]
        first = [[self.vocabulary.decode(row) for row in self._tokens(self._decode(z), usage)] for z in moving]
        run = Run(self, list(prompts), contexts, first, None, usage)
        run.evaluate(range(len(run.particles)), False, budget)
        starts = [z.flatten(1) for z in moving]
        longest = [0.0] * len(moving)
        for _ in range(budget.steps):
            index = 0
            for prompt, z in enumerate(moving):
                direction = self._direction(contexts[prompt], z, budget, usage)
                flat = direction.flatten(1)
                length = flat.norm(dim=1, keepdim=True).clamp_min(1e-20)
                step = budget.step_size * (flat / length if self.normalized else flat)
                longest[prompt] = max(longest[prompt], float(step.norm(dim=1).max()))
                moving[prompt] = z + step.reshape(z.shape)
                for row in self._tokens(self._decode(moving[prompt]), usage):
                    run.particles[index].ids = tuple(self.vocabulary.encode(self.vocabulary.decode(row)))
                    index += 1
            run.score([(p.prompt, p.ids) for p in run.particles])
            run.evaluate(range(len(run.particles)), False, budget)
        if budget.steps:
            for prompt, (start, z) in enumerate(zip(starts, moving, strict=True)):
                path = budget.steps * longest[prompt]
                run.transport[prompt] = transport(start, z.flatten(1), path)
        return run.result(self.method, budget, began)

    def _decode(self, latents: Tensor) -> Tensor:
        embeddings = self.decoder(latents)
        width = self.reward.table.shape[1]
        if embeddings.ndim != 3 or embeddings.shape[0] != len(latents) or embeddings.shape[2] != width:
            raise ValueError(
                f"decoder returned shape {tuple(embeddings.shape)} for {len(latents)} latents, expected "
                f"({len(latents)}, T, {width})"
            )
        return embeddings

    def _tokens(self, embeddings: Tensor, usage: Usage) -> list[list[int]]:
        flat = embeddings.detach().float().flatten(0, 1)
        usage.vocabulary_rows += len(flat)
        _, nearest = nearest_token(flat, self.reward.table, mask=self.vocabulary.allowed)
        return nearest.reshape(embeddings.shape[:2]).tolist()

    def _direction(self, context: list[int], latents: Tensor, budget: TransportBudget, usage: Usage) -> Tensor:
        with torch.enable_grad():
            z = latents.detach().requires_grad_()
            embeddings = self._decode(z)
            rows = self._tokens(embeddings, usage)
            at = None if self.straight_through else embeddings.detach().float()
            _, gradient = self.reward.evaluate([context] * len(rows), rows, embeddings=at, gradient=True, usage=usage)
            assert gradient is not None
            (score,) = torch.autograd.grad(embeddings, z, gradient.to(embeddings.dtype))
        if not self.svgd:
            return score / budget.temperature
        phi = token_svgd_direction(latents.flatten(1).float(), score.flatten(1).float(), budget.temperature)
        return phi.reshape(latents.shape).to(latents.dtype)
