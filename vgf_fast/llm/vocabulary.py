"""What a tokenizer allows: tokens of a response, tokens that only continue a word, texts that come back the same."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

_UNUSED = re.compile(r"^[\[<]\|?(unused|reserved|extra_id)[^\s]*[\]>]$|^<0x[0-9A-Fa-f]{2}>$")


class Vocabulary:
    """A tokenizer's vocabulary of ``size`` tokens (rows of the embedding table; the tokenizer may know fewer).

    ``allowed`` [V]: neither special, unused, nor only part of a character. ``continues`` [V]: cannot begin a word
    (``##`` of WordPiece; in byte-level BPE and SentencePiece, letters without a leading space). ``prefix`` and
    ``suffix``: the special tokens that the tokenizer puts around a text.

    Raises ``ValueError`` when the tokenizer knows more tokens than the table has rows.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        known = len(tokenizer)
        if known > size:
            raise ValueError(f"tokenizer has {known} tokens, but the model's embedding has {size} rows: not a pair")
        self.tokenizer = tokenizer
        self.size = size
        self.tokens: list[str] = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(known)))]
        special = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {index for index, token in added.items() if getattr(token, "special", False)}
        self.prefix, self.suffix = self._affixes()
        self.continues = torch.zeros(size, dtype=torch.bool, device="cpu")
        self.continues[:known] = torch.tensor(self._continues(), dtype=torch.bool, device="cpu")
        self.allowed = torch.zeros(size, dtype=torch.bool, device="cpu")
        self.allowed[:known] = torch.tensor(
            [i not in special and not _UNUSED.match(token) for i, token in enumerate(self.tokens)],
            dtype=torch.bool,
            device="cpu",
        )
        self._forbid_unreachable()
        self._canonical: dict[tuple[int, ...], bool] = {}

    def _affixes(self) -> tuple[list[int], list[int]]:
        probe = self.encode("a")
        whole = list(self.tokenizer("a").input_ids)
        for start in range(len(whole) - len(probe) + 1):
            if whole[start : start + len(probe)] == probe:
                return whole[:start], whole[start + len(probe) :]
        return [], []

    def _continues(self) -> list[bool]:
        if any(token.startswith("##") for token in self.tokens):
            return [token.startswith("##") for token in self.tokens]
        marks = ("Ġ", "▁", "Ċ", " ")
        if not any(token.startswith(marks) for token in self.tokens):
            return [False] * len(self.tokens)
        return [not token.startswith(marks) and token[:1].isalnum() for token in self.tokens]

    def _forbid_unreachable(self) -> None:
        """Tokens that begin a word, but that the tokenizer would not give back for their own text."""
        first = [i for i in range(len(self.tokens)) if self.allowed[i] and not self.continues[i]]
        texts = [self.decode([i]) for i in first]
        if not texts:
            return
        back = self.tokenizer(texts, add_special_tokens=False).input_ids
        lost = [i for i, text, ids in zip(first, texts, back, strict=True) if list(ids) != [i] or "\ufffd" in text]
        # A tokenizer that gives hardly any token back writes its texts in another way: nothing to learn from it.
        if len(lost) < len(first) // 2:
            self.allowed[lost] = False

    def encode(self, text: str) -> list[int]:
        """Ids of a text with no special tokens around it."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, as they stand."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def comes_back(self, ids: list[int]) -> bool:
        """Whether the text of ``ids`` has exactly these tokens."""
        return self.encode(self.decode(ids)) == ids

    def is_word(self, pieces: tuple[int, ...]) -> bool:
        """Whether the word that ``pieces`` spell is cut into these pieces."""
        if len(pieces) < 2:
            return True
        if pieces not in self._canonical:
            self._canonical[pieces] = self.comes_back(list(pieces))
        return self._canonical[pieces]

    def check_same(self, other: Vocabulary, names: tuple[str, str]) -> None:
        """Raise ``ValueError`` unless both tokenizers have the same tokens under the same ids."""
        if self.tokens == other.tokens:
            return
        pairs = zip(self.tokens, other.tokens, strict=False)
        differ = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.tokens), len(other.tokens)))
        mine, theirs = (t.tokens[differ] if differ < len(t.tokens) else None for t in (self, other))
        raise ValueError(
            f"{names[0]} and {names[1]} have different tokenizers ({len(self.tokens)} and {len(other.tokens)} tokens; "
            f"token {differ} is {mine!r} and {theirs!r}), expected one vocabulary: take models of one family, or give "
            "a callable reward with the reference model's tokenizer"
        )

    def to(self, device: torch.device) -> Vocabulary:
        """The same, its masks on ``device``."""
        self.allowed, self.continues = self.allowed.to(device), self.continues.to(device)
        return self


def pad_ids(rows: list[list[int]], fill: int, side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [R, S], mask [R, S], 1 on real tokens) of rows of unequal lengths, filled on ``side``."""
    longest = max(map(len, rows))
    left = side == "left"
    ids = [[fill] * (longest - len(row)) + row if left else row + [fill] * (longest - len(row)) for row in rows]
    mask = [
        [0] * (longest - len(row)) + [1] * len(row) if left else [1] * len(row) + [0] * (longest - len(row))
        for row in rows
    ]
    return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask, dtype=torch.long, device=device)
