"""Align a language model at test time: the embedding flow beside best-of-N, at the same cost in reward passes.

``python align_language_model.py --reference MODEL --reward MODEL`` takes directories, or names on Hugging Face's hub: a
causal language model, and a sequence classifier with one output and the same tokenizer. Nothing is trained. It needs
the extra ``llm``.
"""

from __future__ import annotations

import argparse

# Before transformers, which takes a folder called kernels, as this repository has, for another package.
from vgf_fast.llm import BestOfN, EmbeddingFlow, TokenBudget, compare  # isort: skip
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def main() -> None:
    """Load both models, align the prompts by both methods, print a table and the best responses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--reward", required=True)
    parser.add_argument("--prompts", nargs="+", default=["The best thing about rain is"])
    parser.add_argument("--reward-units", type=int, default=160, help="a forward pass is 1 unit, with its gradient 2")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.reward)
    reward = AutoModelForSequenceClassification.from_pretrained(options.reward)
    reference = AutoModelForCausalLM.from_pretrained(options.reference)
    # A response's perplexity under the reference stays within 1.5 times that of what the reference itself wrote.
    shared = {"reference": reference, "max_new_tokens": options.new_tokens, "fluency": 1.5}
    methods = {
        "embedding flow": EmbeddingFlow(reward, tokenizer, **shared),
        "best of N": BestOfN(reward, tokenizer, **shared),
    }
    budget = TokenBudget(steps=99, reward_units=options.reward_units)
    results = compare(methods, options.prompts, budget=budget, num_particles=8, seed=0)
    for name, result in results.items():
        for prompt, best in zip(result.prompts, result.best, strict=True):
            print(f"\n{name}: {prompt} | {best.text}  (reward {best.reward:.3f}, perplexity {best.perplexity:.1f})")


if __name__ == "__main__":
    main()
