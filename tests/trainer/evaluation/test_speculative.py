"""Measured acceptance, compared with a plain speculative decoder in this file."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.helpers.tiny import VOCAB_SIZE, dense_logprobs, functions
from trainer.evaluation.speculative import measure_acceptance

V = VOCAB_SIZE
EOS = 1
GAMMA = 3
NEW = 14


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def noisy(model, size, seed=0):
    """Returns a copy of a model with noise added to its weights: a draft whose tokens are accepted only sometimes."""
    generator = torch.Generator().manual_seed(seed)
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return draft


@pytest.fixture(scope="module")
def models(tiny):
    target = load(tiny.target)
    return {"target": target, "unrelated": load(tiny.draft), "close": noisy(target, 0.1), "good": noisy(target, 0.03)}


@pytest.fixture(scope="module")
def prompts(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    texts = [pair["prompt"] for pair in functions(4)]
    return [tokenizer(text)["input_ids"][:n] for text, n in zip(texts, (5, 1, 12, 8), strict=True)]


def argmaxes(model, ids):
    """Returns the likeliest token after each of `ids`, computed without a KV cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, :, :V].argmax(-1).tolist()


def decode(target, draft, prompt, *, gamma, max_new_tokens, ends):
    """Runs greedy speculative decoding by its definition. Returns the new tokens and the four counts."""
    text, limit = list(prompt), len(prompt) + max_new_tokens
    counts = {"target_calls": 0, "drafted": 0, "accepted": 0, "rejections": 0}
    while len(text) < limit and not ends & set(text[len(prompt) :]):
        proposal = []
        while len(proposal) < min(gamma, limit - len(text) - 1) and not ends & set(proposal):
            proposal.append(argmaxes(draft, text + proposal)[-1])
        choices = argmaxes(target, text + proposal)[len(text) - 1 :]
        agreed = [a == b for a, b in zip(proposal, choices, strict=False)]
        n = agreed.index(False) if False in agreed else len(agreed)
        new = [*proposal[:n], choices[n]]
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        text += new[:stop]
        counts["target_calls"] += 1
        counts["drafted"] += len(proposal)
        counts["accepted"] += n
        counts["rejections"] += n < len(proposal)
    return text[len(prompt) :], counts


def check_counts(target, draft, prompts, ends, gamma=GAMMA):
    found = measure_acceptance(target, draft, prompts, mode="greedy", vocab_size=V, gamma=gamma, max_new_tokens=NEW)
    expected = [decode(target, draft, p, gamma=gamma, max_new_tokens=NEW, ends=ends) for p in prompts]
    totals = {name: sum(counts[name] for _, counts in expected) for name in expected[0][1]}
    assert {name: getattr(found, name) for name in totals} == totals
    assert found.emitted == found.plain_emitted == sum(len(text) for text, _ in expected)
    assert found.greedy_text_identical == found.prompts == len(prompts)
    return found


@pytest.mark.parametrize("gamma", [1, GAMMA])
@pytest.mark.parametrize("draft", ["unrelated", "close", "good"])
def test_greedy_counts_equal_those_of_a_plain_decoder(models, prompts, draft, gamma):
    found = check_counts(models["target"], models[draft], prompts, {EOS}, gamma)
    assert found.alpha == found.accepted / (found.accepted + found.rejections)
    assert found.accepted_per_drafted == found.accepted / found.drafted
    assert 1 <= found.tau == found.emitted / found.target_calls <= gamma + 1
    if draft == "close":
        assert 0.1 < found.alpha < 0.95  # the counts cover both acceptances and rejections


def test_tokens_after_the_end_of_the_text_are_not_counted_as_rejected(models, prompts):
    target, draft = copy.deepcopy(models["target"]), models["good"]
    texts = [decode(target, draft, p, gamma=GAMMA, max_new_tokens=NEW, ends=set())[0] for p in prompts]
    for place in range(1, 6):  # the end may be a drafted token or the target's own
        ends = [texts[0][place], texts[2][place]]
        target.generation_config.eos_token_id = ends
        found = check_counts(target, draft, prompts, set(ends))
        assert found.emitted < len(prompts) * NEW
    target.generation_config.eos_token_id = [texts[0][2]]
    own = measure_acceptance(target, target, prompts, mode="greedy", vocab_size=V, gamma=GAMMA, max_new_tokens=NEW)
    assert (own.alpha, own.rejections) == (1.0, 0)


@pytest.mark.parametrize("same_object", [True, False])
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_target_as_its_own_draft_is_always_accepted(tiny, models, prompts, mode, same_object):
    draft = models["target"] if same_object else load(tiny.target)
    found = measure_acceptance(
        models["target"], draft, prompts, mode=mode, vocab_size=V, gamma=GAMMA, max_new_tokens=16, seed=3
    )
    assert found.alpha == 1.0 if mode == "greedy" else found.alpha >= 0.999
    # 16 tokens are exactly four rounds of GAMMA + 1 tokens.
    if found.emitted == 16 * len(prompts) and found.rejections == 0:
        assert found.tau == GAMMA + 1
    assert found.greedy_text_identical == (len(prompts) if mode == "greedy" else None)


def comparable(result):
    return {k: v for k, v in dataclasses.asdict(result).items() if "seconds" not in k}


@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_generation_config_of_a_checkpoint_changes_nothing(tiny, models, prompts, mode, tmp_path):
    settings = {"vocab_size": V, "gamma": GAMMA, "max_new_tokens": NEW, "mode": mode, "seed": 5}
    plain = measure_acceptance(models["target"], models["close"], prompts, **settings)
    leaky = []
    for name in ("target", "close"):
        GenerationConfig(
            repetition_penalty=1.8, temperature=0.2, top_k=2, top_p=0.5, do_sample=True, no_repeat_ngram_size=2,
            num_assistant_tokens=9, num_assistant_tokens_schedule="heuristic", assistant_confidence_threshold=0.9,
            eos_token_id=EOS, pad_token_id=2,
        ).save_pretrained(tmp_path / name)  # fmt: skip
        model = copy.deepcopy(models[name])
        model.generation_config = GenerationConfig.from_pretrained(tmp_path / name)
        leaky.append(model)
    assert comparable(measure_acceptance(*leaky, prompts, **settings)) == comparable(plain)
    assert leaky[0].generation_config.repetition_penalty == leaky[1].generation_config.repetition_penalty == 1.8


def test_sampling_repeats_with_the_seed_and_keeps_the_callers_random_state(models, prompts):
    settings = {"mode": "sampled", "vocab_size": V, "gamma": GAMMA, "max_new_tokens": NEW}
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, again, other = (
        comparable(measure_acceptance(models["target"], models["close"], prompts, **settings, seed=seed))
        for seed in (0, 0, 99)
    )
    assert torch.rand(1) == expected
    assert first == again
    assert first | {"seed": 99} != other


def test_sampled_acceptance_equals_the_overlap_of_the_distributions(models):
    target, draft = models["target"], models["close"]
    # With two new tokens one is drafted, so each prompt is a trial with success probability sum_v min(p_v, q_v).
    p, q = (torch.from_numpy(dense_logprobs(model, [7, 9])[-1]).exp() for model in (target, draft))
    found = measure_acceptance(
        target, draft, [[7, 9]] * 100, mode="sampled", vocab_size=V, gamma=5, max_new_tokens=2, seed=1
    )
    assert found.accepted + found.rejections == found.drafted == 100
    alpha = float(torch.minimum(p, q).sum())
    assert 0.1 < alpha < 0.9
    assert found.alpha == pytest.approx(alpha, abs=4 * (alpha * (1 - alpha) / 100) ** 0.5)


def test_padding_rows_of_the_embeddings_are_never_drafted_or_emitted(models, prompts):
    """Target and draft may have different numbers of padding rows, and their logits may have any value."""
    target, draft = copy.deepcopy(models["target"]), copy.deepcopy(models["close"])
    plain = check_counts(target, draft, prompts, {EOS})
    draft.resize_token_embeddings(V + 3)
    with torch.no_grad():
        target.lm_head.weight[V:] = 50 * target.lm_head.weight[:1].abs().max()
        draft.lm_head.weight[V:] = -target.lm_head.weight[V : V + 3]
    assert comparable(check_counts(target, draft, prompts, {EOS})) == comparable(plain)
    sampled = measure_acceptance(target, draft, prompts, mode="sampled", vocab_size=V, gamma=GAMMA, max_new_tokens=NEW)
    assert sampled.drafted > 0


def test_measuring_leaves_the_models_unchanged(models, prompts):
    target, draft = copy.deepcopy(models["target"]).train(), copy.deepcopy(models["close"])
    before = [(m.generation_config, m.config.vocab_size, m.training, set(vars(m))) for m in (target, draft)]
    measure_acceptance(target, draft, prompts[:1], mode="sampled", vocab_size=V, gamma=2, max_new_tokens=4)
    assert [(m.generation_config, m.config.vocab_size, m.training, set(vars(m))) for m in (target, draft)] == before
    assert not target.lm_head._forward_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0}, "gamma=0"),
        ({"max_new_tokens": 1}, "max_new_tokens=1"),
        ({"mode": "beam"}, "mode=beam"),
        ({"vocab_size": 521}, "vocab_size=520"),
        ({"prompts": []}, "prompts must hold at least one prompt, got none"),
        ({"prompts": [[3], []]}, r"got prompts\[1\] without any; remove it"),
    ],
)
def test_invalid_arguments_are_refused(models, change, message):
    settings = {"prompts": [[3]], "mode": "greedy", "vocab_size": V, "gamma": 2, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        measure_acceptance(models["target"], models["close"], **settings)
