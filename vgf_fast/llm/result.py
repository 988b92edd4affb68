"""What an alignment returns: the responses with their figures, and what they cost."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class Usage:
    """Passes that a call made. A reward unit is one row's forward pass; a backward pass is one more."""

    reward_forward: int = 0  # rows through the reward model
    reward_backward: int = 0  # of them with a gradient
    reward_tokens: int = 0  # tokens of these passes, a backward pass counted again
    reward_report: int = 0  # of the forward rows, those for the report alone
    reference_tokens: int = 0  # tokens through the reference model: sampling, decoding and scoring
    reference_calls: int = 0  # calls of the reference model
    vocabulary_rows: int = 0  # embeddings multiplied with the whole table of embeddings

    @property
    def reward_units(self) -> int:
        """Forward and backward passes of the search, the report's left out."""
        return self.reward_forward + self.reward_backward - self.reward_report


@dataclasses.dataclass(frozen=True)
class Response:
    """One response to one prompt."""

    text: str
    reward: float  # of the text as the tokenizer cuts it
    start_text: str  # the particle's first text
    start_reward: float | None  # None where the search did not ask for it
    continuous_reward: float | None  # of the particle's embeddings; None where it did not move
    log_probability: float | None  # natural, under the reference model given the prompt, the end included
    start_log_probability: float | None
    perplexity: float | None  # per token under the reference model, the end included
    start_perplexity: float | None
    perplexity_bound: float | None  # the fluency bound; None where there is none
    tokens: int
    tokens_changed: int  # places at which it differs from the first text
    distance: float  # of the text's embeddings [T, d] from the first text's
    travelled: float  # of the particle's embeddings from the first text's

    @property
    def feasible(self) -> bool:
        """Whether the text keeps to the fluency bound."""
        bound, perplexity = self.perplexity_bound, self.perplexity
        return bound is None or (perplexity is not None and perplexity <= bound * (1 + 1e-6))


@dataclasses.dataclass(frozen=True)
class Transport:
    """How far a prompt's particles moved, as the squared maximum mean discrepancy between first and last particles.

    Kernel exp(-|x - y|^2 / (2 sigma^2)) on flattened embeddings, sigma^2 half the median squared distance of the first
    particles. ``bound`` is the paper's, (2 L / (sigma sqrt e)) eps (c / alpha + 1 / (sigma sqrt e)), with the longest
    step met in place of its own bound eps (c / alpha + ...): steps may be normalised.
    """

    mmd_squared: float
    bound: float


@dataclasses.dataclass(frozen=True)
class AlignResult:
    """Responses of a call, ``responses[i]`` those to prompt i, with what they cost."""

    method: str
    prompts: list[str]
    responses: list[list[Response]]
    transport: list[Transport | None]
    usage: Usage
    seconds: float

    @property
    def best(self) -> list[Response]:
        """For every prompt the response of highest reward among those within the fluency bound (of all, if none is)."""
        return [best_response(responses) for responses in self.responses]

    @property
    def texts(self) -> list[str]:
        """Texts of ``best``."""
        return [response.text for response in self.best]

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of JSON types."""
        return dataclasses.asdict(self)


def best_response(responses: list[Response]) -> Response:
    """Highest reward among the feasible, else among all; the first of equals."""
    return max([r for r in responses if r.feasible] or responses, key=lambda response: response.reward)
