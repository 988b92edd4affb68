"""The reference model samples responses, tells how likely they are, and continues beams with its key-value cache."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgf_fast.llm.chunks import run_in_chunks
from vgf_fast.llm.result import Usage
from vgf_fast.llm.reward import context_length
from vgf_fast.llm.vocabulary import Vocabulary, pad_ids

# Numbers in a block of logits: half a gigabyte in float32.
_LOGITS = 2**27


@dataclasses.dataclass
class PrefixState:
    """Rows of prefixes read by the model: its cache, and log-probabilities [R, V] of what comes next."""

    cache: Any
    mask: Tensor  # [R, S]
    positions: Tensor  # [R], of the next token
    next_log_probability: Tensor


class ReferenceModel:
    """A causal language model of transformers as the prior over responses.

    A row is ``prefix + prompt + response`` and an end token; ``prefix`` is what the tokenizer puts before a text unless
    given. ``end``: the ids that end a response, by default the configuration's. Probabilities are the model's own over
    its whole vocabulary; sampling leaves out what ``vocabulary`` does not allow.

    Raises ``ValueError`` when no end token is known.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        prefix: Sequence[int] | None = None,
        end: int | Sequence[int] | None = None,
        max_tokens: int = 16384,
    ) -> None:
        self.name = type(model).__name__
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, expected a positive number of tokens a pass")
        config: Any = model.config
        self.model = model.eval().requires_grad_(False)
        get_embedding: Any = model.get_input_embeddings
        weight: Tensor = get_embedding().weight
        self.device = weight.device
        self.vocabulary = Vocabulary(tokenizer, len(weight)).to(self.device)
        self.prefix = list(self.vocabulary.prefix if prefix is None else prefix)
        found = end if end is not None else getattr(config, "eos_token_id", None)
        found = found if found is not None else tokenizer.eos_token_id
        if found is None:
            raise ValueError(f"{self.name} and its tokenizer name no end-of-text token: give end")
        self.end = [found] if isinstance(found, int) else list(found)
        self.max_length = context_length(config)
        self.max_tokens = max_tokens
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._last_only = "logits_to_keep" in accepted
        head: Any = model.get_output_embeddings
        outputs = head().weight
        body = sum(p.numel() for p in model.parameters()) - weight.numel()
        # The matrix that makes logits is multiplied with, also where it is the embedding's own.
        self.parameters = body + (outputs.numel() if outputs is weight else 0)

    def check_length(self, prompt: Sequence[int], response_length: int) -> None:
        """Raise ``ValueError`` when prompt and response would not fit into the model."""
        total = len(self.prefix) + len(prompt) + response_length
        if self.max_length is not None and total > self.max_length:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and a response of {response_length} make {total} with the special "
                f"tokens, but {self.name} reads at most {self.max_length}: shorten them"
            )

    def end_log_probability(self, log_probability: Tensor) -> Tensor:
        """log p of ending, [...] from log-probabilities [..., V]; from logits, short of the same constant."""
        return log_probability[..., self.end].logsumexp(-1)

    def _call(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, usage: Usage | None
    ) -> tuple[Tensor, Any]:
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            arguments["position_ids"] = positions
        if self._last_only:
            arguments["logits_to_keep"] = 1
        with torch.no_grad():
            out = self.model(**arguments, use_cache=True)
        if usage is not None:
            usage.reference_calls += 1
            usage.reference_tokens += int(mask[:, -ids.shape[1] :].sum())
        return out.logits[:, -1].float().log_softmax(-1), out.past_key_values

    def read(self, prompts: Sequence[list[int]], usage: Usage | None = None) -> PrefixState:
        """Read ``prefix + prompt`` of every row."""
        rows = [[*self.prefix, *prompt] for prompt in prompts]
        ids, mask = pad_ids(rows, self.end[0], "left", self.device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        log_probability, cache = self._call(ids, mask, positions, None, usage)
        return PrefixState(cache, mask, positions[:, -1] + 1, log_probability)

    def select(self, state: PrefixState, rows: Tensor) -> PrefixState:
        """The state of rows [R'] of a state, any row any number of times; ``state`` is used up."""
        state.cache.batch_select_indices(rows)
        return PrefixState(state.cache, state.mask[rows], state.positions[rows], state.next_log_probability[rows])

    def advance(
        self, state: PrefixState, tokens: Tensor, usage: Usage | None = None, rows: Tensor | None = None
    ) -> PrefixState:
        """Rows [R] of a state (all, by default) with one more token [R] each; ``state`` is used up."""
        mask, positions = state.mask, state.positions
        if rows is not None:
            state.cache.batch_select_indices(rows)
            mask, positions = mask[rows], positions[rows]
        mask = torch.cat([mask, mask.new_ones(len(tokens), 1)], dim=1)
        log_probability, cache = self._call(tokens[:, None], mask, positions[:, None], state.cache, usage)
        return PrefixState(cache, mask, positions + 1, log_probability)

    def sample(
        self,
        prompts: Sequence[list[int]],
        count: int,
        *,
        max_new_tokens: int,
        min_new_tokens: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        usage: Usage | None = None,
    ) -> list[list[list[int]]]:
        """``count`` responses to every prompt, as ids without the end token.

        Raises ``ValueError`` for an empty prompt, and for responses that would not fit into the model.
        """
        if count < 1 or not 1 <= min_new_tokens <= max_new_tokens or not temperature > 0:
            raise ValueError(
                f"count={count}, min_new_tokens={min_new_tokens}, max_new_tokens={max_new_tokens}, "
                f"temperature={temperature}: expected count >= 1, 1 <= min <= max and a temperature above 0"
            )
        for prompt in prompts:
            if not prompt:
                raise ValueError("prompt is empty, expected at least one token")
            self.check_length(prompt, max_new_tokens)
        found: list[list[list[int]]] = []
        rows_at_once = max(1, _LOGITS // 2 // self.vocabulary.size)
        for prompt in prompts:
            drawn: list[list[int]] = []
            while len(drawn) < count:
                rows = min(rows_at_once, count - len(drawn), max(1, self.max_tokens // (len(prompt) + max_new_tokens)))
                state = self.select(self.read([prompt], usage), torch.zeros(rows, dtype=torch.long, device=self.device))
                drawn += self._sample_rows(state, max_new_tokens, min_new_tokens, temperature, top_k, generator, usage)
            found.append(drawn)
        return found

    def _sample_rows(
        self,
        state: PrefixState,
        longest: int,
        shortest: int,
        temperature: float,
        top_k: int | None,
        generator: torch.Generator | None,
        usage: Usage | None,
    ) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in range(len(state.mask))]
        alive = list(range(len(rows)))
        allowed = self.vocabulary.allowed.clone()
        for position in range(longest):
            allowed[self.end] = position >= shortest
            logits = state.next_log_probability.masked_fill(~allowed, -torch.inf) / temperature
            if position == 0:
                logits = logits.masked_fill(self.vocabulary.continues, -torch.inf)
            if top_k is not None and top_k < logits.shape[1]:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
            ended = torch.isin(drawn, torch.tensor(self.end, dtype=torch.long, device=self.device))
            for row, token, end in zip(alive, drawn.tolist(), ended.tolist(), strict=True):
                if not end:
                    rows[row].append(token)
            going = (~ended).nonzero().flatten()
            alive = [alive[i] for i in going.tolist()]
            if not alive or position == longest - 1:
                break
            state = self.advance(state, drawn[going], usage, going)
        return rows

    def score(self, prompts: Sequence[list[int]], responses: Sequence[list[int]], usage: Usage | None = None) -> Tensor:
        """log p(response, end | prompt) of R rows, [R] float32. Raises ``ValueError`` for rows that do not fit."""
        for prompt, response in zip(prompts, responses, strict=True):
            if not prompt or not response:
                raise ValueError(f"{'response' if prompt else 'prompt'} is empty, expected at least one token")
            self.check_length(prompt, len(response))
        rows = [[*self.prefix, *p, *r] for p, r in zip(prompts, responses, strict=True)]
        scores = torch.zeros(len(rows), dtype=torch.float32, device=self.device)

        def run(chunk: list[int]) -> None:
            # Causal attention: what is filled in on the right changes nothing before it.
            ids, mask = pad_ids([rows[i] for i in chunk], self.end[0], "right", self.device)
            with torch.no_grad():
                logits = self.model(input_ids=ids, attention_mask=mask).logits
            for row, i in enumerate(chunk):
                length, total = len(responses[i]), len(rows[i])
                own = logits[row, total - length - 1 : total].float()
                token = torch.tensor(responses[i], dtype=torch.long, device=self.device)
                scores[i] = own[:-1].gather(-1, token[:, None]).sum() - own.logsumexp(-1).sum()
                scores[i] += self.end_log_probability(own[-1])
            if usage is not None:
                usage.reference_calls += 1
                usage.reference_tokens += int(mask.sum())

        limit = min(self.max_tokens, max(1, _LOGITS // self.vocabulary.size))
        run_in_chunks(self.name, [len(row) for row in rows], limit, run)
        return scores

    def conditionals(self, prompt: list[int], response: list[int], usage: Usage | None = None) -> Tensor:
        """log p(v | prompt, response before the position) [T, V] of one response."""
        ids = torch.tensor([[*self.prefix, *prompt, *response]], dtype=torch.long, device=self.device)
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if usage is not None:
            usage.reference_calls += 1
            usage.reference_tokens += ids.numel()
        return logits[0, -len(response) - 1 : -1].float().log_softmax(-1)
