"""The flow and its baselines on tiny models: what is returned is what its text is worth, within budget and bound."""

import math

import pytest
import torch
from language import byte_pairs, causal, classifier, wordpiece

from vgf_fast import TransportBudget
from vgf_fast.llm import (
    BestOfN,
    CallableReward,
    Decoding,
    EmbeddingFlow,
    LatentFlow,
    ReferenceModel,
    RewardModel,
    TokenBudget,
    TokenSearch,
    Usage,
    compare,
)
from vgf_fast.llm.decoding import BeamDecoder

PROMPTS = ["the old man", "a dog sees the"]
SMALL = {"max_new_tokens": 6, "min_new_tokens": 3}


def models(reward="bert", reference="gpt2", tokenizer=wordpiece):
    tokenizer = tokenizer()
    return RewardModel(classifier(reward, tokenizer), tokenizer), ReferenceModel(
        causal(reference, tokenizer), tokenizer
    )


def method(kind, pair=None, **arguments):
    reward, reference = pair or models()
    return kind(reward, reference=reference, **SMALL, **arguments)


def reward_of(aligner, prompt, text):
    """The classifier's own reward of prompt and text, by token ids."""
    encode = aligner.vocabulary.encode
    ids = torch.tensor([[*aligner.reward.prefix, *encode(prompt), *encode(text), *aligner.reward.suffix]])
    with torch.no_grad():
        return aligner.reward.model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0].item()


def log_probability_of(aligner, prompt, text):
    """Sum of the causal model's log-probabilities of text's tokens and the end, by one plain pass."""
    reference, encode = aligner.reference, aligner.vocabulary.encode
    before, ids = [*reference.prefix, *encode(prompt)], encode(text)
    with torch.no_grad():
        log_p = reference.model(torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)[len(before) - 1 :]
    return sum(log_p[i, token].item() for i, token in enumerate([*ids, reference.end[0]]))


@pytest.mark.parametrize("reward", ["bert", "roberta", "gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("reference", ["gpt2", "llama", "gpt_neox"])
def test_every_figure_of_a_response_is_that_of_its_text(reward, reference):
    aligner = method(EmbeddingFlow, models(reward, reference))
    result = aligner.align(PROMPTS, budget=TokenBudget(steps=3), num_particles=3, seed=0)
    texts = set()
    for prompt, responses in zip(PROMPTS, result.responses, strict=True):
        assert len(responses) == 3
        for r in responses:
            assert r.reward == pytest.approx(reward_of(aligner, prompt, r.text), abs=1e-4)
            assert r.start_reward == pytest.approx(reward_of(aligner, prompt, r.start_text), abs=1e-4)
            assert r.log_probability == pytest.approx(log_probability_of(aligner, prompt, r.text), abs=1e-3)
            assert r.perplexity == pytest.approx(math.exp(-r.log_probability / (r.tokens + 1)))
            assert r.tokens == len(aligner.vocabulary.encode(r.text))
            before, after = map(aligner.vocabulary.encode, (r.start_text, r.text))
            assert r.tokens_changed == sum(a != b for a, b in zip(before, after, strict=True))
            assert r.travelled > 0
            if r.feasible:
                assert r.perplexity <= r.perplexity_bound * 1.0001
            texts.add(r.text)
    assert any(r.tokens_changed for responses in result.responses for r in responses)
    assert len(texts) > 1


def test_no_steps_is_best_of_n_exactly():
    pair = models()
    for kind in (EmbeddingFlow, TokenSearch):
        ours = method(kind, pair).align(PROMPTS, budget=TokenBudget(steps=0), num_particles=5, seed=3)
        best = method(BestOfN, pair).align(PROMPTS, num_particles=5, seed=3)
        assert ours.responses == best.responses
        assert ours.texts == best.texts
        assert ours.usage == best.usage


def test_the_flow_raises_the_reward_within_the_bound():
    pair = models()
    flow = method(EmbeddingFlow, pair).align(PROMPTS, budget=TokenBudget(steps=6), num_particles=4, seed=0)
    start = method(BestOfN, pair).align(PROMPTS, num_particles=4, seed=0)
    for moved, drawn in zip(flow.best, start.best, strict=True):
        assert moved.feasible
        assert moved.reward > drawn.reward
    for responses in flow.responses:
        for r in responses:
            assert not r.feasible or r.reward >= r.start_reward or r.start_perplexity > r.perplexity_bound


@pytest.mark.parametrize("units", [1, 7, 8, 20, 37])
@pytest.mark.parametrize("kind", [EmbeddingFlow, BestOfN, TokenSearch])
def test_no_prompt_costs_more_than_its_units(kind, units):
    rows = []
    aligner = method(kind)
    forward = aligner.reward._forward
    gradients = []

    def counted(embeddings, mask):
        rows.append(len(embeddings))
        gradients.append(len(embeddings) * torch.is_grad_enabled())
        return forward(embeddings, mask)

    aligner.reward._forward = counted
    aligner.report_continuous = False
    budget = TokenBudget(steps=50, reward_units=units)
    if units < 4 and kind is not BestOfN:
        with pytest.raises(ValueError, match=f"reward_units is {units}"):
            aligner.align(PROMPTS[:1], budget=budget, num_particles=4, seed=0)
        return
    usage = aligner.align(PROMPTS[:1], budget=budget, num_particles=4, seed=0).usage
    assert (usage.reward_forward, usage.reward_backward) == (sum(rows), sum(gradients))
    assert usage.reward_units == sum(rows) + sum(gradients) <= units
    # Nothing is left that would pay for another step; texts that came up before cost nothing.
    assert usage.reward_units > 0


def test_the_report_is_counted_apart():
    result = method(EmbeddingFlow).align(PROMPTS, budget=TokenBudget(steps=2), num_particles=3, seed=0)
    assert result.usage.reward_report == 6
    assert all(r.continuous_reward is not None for responses in result.responses for r in responses)


def test_plain_mode_decodes_once_and_reports_the_decoded_reward():
    aligner = method(EmbeddingFlow, mode="plain")
    result = aligner.align(PROMPTS, budget=TokenBudget(steps=4, step_size=0.5), num_particles=3, seed=0)
    for prompt, responses in zip(PROMPTS, result.responses, strict=True):
        for r in responses:
            assert r.reward == pytest.approx(reward_of(aligner, prompt, r.text), abs=1e-4)
            assert r.continuous_reward > reward_of(aligner, prompt, r.start_text)
    # 4 gradients and a last text for 6 particles.
    assert result.usage.reward_units == 6 * (4 * 2 + 1)


def test_plain_mode_needs_no_reference():
    reward, _ = models()
    flow = EmbeddingFlow(reward, mode="plain")
    result = flow.align(PROMPTS, [["walks slowly"], ["cat runs", "tree"]], budget=TransportBudget(steps=2))
    assert [len(responses) for responses in result.responses] == [1, 2]
    assert result.responses[0][0].perplexity is None
    assert result.responses[0][0].feasible


@pytest.mark.parametrize("mode", ["projected", "plain"])
def test_a_particle_keeps_every_step_whatever_was_decoded(mode):
    """Under a reward that is linear in the embeddings all steps are the same: after L of them u is L steps away."""
    tokenizer = wordpiece()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, generator=generator)
    table = torch.randn(len(tokenizer), 6, generator=generator)
    reward = CallableReward(lambda e, mask: ((e @ weight) * mask).sum(1), tokenizer, table)
    aligner = method(EmbeddingFlow, (reward, ReferenceModel(causal("gpt2", tokenizer), tokenizer)), mode=mode)
    budget = TokenBudget(steps=5, step_size=0.4)
    seen = set()
    result = aligner.align(PROMPTS, budget=budget, num_particles=3, seed=0)
    for prompt, responses in zip(PROMPTS, result.responses, strict=True):
        for r in responses:
            assert r.travelled == pytest.approx(5 * 0.4 * aligner.unit * math.sqrt(r.tokens), rel=1e-5)
            encode = aligner.vocabulary.encode
            start = reward.evaluate([encode(prompt)], [encode(r.start_text)])[0].item()
            gain = 5 * 0.4 * aligner.unit * weight.norm().item() * r.tokens
            assert r.continuous_reward == pytest.approx(start + gain, rel=1e-4)
            seen.add(r.text != r.start_text)
    assert True in seen


@pytest.mark.parametrize("start", [0, 2, 4, 8])
def test_the_weight_found_is_fluent_and_the_next_lower_one_is_not(start):
    reward, reference = models()
    vocabulary = reward.vocabulary
    decoder = BeamDecoder(reference, vocabulary, reward.table, 1.0, Decoding(closeness=2.0))
    weights = decoder.how.weights
    prompt, generator = vocabulary.encode("the old man"), torch.Generator().manual_seed(1)
    current = tuple(vocabulary.encode("walks near river and sleeps"))
    noise = torch.randn(6, len(current), 16, generator=generator)
    particles = reward.embed(torch.tensor(current)) + noise
    near = decoder.near(particles)
    found_at = set()
    for row, bound in enumerate((2.0, 15.0, 20.0, 30.0, 60.0, 1e9)):
        one = particles[row : row + 1]
        (found,), (place,) = decoder.search([prompt], one, [current], [bound], [start])

        def fit(at, row=row, one=one, bound=bound):
            (beam,) = decoder.beams([prompt], one, near[row : row + 1], [current], [weights[at]])
            fits = [
                h for h in beam if h.perplexity <= bound and h.ids != current and vocabulary.comes_back(list(h.ids))
            ]
            return fits[0] if fits else None

        if found is None:
            assert all(fit(at) is None for at in range(start, len(weights)))
            continue
        found_at.add(place)
        assert found.ids == fit(place).ids
        assert place == 0 or place > start or fit(place - 1) is None
        assert all(fit(at) is None for at in range(start, place))
    assert found_at


def test_beams_that_do_not_fit_into_memory_are_halved_and_said_so():
    pair = models()
    budget = TokenBudget(steps=2)
    whole = method(EmbeddingFlow, pair).align(PROMPTS, budget=budget, num_particles=3, seed=0)
    reference = pair[1]
    forward, limit = reference.model.forward, 15  # three beams of five

    def limited(*arguments, **named):
        if len(named["input_ids"]) > limit:
            raise torch.OutOfMemoryError("simulated")
        return forward(*arguments, **named)

    reference.model.forward = limited
    with pytest.warns(RuntimeWarning, match=r"GPT2LMHeadModel: beams of \d+ responses did not fit.*going on with"):
        parts = method(EmbeddingFlow, pair).align(PROMPTS, budget=budget, num_particles=3, seed=0)
    assert [[r.text for r in rows] for rows in parts.responses] == [[r.text for r in rows] for rows in whole.responses]
    limit = 4
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError):
        method(EmbeddingFlow, pair).align(PROMPTS, budget=budget, num_particles=3, seed=0)


@pytest.mark.parametrize("update", ["normalized", "adam", "ascent"])
@pytest.mark.parametrize("svgd", [False, True])
def test_particles_stay_within_the_papers_bound(update, svgd):
    size = {"normalized": 0.3, "adam": 0.3, "ascent": 0.05}[update]
    aligner = method(EmbeddingFlow, update=update, svgd=svgd)
    budget = TokenBudget(steps=3, step_size=size, temperature=0.5)
    for transport in aligner.align(PROMPTS, budget=budget, num_particles=4, seed=0).transport:
        assert 0 < transport.mmd_squared <= transport.bound


def test_the_trust_region_holds_every_token():
    aligner = method(EmbeddingFlow)
    free, held = (
        aligner.align(PROMPTS, budget=TokenBudget(steps=5, trust_radius=radius), num_particles=2, seed=0)
        for radius in (None, 0.5)
    )
    for far, near in zip(free.responses, held.responses, strict=True):
        for a, b in zip(far, near, strict=True):
            assert b.travelled <= 0.5 * aligner.unit * math.sqrt(b.tokens) * 1.0001
            assert a.travelled > b.travelled


def test_svgd_keeps_responses_apart():
    pair = models()
    budget = TokenBudget(steps=4, temperature=100.0)
    together, apart = (
        method(EmbeddingFlow, pair, svgd=svgd).align(PROMPTS, budget=budget, num_particles=4, seed=0)
        for svgd in (False, True)
    )
    assert [r.text for r in together.responses[0]] != [r.text for r in apart.responses[0]]
    for one, other in zip(together.transport, apart.transport, strict=True):
        assert one.mmd_squared != other.mmd_squared


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_byte_pair_responses_come_back_from_text(family):
    aligner = method(EmbeddingFlow, models(family, family, byte_pairs))
    result = aligner.align(["the old man"], budget=TokenBudget(steps=3), num_particles=3, seed=1)
    for r in result.responses[0]:
        assert r.reward == pytest.approx(reward_of(aligner, "the old man", r.text), abs=1e-4)


def test_the_same_seed_gives_the_same_responses_alone_or_together():
    aligner = method(EmbeddingFlow)
    responses = [["walks slowly in the rain", "sees a cat"], ["green tree and runs", "sleeps"]]
    budget = TokenBudget(steps=3)
    both = aligner.align(PROMPTS, responses, budget=budget)
    again = aligner.align(PROMPTS, responses, budget=budget)
    alone = [aligner.align([p], [r], budget=budget).responses[0] for p, r in zip(PROMPTS, responses, strict=True)]
    assert both.responses == again.responses
    assert [[r.text for r in rows] for rows in both.responses] == [[r.text for r in rows] for rows in alone]


def test_perplexity_can_be_bounded_by_number():
    aligner = method(EmbeddingFlow, fluency=None)
    result = aligner.align(PROMPTS, budget=TokenBudget(steps=4), num_particles=4, seed=0, max_perplexity=30.0)
    assert all(not r.feasible or r.perplexity <= 30.001 for responses in result.responses for r in responses)
    assert all(r.perplexity_bound == 30.0 for responses in result.responses for r in responses)


def test_beam_of_full_width_finds_the_best_of_all_texts():
    """Three places, every token a candidate: the beam's best is the best of an exhaustive search."""
    from itertools import product

    reward, reference = models()
    vocabulary = reward.vocabulary
    decoder = BeamDecoder(reference, vocabulary, reward.table, 1.0, Decoding(width=200, top_k=100, closeness=20.0))
    current = tuple(vocabulary.encode("cat runs"))
    generator = torch.Generator().manual_seed(0)
    particles = reward.embed(torch.tensor([current])) + torch.randn(1, 2, 16, generator=generator)
    prompt = vocabulary.encode("the old man")
    for weight in (0.0, 1.0):
        (found,) = decoder.beams([prompt], particles, decoder.near(particles), [current], [weight])
        allowed = vocabulary.allowed.nonzero().flatten().tolist()
        texts = [ids for ids in product(allowed, allowed) if vocabulary.comes_back(list(ids))]
        likely = reference.score([prompt] * len(texts), [list(ids) for ids in texts])
        table = reward.table
        scores = []
        for ids, log_p in zip(texts, likely.tolist(), strict=True):
            there = (table[list(ids)] - particles[0]).square().sum()
            here = (table[list(current)] - particles[0]).square().sum()
            scores.append(((here - there) / 40.0).item() + weight * log_p)
        best = max(range(len(texts)), key=scores.__getitem__)
        fit = next(h for h in found if vocabulary.comes_back(list(h.ids)))
        assert fit.ids == texts[best]
        assert fit.score == pytest.approx(scores[best], abs=1e-3)
        assert fit.log_probability == pytest.approx(likely[best].item(), abs=1e-3)


def test_sampling_follows_the_reference_model():
    """First tokens of many samples have the model's own probabilities, disallowed ones left out."""
    _, reference = models()
    prompt = reference.vocabulary.encode("the old man")
    generator = torch.Generator().manual_seed(0)
    (drawn,) = reference.sample([prompt], 4000, max_new_tokens=1, generator=generator)
    with torch.no_grad():
        expected = reference.model(torch.tensor([[*reference.prefix, *prompt]])).logits[0, -1].exp()
    expected[~reference.vocabulary.allowed | reference.vocabulary.continues] = 0
    expected /= expected.sum()
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(expected)) / 4000
    assert (counts - expected).abs().max() < 0.03
    assert not counts[expected == 0].any()


def test_scores_from_the_cache_are_those_of_whole_rows():
    for family in ("gpt2", "llama", "gpt_neox"):
        _, reference = models(reference=family)
        encode = reference.vocabulary.encode
        prompts = [encode("the old man"), encode("dog")]
        state = reference.read(prompts)
        tokens = [encode("walks slowly"), encode("sees cat")]
        total = torch.zeros(2)
        for position in range(2):
            step = torch.tensor([ids[position] for ids in tokens])
            total += state.next_log_probability.gather(1, step[:, None])[:, 0]
            state = reference.advance(state, step)
        total += reference.end_log_probability(state.next_log_probability)
        torch.testing.assert_close(total, reference.score(prompts, tokens), rtol=1e-4, atol=1e-4)


def test_compare_shows_every_method(capsys):
    pair = models()
    methods = {
        "flow": method(EmbeddingFlow, pair),
        "best of N": method(BestOfN, pair),
        "swaps": method(TokenSearch, pair),
    }
    budget = TokenBudget(steps=10, reward_units=30)
    results = compare(methods, PROMPTS, budget=budget, num_particles=3, seed=0, judge=lambda prompt, text: 7.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["method", *methods]
    assert results["best of N"].usage.reward_units == 60
    assert all(" 7 " in line for line in lines[1:])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": [""]}, "prompt '' is empty"),
        ({"prompts": ["the"], "responses": [[""]]}, "response to prompt 'the' is empty"),
        ({"prompts": ["the"], "responses": [[]]}, "expected a sequence of texts"),
        ({"prompts": ["the"], "responses": ["walks"]}, "expected a sequence of texts"),
        ({"prompts": "the"}, "sequences"),
        ({"prompts": ["the"], "responses": [["a"], ["a"]]}, "2 entries, expected one for each of 1"),
        ({"prompts": ["the " * 60]}, "at most 48: shorten"),
        ({"prompts": ["the"], "responses": [["a " * 60]]}, "at most 48: shorten"),
        ({"prompts": ["the"], "seed": 0, "generator": torch.Generator()}, "both generator and seed"),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        method(EmbeddingFlow).align(**arguments)


def test_different_tokenizers_are_named():
    reward, _ = models()
    _, reference = models(tokenizer=byte_pairs)
    with pytest.raises(ValueError, match="different tokenizers"):
        EmbeddingFlow(reward, reference=reference)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "other"}, "mode is 'other'"),
        ({"update": "other"}, "update is 'other'"),
        ({"fluency": 0.0}, "fluency is"),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        method(EmbeddingFlow, **arguments)
    with pytest.raises(ValueError, match="reference is None"):
        EmbeddingFlow(models()[0])
    for wrong in ({"width": 0}, {"top_flow": 33}, {"weights": (1.0, 0.5)}, {"closeness": 0.0}):
        with pytest.raises(ValueError, match="Decoding has"):
            Decoding(**wrong)
    for wrong in ({"trust_radius": 0.0}, {"reward_units": 0}, {"steps": -1}):
        with pytest.raises(ValueError, match="Budget"):
            TokenBudget(**wrong)


def latent_flow(**arguments):
    """Latents [N, 5] to three embeddings near the words of a sentence."""
    reward, reference = models()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3 * 16, generator=generator) * 0.3
    base = reward.embed(torch.tensor(reward.vocabulary.encode("walks near river"))).flatten()
    flow = LatentFlow(
        reward, decoder=lambda z: (base + z @ weight.to(z)).reshape(len(z), 3, 16), reference=reference, **arguments
    )
    return flow, [torch.randn(4, 5, generator=generator) * 0.1 for _ in PROMPTS]


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("svgd", [False, True])
def test_latents_move_and_texts_get_better(straight_through, svgd):
    flow, latents = latent_flow(straight_through=straight_through, svgd=svgd, fluency=None)
    still = flow.align_latents(PROMPTS, latents, budget=TransportBudget(steps=0))
    moved = flow.align_latents(PROMPTS, latents, budget=TransportBudget(steps=8, step_size=1.0))
    for prompt, before, after in zip(PROMPTS, still.responses, moved.responses, strict=True):
        assert all(r.text == "walks near river" and not r.tokens_changed for r in before)
        assert max(r.reward for r in after) > max(r.reward for r in before)
        for r in after:
            assert r.reward == pytest.approx(reward_of(flow, prompt, r.text), abs=1e-4)
    assert all(t.mmd_squared <= t.bound for t in moved.transport)


def test_a_latent_step_is_the_gradient_through_decoder_and_reward():
    flow, latents = latent_flow(straight_through=False, normalized=False, fluency=None)
    z = latents[0].clone().requires_grad_()
    context = flow.vocabulary.encode(PROMPTS[0])
    ids = torch.tensor([[*flow.reward.prefix, *context, 6, 6, 6, *flow.reward.suffix]]).expand(4, -1)
    whole = flow.reward.embed(ids)
    start = 1 + len(context)
    whole = torch.cat([whole[:, :start], flow.decoder(z), whole[:, start + 3 :]], dim=1)
    values = flow.reward.model(inputs_embeds=whole, attention_mask=torch.ones(whole.shape[:2])).logits[:, 0]
    (expected,) = torch.autograd.grad(values.sum(), z)
    found = flow._direction(context, latents[0], TransportBudget(temperature=0.5), Usage())
    torch.testing.assert_close(found, expected / 0.5, rtol=1e-4, atol=1e-5)


def test_a_latent_decoder_of_another_shape_is_refused():
    reward, _ = models()
    flow = LatentFlow(reward, decoder=lambda z: z)
    with pytest.raises(ValueError, match=r"decoder returned shape \(2, 5\)"):
        flow.align_latents(["the"], [torch.zeros(2, 5)])
