"""The fused head compared with dense float64 autograd for every objective, kind of rows and head; its memory."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from logitstore.models.split_lm import SplitLM
from logitstore.models.support import Support
from tests.helpers import rows
from trainer.loss.fused_head import look_at_rows, train_rows
from trainer.loss.objectives import OBJECTIVES, make_objective
from trainer.loss.selection import LOOKS

V, PADDED, H = 37, 40, 8
SIZES = {
    "vocab_size": PADDED, "hidden_size": H, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
HEADS = {
    "untied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "a bias": (PhiForCausalLM, PhiConfig(**SIZES)),
    "soft-capping": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=3.0)),
    "a factor": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
    "a divisor": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0)),
    "another name": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
}


class FewRows(SplitLM):
    """A SplitLM that computes logits for 7 rows at a time."""

    rows_per_chunk = 7


class OtherHead(nn.Linear):
    """A linear layer of another type, as LoRA or quantisation creates."""


def split_lm(head, *, other=False, dtype=torch.float32):
    kind, config = HEADS[head]
    torch.manual_seed(3)
    model = kind(config)
    plain = model.get_output_embeddings()
    if plain.bias is not None:
        nn.init.normal_(plain.bias, std=0.5)
    nn.init.normal_(plain.weight)
    if other:
        plain.__class__ = OtherHead
    return FewRows(model.to(dtype), V)


def inputs(kind, num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, H, generator=generator)
    labels = torch.randint(V, (num_rows,), generator=generator)
    weights = torch.rand(num_rows, generator=generator)
    return hidden, rows.random_rows(kind, num_rows, V, seed), labels, weights


def dense_logits(split, hidden, weight, bias):
    """Returns the logits by the definition of the model, in float64."""
    logits = (hidden @ weight.T)[:, :V]
    if bias is not None:
        logits = logits + bias[:V]
    config = split.model.config
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


def dense(split, name, hidden, support, labels, weights, label_weight=0.0):
    """Returns the weighted sum of losses, the losses, and the gradients by hidden states, head weight and head bias."""
    head = split.model.get_output_embeddings()
    leaves = [hidden.double(), head.weight.detach().double()] + ([] if head.bias is None else [head.bias.double()])
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    logits = dense_logits(split, leaves[0], leaves[1], leaves[2] if len(leaves) == 3 else None)
    losses = rows.losses(name, support, logits, labels, label_weight)
    total = (losses * weights.double()).sum()
    total.backward()
    return total.detach(), losses.detach(), [leaf.grad for leaf in leaves]


def fused(split, name, hidden, support, labels, weights, label_weight=0.0):
    head = split.model.get_output_embeddings()
    split.model.zero_grad()
    leaf = hidden.clone().requires_grad_()
    objective = make_objective(name, beta=rows.BETA, label_weight=label_weight)
    total, parts = train_rows(split, leaf, support, labels, weights, objective)
    (total * 0.5).backward()  # checks that the incoming gradient is used
    grads = [leaf.grad, head.weight.grad] + ([] if head.bias is None else [head.bias.grad])
    return total.detach(), parts, [2 * grad.double() for grad in grads]


def compare(split, name, batch, label_weight=0.0):
    """Checks values and gradients against float64, with a relative tolerance of 2e-4."""
    total, losses, grads = dense(split, name, *batch, label_weight)
    found, parts, found_grads = fused(split, name, *batch, label_weight)
    torch.testing.assert_close(found.double(), total, rtol=2e-4, atol=5e-5)
    torch.testing.assert_close(parts.objective.double(), losses, rtol=2e-4, atol=5e-5)
    torch.testing.assert_close(found_grads, grads, rtol=2e-4, atol=1e-4)
    return parts, found_grads


@pytest.mark.parametrize("other", [False, True], ids=["fused", "again"])
@pytest.mark.parametrize("head", HEADS)
def test_every_head_gives_the_dense_value_and_gradient(head, other):
    _, grads = compare(split_lm(head, other=other), "forward_kl", inputs("a tail", 20))
    assert not grads[1][V:].any()  # padding rows of the vocabulary get no gradient


@pytest.mark.parametrize("kind", rows.KINDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_gives_the_dense_value_and_gradient(name, kind):
    if name == "renormalised_kl" and kind in ("drawn", "hybrid"):
        kind = "ragged"
    compare(split_lm("soft-capping"), name, inputs(kind, 16))


@given(
    st.sampled_from([name for name in OBJECTIVES if name != "renormalised_kl"]), st.sampled_from(rows.KINDS),
    st.integers(0, 24), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_number_of_rows_and_label_weight_gives_the_dense_gradient(name, kind, num_rows, label_weight, seed, other):
    split = split_lm("a bias", other=other)
    compare(split, "label_nll" if label_weight == 1.0 else name, inputs(kind, num_rows, seed), label_weight)


def test_reported_label_nll_kl_and_alpha_equal_the_dense_oracle():
    split = split_lm("untied")
    hidden, support, labels, weights = inputs("a tail", 20)
    _, parts, _ = fused(split, "reverse_kl", hidden, support, labels, weights)
    for name, found in (("label_nll", parts.label_nll), ("forward_kl", parts.kl), ("total_variation", 1 - parts.alpha)):
        expected = dense(split, name, hidden, support, labels, weights)[1]
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=5e-5)


def test_label_nll_needs_no_target_rows():
    split = split_lm("untied")
    hidden, support, labels, weights = inputs("a tail", 20)
    _, parts, grads = fused(split, "label_nll", hidden, None, labels, weights)
    expected = dense(split, "label_nll", hidden, support, labels, weights)
    torch.testing.assert_close(parts.label_nll.double(), expected[1], rtol=2e-4, atol=5e-5)
    torch.testing.assert_close(grads, expected[2], rtol=2e-4, atol=1e-4)
    assert parts.kl is None


@pytest.mark.parametrize("other", [False, True], ids=["fused", "again"])
def test_batch_without_rows_has_zero_loss_and_zero_gradients(other):
    split = split_lm("a bias", other=other)
    total, parts, grads = fused(split, "forward_kl", *inputs("a tail", 0))
    assert total == 0
    assert len(parts.objective) == 0
    assert [float(grad.abs().sum()) for grad in grads] == [0.0] * 3


def test_frozen_head_gets_no_gradient():
    split = split_lm("untied")
    split.model.get_output_embeddings().weight.requires_grad_(False)
    hidden, support, labels, weights = inputs("a tail", 20)
    leaf = hidden.clone().requires_grad_()
    train_rows(split, leaf, support, labels, weights, make_objective("forward_kl"))[0].backward()
    assert split.model.get_output_embeddings().weight.grad is None
    torch.testing.assert_close(
        leaf.grad.double(), dense(split, "forward_kl", hidden, support, labels, weights)[2][0], rtol=2e-4, atol=1e-4
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["weights in bfloat16", "autocast"])
def test_bfloat16_heads_accumulate_in_float32(autocast):
    """Compared with float64 for the same rounded weights: products have a relative error of 2**-8, sums add no more."""
    split = split_lm("untied", dtype=torch.float32 if autocast else torch.bfloat16)
    head = split.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.copy_(head.weight.bfloat16())
    hidden, support, labels, weights = inputs("a tail", 300)
    hidden = hidden.bfloat16().to(head.weight.dtype)
    expected_total, _, expected = dense(split, "forward_kl", hidden, support, labels, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total, _, grads = fused(split, "forward_kl", hidden, support, labels, weights)
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(expected_total), rel=5e-3)
    for found, wanted in zip(grads, expected, strict=True):
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("kind", rows.KINDS)
def test_look_at_rows_returns_the_drafts_ce_nll_entropy_and_likeliest_token(kind):
    split = split_lm("soft-capping")
    hidden, support, labels, _ = inputs(kind, 20)
    head = split.model.get_output_embeddings()
    logprobs = dense_logits(split, hidden.double(), head.weight.double(), None).log_softmax(-1)
    found, parts = look_at_rows(split, hidden, support, labels, LOOKS)
    known = dataclasses.replace(support, weights=None, drawn_entropy=None)  # the known part of p, without its weights
    expected = {
        "draft_ce": rows.losses("forward_kl", known, logprobs, labels) + known.entropy().double(),
        "draft_label_nll": -logprobs.gather(1, labels[:, None])[:, 0],
        "draft_entropy": -(logprobs.exp() * logprobs).sum(-1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.detach(), rtol=2e-4, atol=5e-5)
    assert torch.equal(found["draft_likeliest"], logprobs.argmax(-1))
    kl = rows.losses("forward_kl", support, logprobs, labels).detach()
    torch.testing.assert_close(parts.kl.double(), kl, rtol=2e-4, atol=1e-4)
    assert not any(value.requires_grad for value in found.values())


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest number of rows of all returned tensors that are as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            wide = isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and tensor.shape[1] in (V, PADDED)
            if wide and len(tensor) != H:  # a tensor of H rows is the transposed head
                self.rows = max(self.rows, len(tensor))
        return out


@pytest.mark.parametrize("other", [False, True], ids=["fused", "again"])
def test_logits_and_their_gradient_never_exist_for_more_than_one_chunk(other):
    split = split_lm("untied", other=other)
    hidden, support, labels, weights = inputs("a tail", 300)
    with Watch() as watch:
        look_at_rows(split, hidden, support, labels, LOOKS)
        fused(split, "forward_kl", hidden, support, labels, weights)
    assert watch.rows == split.rows_per_chunk


def test_no_tensor_of_rows_by_tokens_is_saved_for_the_backward_pass():
    """Only the gradients of the hidden states and of the head are kept between the passes."""
    split = split_lm("untied")
    hidden, support, labels, weights = inputs("a tail", 300)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        leaf = hidden.clone().requires_grad_()
        total, _ = train_rows(split, leaf, support, labels, weights, make_objective("forward_kl"))
    assert not [shape for shape in saved if V in shape or PADDED in shape]
    gradients = total.grad_fn.gradients
    assert [None if gradient is None else tuple(gradient.shape) for gradient in gradients] == [
        (300, H), (PADDED, H), None
    ]  # fmt: skip


def test_rows_of_weight_zero_change_nothing():
    split = split_lm("tied")
    hidden, support, labels, weights = inputs("ragged", 20)
    weights[10:] = 0.0
    half = dataclasses.replace(
        support, token_ids=support.token_ids[:10], probs=support.probs[:10], tail=support.tail[:10]
    )
    total, _, grads = fused(split, "kl_tv", hidden, support, labels, weights)
    alone, _, few = fused(split, "kl_tv", hidden[:10], half, labels[:10], weights[:10])
    torch.testing.assert_close(total, alone)
    torch.testing.assert_close(grads[1], few[1])
    assert not grads[0][10:].any()


@pytest.mark.parametrize("is_counted", [True, False], ids=["above the floor", "below the floor"])
@pytest.mark.parametrize("other", [False, True], ids=["fused", "again"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "kl_tv"])
def test_tail_of_almost_no_probability_has_the_dense_gradient(name, other, is_counted):
    """The tolerance is 1% of the largest gradient. A difference of two nearly equal numbers would be only rounding."""
    split = split_lm("untied", other=other)
    hidden, _, labels, _ = inputs("a tail", 400)
    hidden *= 5
    with torch.no_grad():
        q, token_ids = split.logits(hidden).double().softmax(-1).topk(6)
    left = 1 - q.sum(-1)
    chosen = (left > 3e-6) & (left < 1e-4) if is_counted else left < 1e-7
    assert chosen.sum() > 3
    probs = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.05, 0.05]).expand(int(chosen.sum()), 6)
    support = Support(token_ids=token_ids[chosen], probs=probs, tail=torch.full((len(probs),), 0.2))
    batch = hidden[chosen], support, labels[chosen], torch.ones(len(probs))
    _, _, expected = dense(split, name, *batch)
    _, _, found = fused(split, name, *batch)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 0.01
