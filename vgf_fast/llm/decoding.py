"""From particles to text: a beam over tokens near the particle's embeddings and likely under the reference model."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vgf_fast.llm.nearest import nearest_token, squared_norms
from vgf_fast.llm.reference_model import PrefixState, ReferenceModel
from vgf_fast.llm.result import Usage
from vgf_fast.llm.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How particles become text. Raises ``ValueError`` when a field is outside its range.

    A token v at a particle's position u scores -(|u - E_v|^2 - |u - E_current|^2) / (2 closeness) + lambda log p(v).
    """

    top_k: int = 50  # candidates that the reference model finds likely after the prefix
    top_flow: int = 20  # candidates nearest to the particle, over the whole vocabulary; at most 32
    width: int = 5  # of the beam
    closeness: float = 0.4  # in squared median lengths of a token embedding
    weights: tuple[float, ...] = (
        0.0,
        0.02,
        0.05,
        0.1,
        0.2,
        0.4,
        0.8,
        1.6,
        3.2,
    )  # lambda, the least that is fluent wins
    max_rows: int = 512  # beams that the reference model continues at once

    def __post_init__(self) -> None:
        if self.top_k < 1 or not 1 <= self.top_flow <= 32 or self.width < 1 or self.max_rows < self.width:
            raise ValueError(
                f"Decoding has top_k={self.top_k}, top_flow={self.top_flow}, width={self.width}, "
                f"max_rows={self.max_rows}: expected top_k >= 1, top_flow 1 to 32, width >= 1, max_rows >= width"
            )
        if not self.closeness > 0 or not self.weights or list(self.weights) != sorted(set(self.weights)):
            raise ValueError(
                f"Decoding has closeness={self.closeness}, weights={self.weights}: expected a positive closeness and "
                "increasing weights"
            )


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A decoded response: its ids, log p(response, end | prompt), and the beam's score."""

    ids: tuple[int, ...]
    log_probability: float
    score: float

    @property
    def perplexity(self) -> float:
        """Per token, the end included."""
        return math.exp(-self.log_probability / (len(self.ids) + 1))


class BeamDecoder:
    """Decodes particles in the space of ``table`` [V, d] under ``reference``; substitutions only, lengths stay."""

    def __init__(self, reference: ReferenceModel, vocabulary: Vocabulary, table: Tensor, unit: float, how: Decoding):
        self.reference = reference
        self.vocabulary = vocabulary
        self.table = table
        self.how = how
        self.temperature = how.closeness * unit**2
        self.at_once = max(1, how.max_rows // how.width)  # responses
        # What begins a word can stand anywhere; a piece inside a word only where the prefix asks for it.
        self.begins = vocabulary.allowed & ~vocabulary.continues
        self.squares = squared_norms(table)
        # Added to log-probabilities: one pass over them, where a mask would take two.
        self.forbidden = torch.zeros(vocabulary.size, dtype=torch.float32, device=table.device).masked_fill(
            ~vocabulary.allowed, -torch.inf
        )

    def near(self, particles: Tensor) -> Tensor:
        """Tokens [R, T, top_flow] nearest to particles [R, T, d] that may begin a word."""
        rows, length, width = particles.shape
        count = min(self.how.top_flow, int(self.begins.sum()))
        flat = particles.reshape(-1, width)
        _, indices = nearest_token(flat, self.table, k=count, mask=self.begins, table_squares=self.squares)
        return indices.reshape(rows, length, count)

    def search(
        self,
        prompts: Sequence[list[int]],
        particles: Tensor,
        current: Sequence[tuple[int, ...]],
        bounds: Sequence[float],
        starts: Sequence[int],
        usage: Usage | None = None,
    ) -> tuple[list[Hypothesis | None], list[int]]:
        """For every particle the hypothesis of the least weight lambda that is fluent, new, and comes back from text.

        ``particles`` [R, T, d], ``bounds`` [R] on the perplexity, ``starts`` [R] where in ``weights`` the search
        begins: it goes up from there until something fits, or down as long as something does. Returns hypotheses,
        None where no weight gives one, and the places in ``weights`` where they were found.
        """
        near = self.near(particles)
        if usage is not None:
            usage.vocabulary_rows += sum(map(len, current))
        rows = len(current)
        last = len(self.how.weights) - 1
        found: list[Hypothesis | None] = [None] * rows
        place = [min(max(start, 0), last) for start in starts]
        at = list(place)
        going = list(range(rows))
        while going:
            weights = [self.how.weights[place[i]] for i in going]
            index = torch.tensor(going, dtype=torch.long, device=particles.device)
            beams = self.beams(
                [prompts[i] for i in going], particles[index], near[index], [current[i] for i in going], weights, usage
            )
            left = []
            for i, hypotheses in zip(going, beams, strict=True):
                good = next((h for h in hypotheses if self._fits(h, current[i], bounds[i])), None)
                rising = found[i] is None
                if good is not None:
                    found[i], at[i] = good, place[i]
                # Up until the first success; down from a success at the place where the search began.
                if good is None and rising and place[i] >= starts[i] and place[i] < last:
                    place[i] += 1
                    left.append(i)
                elif good is not None and place[i] <= starts[i] and place[i] > 0:
                    place[i] -= 1
                    left.append(i)
            going = left
        return found, at

    def _fits(self, hypothesis: Hypothesis, current: tuple[int, ...], bound: float) -> bool:
        return (
            hypothesis.perplexity <= bound
            and hypothesis.ids != current
            and self.vocabulary.comes_back(list(hypothesis.ids))
        )

    def beams(
        self,
        prompts: Sequence[list[int]],
        particles: Tensor,
        near: Tensor,
        current: Sequence[tuple[int, ...]],
        weights: Sequence[float],
        usage: Usage | None = None,
    ) -> list[list[Hypothesis]]:
        """Final beams of R particles, best first; ``near`` [R, T, top_flow] as ``near`` gives it."""
        out: list[list[Hypothesis]] = []
        while len(out) < len(current):
            part = slice(len(out), len(out) + self.at_once)
            try:
                out += self._beams(prompts[part], particles[part], near[part], current[part], weights[part], usage)
            except torch.OutOfMemoryError:
                count = len(current[part])
                if count == 1:
                    raise
                self.at_once = count // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                warnings.warn(
                    f"{self.reference.name}: beams of {count} responses did not fit into memory; going on with "
                    f"{self.at_once} at once (give Decoding(max_rows={self.at_once * self.how.width}) to begin there)",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return out

    def _beams(
        self,
        prompts: Sequence[list[int]],
        particles: Tensor,
        near: Tensor,
        current: Sequence[tuple[int, ...]],
        weights: Sequence[float],
        usage: Usage | None,
    ) -> list[list[Hypothesis]]:
        device = particles.device
        width = self.how.width
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        read = self.reference.read([list(p) for p in distinct], usage)
        whose = torch.tensor([distinct.index(tuple(p)) for p in prompts], dtype=torch.long, device=device)
        state = self.reference.select(read, whose)
        alive = list(range(len(current)))  # particles whose responses go on
        beams: list[list[tuple[int, ...]]] = [[()] for _ in current]
        words: list[list[tuple[int, ...]]] = [[()] for _ in current]  # pieces of the word that is being spelled
        score = torch.zeros(len(current), 1, dtype=torch.float32, device=device)
        total = torch.zeros(len(current), 1, dtype=torch.float32, device=device)
        weight = torch.tensor(weights, dtype=torch.float32, device=device)
        done: list[list[Hypothesis]] = [[] for _ in current]
        for position in range(max(map(len, current)) + 1):
            state, alive, score, total, weight = self._finish(
                position, state, alive, beams, words, score, total, weight, current, done
            )
            if not alive:
                break
            index = torch.tensor(alive, dtype=torch.long, device=device)
            now = torch.tensor([current[i][position] for i in alive], dtype=torch.long, device=device)
            count = score.shape[1]
            log_probability = state.next_log_probability.reshape(len(alive), count, -1)
            candidates, likely = self._candidates(position, log_probability, near[index, position], now, alive, words)
            gain = self._closeness(particles[index, position], candidates, now)
            # Zero times minus infinity is no number: what may not follow is left out by itself.
            ranked = score[..., None] + gain + weight[:, None, None] * likely.clamp_min(torch.finfo(likely.dtype).min)
            ranked = ranked.masked_fill(likely == -torch.inf, -torch.inf).flatten(1)
            totals = (total[..., None] + likely).flatten(1)
            score, chosen = ranked.topk(min(width, ranked.shape[1]), dim=1)
            total = totals.gather(1, chosen)
            parent = chosen // candidates.shape[2]
            token = candidates.flatten(1).gather(1, chosen)
            for row, (i, parents, tokens) in enumerate(zip(alive, parent.tolist(), token.tolist(), strict=True)):
                dead = (score[row] == -torch.inf).tolist()
                pairs = list(zip(parents, tokens, dead, strict=True))
                words[i] = [() if gone else self._spell(words[i][p], t) for p, t, gone in pairs]
                beams[i] = [(*beams[i][p], t) for p, t, _ in pairs]
            rows = (torch.arange(len(alive), device=device)[:, None] * count + parent).flatten()
            # After the last token of the longest response its end is still to be scored: one more call.
            state = self.reference.advance(state, token.flatten(), usage, rows)
        return done

    def _spell(self, word: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*word, token) if bool(self.vocabulary.continues[token]) and word else (token,)

    def _finish(
        self,
        position: int,
        state: PrefixState,
        alive: list[int],
        beams: list[list[tuple[int, ...]]],
        words: list[list[tuple[int, ...]]],
        score: Tensor,
        total: Tensor,
        weight: Tensor,
        current: Sequence[tuple[int, ...]],
        done: list[list[Hypothesis]],
    ) -> tuple[PrefixState, list[int], Tensor, Tensor, Tensor]:
        """End the responses that have their length; returns what goes on."""
        ended = [row for row, i in enumerate(alive) if len(current[i]) == position]
        if not ended:
            return state, alive, score, total, weight
        count = score.shape[1]
        end = self.reference.end_log_probability(state.next_log_probability).reshape(len(alive), count)
        final = (score + weight[:, None] * end).tolist()
        totals = (total + end).tolist()
        for row in ended:
            i = alive[row]
            found = [
                Hypothesis(beams[i][b], totals[row][b], final[row][b])
                for b in range(count)
                if final[row][b] > -math.inf and self.vocabulary.is_word(words[i][b])
            ]
            done[i] = sorted(found, key=lambda hypothesis: -hypothesis.score)
        rest = [row for row in range(len(alive)) if row not in set(ended)]
        if not rest:
            return state, [], score, total, weight
        keep = torch.tensor(rest, dtype=torch.long, device=score.device)
        rows = (keep[:, None] * count + torch.arange(count, device=score.device)).flatten()
        return self.reference.select(state, rows), [alive[r] for r in rest], score[keep], total[keep], weight[keep]

    def _candidates(
        self,
        position: int,
        log_probability: Tensor,
        near: Tensor,
        now: Tensor,
        alive: list[int],
        words: list[list[tuple[int, ...]]],
    ) -> tuple[Tensor, Tensor]:
        """Ids [A, W, C] that may follow each beam, and their log-probabilities, -inf where one may not."""
        beams = log_probability.shape[1]
        likely = log_probability + self.forbidden
        if position == 0:
            # A response goes on as its first text does: with a new word, or inside the prompt's last one.
            inside = self.vocabulary.continues & ~self.vocabulary.continues[now][:, None]
            likely = likely.masked_fill(inside[:, None], -torch.inf)
        top, prior = likely.topk(min(self.how.top_k, likely.shape[-1]), dim=-1)
        near = near[:, None].expand(-1, beams, -1)
        present = now[:, None, None].expand(-1, beams, 1)
        extra = torch.cat([near, present], dim=-1)
        value = likely.gather(-1, extra)
        # Each token once.
        twice = (extra[..., None] == prior[:, :, None]).any(-1)
        twice[..., -1] |= (near == present).any(-1)
        candidates = torch.cat([prior, extra], dim=-1)
        value = torch.cat([top, value.masked_fill(twice, -torch.inf)], dim=-1)
        # A word that would be cut otherwise has to go on.
        unfinished = torch.tensor(
            [[not self.vocabulary.is_word(w) for w in words[i]] for i in alive], dtype=torch.bool, device=value.device
        )
        stuck = unfinished[..., None] & ~self.vocabulary.continues[candidates]
        return candidates, value.masked_fill(stuck, -torch.inf)

    def _closeness(self, particles: Tensor, candidates: Tensor, now: Tensor) -> Tensor:
        """-(|u - E_v|^2 - |u - E_now|^2) / (2 closeness) of u [A, d], v [A, W, C], now [A]."""
        # From differences to u, not expanded squares: particles go far and the digits would cancel.
        away = torch.nn.functional.embedding(candidates, self.table).float() - particles[:, None, None]
        there = torch.linalg.vector_norm(away, dim=-1).square()
        here = (self.table[now].float() - particles).square().sum(-1)
        return (here[:, None, None] - there) / (2 * self.temperature)
