"""Reward models: rows as if each were alone, gradients, and what is refused."""

import pytest
import torch
from language import byte_pairs, causal, classifier, wordpiece

from vgf_fast.llm import CallableReward, ReferenceModel, RewardModel, Usage

FAMILIES = {"gpt2": "left", "llama": "left", "gpt_neox": "left", "bert": "right", "roberta": "right"}
PROMPTS = ["the old man", "a dog", "the small red house near the river", "rain"]
RESPONSES = ["walks slowly", "sleeps under the big tree and runs", "sees", "plays and the cat sleeps in a boat"]


def encoded(reward):
    return [[reward.vocabulary.encode(text) for text in texts] for texts in (PROMPTS, RESPONSES)]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_padding_side_is_found_and_rows_get_the_reward_they_have_alone(family):
    tokenizer = wordpiece()
    model = classifier(family, tokenizer)
    reward = RewardModel(model, tokenizer)
    assert reward.padding == FAMILIES[family]
    prompts, responses = encoded(reward)
    together, gradients = reward.evaluate(prompts, responses, gradient=True)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = torch.tensor([[2, *prompt, *response, 3]])
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)
        _, gradient = reward.evaluate([prompt], [response], gradient=True)
        torch.testing.assert_close(gradients[i, : len(response)], gradient[0], rtol=1e-4, atol=1e-5)
        assert not gradients[i, len(response) :].any()
    assert together.unique().numel() == len(PROMPTS)


def test_the_other_side_gives_other_rewards(family):
    """What choosing the side is for; encoders with all positions given would not care."""
    tokenizer = wordpiece()
    model = classifier(family, tokenizer)
    right, wrong = (RewardModel(model, tokenizer, padding=side) for side in ("left", "right"))
    if FAMILIES[family] == "right":
        right, wrong = wrong, right
    rows = encoded(right)
    assert (right.evaluate(*rows)[0] - wrong.evaluate(*rows)[0]).abs().max() > 1e-3 or family == "bert"


def test_gradient_is_the_slope_of_the_reward_in_the_response_alone(family):
    tokenizer = wordpiece()
    reward = RewardModel(classifier(family, tokenizer).double(), tokenizer)
    prompts, responses = encoded(reward)
    _, gradients = reward.evaluate(prompts, responses, gradient=True)
    generator = torch.Generator().manual_seed(0)
    longest = max(map(len, responses))
    embeddings = torch.zeros(len(prompts), longest, reward.table.shape[1])
    for row, ids in enumerate(responses):
        embeddings[row, : len(ids)] = reward.embed(torch.tensor(ids))
    direction = torch.randn(embeddings.shape, generator=generator)
    up, down = (reward.evaluate(prompts, responses, embeddings=embeddings + h * direction)[0] for h in (1e-3, -1e-3))
    slopes = (gradients * direction).flatten(1).sum(1)
    torch.testing.assert_close((up - down) / 2e-3, slopes, rtol=1e-2, atol=1e-2)


def test_particles_stay_float32_under_a_bfloat16_model():
    tokenizer = wordpiece()
    exact = RewardModel(classifier("llama", tokenizer), tokenizer)
    rounded = RewardModel(classifier("llama", tokenizer).bfloat16(), tokenizer)
    rows = encoded(exact)
    rewards, gradients = rounded.evaluate(*rows, gradient=True)
    assert rewards.dtype == gradients.dtype == torch.float32
    torch.testing.assert_close(rewards, exact.evaluate(*rows)[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_checkpointing_runs_layers_twice_and_changes_no_number(family):
    tokenizer = wordpiece()
    results, calls = [], []
    for checkpointing in (False, True):
        model = classifier(family, tokenizer)
        reward = RewardModel(model, tokenizer, checkpointing=checkpointing)
        seen = []
        linear = next(m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
        linear.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        results.append(reward.evaluate(*encoded(reward), gradient=True))
        calls.append(len(seen))
    assert calls == [1, 2]
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain)


def linear_reward(tokenizer, limit=10**9, **arguments):
    """Mean of w x over real places; out of memory above ``limit`` rows."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(len(tokenizer), 6, generator=generator)
    weight = torch.randn(6, generator=generator)

    def function(embeddings, mask):
        if len(embeddings) > limit:
            raise torch.OutOfMemoryError("simulated")
        return ((embeddings @ weight) * mask).sum(1) / mask.sum(1)

    return CallableReward(function, tokenizer, table, **arguments)


def test_a_chunk_that_runs_out_of_memory_is_halved_and_said_so():
    tokenizer = wordpiece()
    whole, small = linear_reward(tokenizer), linear_reward(tokenizer, limit=1)
    rows = encoded(whole)
    usage = Usage()
    with pytest.warns(RuntimeWarning, match="going on with 1 at once"):
        found = small.evaluate(*rows, gradient=True, usage=usage)
    for a, b in zip(found, whole.evaluate(*rows, gradient=True), strict=True):
        torch.testing.assert_close(a, b)
    assert (usage.reward_forward, usage.reward_backward) == (4, 4)
    with pytest.raises(torch.OutOfMemoryError):
        linear_reward(tokenizer, limit=0).evaluate(*rows)


def test_chunks_keep_to_max_tokens():
    sizes = []
    tokenizer = wordpiece()
    table = torch.randn(len(tokenizer), 4, generator=torch.Generator().manual_seed(0))

    def function(embeddings, mask):
        sizes.append(embeddings.shape[0] * embeddings.shape[1])
        return (embeddings.sum(-1) * mask).sum(1)

    reward = CallableReward(function, tokenizer, table, max_tokens=24)
    reward.evaluate(*encoded(reward))
    assert len(sizes) > 1
    assert max(sizes) <= 24


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda e, m: e.sum((1, 2)) * torch.nan, "finite"),
        (lambda e, m: e.sum(-1), "one reward a row"),
        (lambda e, m: 1.0, "expected a tensor"),
    ],
)
def test_bad_rewards_are_named(function, words):
    tokenizer = wordpiece()
    reward = CallableReward(function, tokenizer, torch.ones(len(tokenizer), 3))
    with pytest.raises(ValueError, match=words):
        reward.evaluate(*encoded(reward))


def test_a_model_that_refuses_embeddings_is_named():
    tokenizer = wordpiece()
    with pytest.raises(ValueError, match="BartForSequenceClassification does not take inputs_embeds"):
        RewardModel(classifier("bart", tokenizer, decoder_start_token_id=3), tokenizer)


def test_a_missing_padding_token_is_named():
    tokenizer = wordpiece()
    model = classifier("gpt2", tokenizer)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match=r"pad_token_id None.*set model.config.pad_token_id"):
        RewardModel(model, tokenizer)


def test_outputs_are_chosen_by_label():
    tokenizer = wordpiece()
    model = classifier("bert", tokenizer, labels=3)
    with pytest.raises(ValueError, match="3 outputs: give label"):
        RewardModel(model, tokenizer)
    with pytest.raises(ValueError, match="label is 3"):
        RewardModel(model, tokenizer, label=3)
    rewards = [RewardModel(model, tokenizer, label=i).evaluate([[7]], [[8, 9]])[0] for i in range(3)]
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    torch.testing.assert_close(torch.cat(rewards), model(ids).logits[0].detach())


@pytest.mark.parametrize("family", ["gpt2", "roberta"])
def test_rows_past_the_context_are_refused(family):
    tokenizer = wordpiece()
    reward = RewardModel(classifier(family, tokenizer), tokenizer)
    longest = {"gpt2": 48, "roberta": 47}[family]
    assert reward.evaluate([[7]], [[8] * (longest - 3)])[0].shape == (1,)
    with pytest.raises(ValueError, match=f"at most {longest}: shorten"):
        reward.evaluate([[7]], [[8] * (longest - 2)])


@pytest.mark.parametrize(("prompt", "response", "which"), [([], [7], "prompt"), ([7], [], "response")])
def test_empty_texts_are_refused(prompt, response, which):
    with pytest.raises(ValueError, match=f"{which} is empty"):
        linear_reward(wordpiece()).evaluate([prompt], [response])
    reference = ReferenceModel(causal("gpt2", wordpiece()), wordpiece())
    with pytest.raises(ValueError, match=f"{which} is empty"):
        reference.score([prompt], [response])


def test_vocabulary_masks():
    reward = linear_reward(wordpiece())
    vocabulary = reward.vocabulary
    names = [t for t, ok in zip(vocabulary.tokens, vocabulary.allowed.tolist(), strict=True) if not ok]
    assert names == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
    assert [t for t, yes in zip(vocabulary.tokens, vocabulary.continues.tolist(), strict=True) if yes] == [
        "##s", "##ing", "##ed"
    ]  # fmt: skip
    assert (vocabulary.prefix, vocabulary.suffix) == ([2], [3])
    dogs, plural = vocabulary.encode("dogs")
    assert vocabulary.is_word((dogs, plural))
    # "thes" is spelled "the ##s", but "as ##s" cannot be: "a" alone is the longest piece of "ass".
    assert not vocabulary.is_word((plural, plural))


def test_byte_pair_vocabulary():
    tokenizer = byte_pairs()
    reward = CallableReward(lambda e, m: e.sum((1, 2)), tokenizer, torch.ones(len(tokenizer), 2))
    vocabulary = reward.vocabulary
    assert (vocabulary.prefix, vocabulary.suffix) == ([], [])
    assert not vocabulary.allowed[tokenizer.eos_token_id]
    ids = vocabulary.encode(" the old man")
    assert vocabulary.comes_back(ids)
    assert not vocabulary.continues[ids[0]]


def test_a_tokenizer_larger_than_the_table_is_refused():
    with pytest.raises(ValueError, match="embedding has 10 rows"):
        CallableReward(lambda e, m: e.sum((1, 2)), wordpiece(), torch.ones(10, 2))
