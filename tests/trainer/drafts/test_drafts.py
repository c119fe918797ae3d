"""Sources of a draft: an existing model, a new one from a configuration, layers of a larger model, padding, LoRA."""

import dataclasses
import json
import re
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DiffLlamaConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    XLMConfig,
)

import logitstore
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from tests.helpers.tiny import PADDED_VOCAB_SIZE, VOCAB_SIZE, make_model, make_tokenizer
from trainer.drafts.lora import Lora, add_lora, has_lora, load_lora, merge_lora
from trainer.drafts.reshaping import chosen_layers, cut_layers, pad_vocabulary, settle_padding
from trainer.drafts.source import DraftSource, make_draft, plan_draft

IDS = torch.tensor([[5, 40, 77, 9, 300, 12, 3, 111]])
SMALL = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tiny_store, tiny):
    """The spec of the store, with the paths of an existing target and tokenizer."""
    spec = logitstore.open(tiny_store).spec
    model = dataclasses.replace(spec.target.model, name=tiny.target)
    return dataclasses.replace(
        spec,
        target=dataclasses.replace(spec.target, model=model),
        tokenizer=dataclasses.replace(spec.tokenizer, name=tiny.tokenizer),
    )


def random_model(config, scale=0.3):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits[0]


def made(spec, **source):
    return make_draft(plan_draft(DraftSource(**source), spec))


def refused(spec, match, **source):
    with pytest.raises(ValueError, match=match) as caught:
        made(spec, **source)
    assert "\n" not in str(caught.value)


def test_draft_without_changes_is_loaded_unchanged(tiny, spec):
    plan = plan_draft(DraftSource(draft=tiny.draft), spec)
    assert plan.num_parameters == sum(p.numel() for p in make_draft(plan).parameters())
    assert plan.notes == ()
    assert torch.equal(logits(make_draft(plan)), logits(AutoModelForCausalLM.from_pretrained(tiny.draft)))


# New drafts from a configuration


def test_config_overrides_make_a_smaller_model_of_the_targets_family(spec):
    sizes = ("hidden_size=24", "num_hidden_layers=3", "intermediate_size=40", "num_attention_heads=3",
             "num_key_value_heads=1")  # fmt: skip
    plan = plan_draft(DraftSource(config=sizes), spec)
    draft = make_draft(plan)
    config = draft.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 24, 3)
    assert config.head_dim == 8  # hidden_size / num_attention_heads, and not the target's 12
    assert config.vocab_size == VOCAB_SIZE
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert plan.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(spec.tokenizer.name).get_vocab()
    assert plan.num_parameters == sum(p.numel() for p in draft.parameters())


def test_weights_depend_only_on_the_seed_and_the_callers_random_state_is_kept(spec):
    state = torch.get_rng_state()
    one, same, other = (made(spec, config=("hidden_size=16",), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))


def test_config_file_can_name_any_architecture(spec, tmp_path):
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}))
    draft = made(spec, config=(str(file), "num_hidden_layers=1"))
    assert type(draft).__name__ == "GPT2LMHeadModel"
    assert (draft.config.n_embd, draft.config.n_layer, draft.config.vocab_size) == (16, 1, VOCAB_SIZE)
    draft.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(draft))


def test_per_layer_lists_of_a_config_follow_the_number_of_layers(spec, tmp_path):
    Gemma2Config(**SMALL | {"max_position_embeddings": 512, "head_dim": 8}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"][0] == "sliding_attention"
    for layers in (2, 9):
        draft = made(spec, config=(str(tmp_path), f"num_hidden_layers={layers}"))
        assert len(draft.config.layer_types) == len(draft.model.layers) == layers
        assert draft.config.head_dim == 8


def test_overrides_apply_to_the_config_of_the_named_draft(tiny, spec):
    assert made(spec, draft=tiny.draft, config=("num_hidden_layers=2",)).config.hidden_size == 16


def test_invalid_configurations_are_refused(spec, tiny, tmp_path):
    refused(
        spec, "the architecture knows, got hiden_size; the most similar one is hidden_size", config=("hiden_size=8",)
    )
    refused(spec, "hidden_size=30.*not a multiple of the number of attention heads", config=("hidden_size=30",))
    refused(spec, "num_key_value_heads=3", config=("num_key_value_heads=3",))
    refused(spec, "hidden_size=abc", config=("hidden_size=abc",))
    refused(spec, "each key once, got hidden_size twice", config=("hidden_size=8", "hidden_size=16"))
    refused(spec, "at most one word that is not a key=value pair, got a and b", config=("a", "b"))
    refused(spec, "draft_config must be a Hugging Face id or a folder", config=(str(tmp_path / "none"),))
    refused(spec, "vocab_size must be at least the tokenizer's 512", config=("vocab_size=100",))
    refused(spec, "max_position_embeddings=64; add max_position_embeddings=512", config=("max_position_embeddings=64",))
    refused(spec, "draft_layers must be used without draft_config, got draft_layers=2 with draft_config; omit",
            config=("hidden_size=8",), layers="2")  # fmt: skip
    refused(spec, "draft must be given, got none")
    for text, match in (("[1]", "JSON object with a model_type"), ("{}", "no model_type"), ("{", "JSON object"),
                        ('{"model_type": "lama"}', "JSON object with a model_type"),
                        ('{"model_type": "llama", "hiden_size": 8}', "most similar one is hidden_size")):  # fmt: skip
        file = tmp_path / "bad.json"
        file.write_text(text)
        refused(spec, match, config=(str(file),))


def test_draft_with_another_tokenizer_than_the_store_is_refused(spec, tmp_path, tiny):
    other = make_tokenizer(tmp_path / "other", vocab_size=400)
    make_model(tmp_path / "model", other, hidden=16, layers=1)
    refused(spec, "tokenizer must be the store's", draft=str(tmp_path / "model"), config=("hidden_size=8",))


def test_context_shorter_than_the_targets_is_noted(spec, tmp_path, tiny):
    AutoTokenizer.from_pretrained(tiny.tokenizer).save_pretrained(tmp_path)
    target = AutoConfig.from_pretrained(tiny.target)
    target.max_position_embeddings = 4096
    target.save_pretrained(tmp_path)
    model = dataclasses.replace(spec.target.model, name=str(tmp_path))
    longer = dataclasses.replace(spec, target=dataclasses.replace(spec.target, model=model))
    (note,) = plan_draft(DraftSource(draft=tiny.draft), longer).notes
    assert "max_position_embeddings is 512" in note
    assert "4096" in note
    assert "rotary" in note
    gone = dataclasses.replace(model, name=str(tmp_path / "gone"))
    unknown = dataclasses.replace(spec, target=dataclasses.replace(spec.target, model=gone))
    assert plan_draft(DraftSource(draft=tiny.draft), unknown).notes == ()


# Drafts cut from a larger model


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("4", 28, (0, 9, 18, 27)), ("1", 28, (0,)), ("2", 2, (0, 1)), ("3", 6, (0, 2, 5)), ("5,", 28, (5,)),
        ("0,1,14,27", 28, (0, 1, 14, 27)),
    ],
)  # fmt: skip
def test_layers_are_given_by_number_or_by_count(text, count, expected):
    assert chosen_layers(text, count) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [("0", "between 1 and"), ("29", "between 1 and"), ("0,28", "ascending"), ("3,2", "ascending"), ("1,1", "ascending"),
     ("a", "number of layers"), ("", "number of layers"), ("-1,2", "number of layers")],
)  # fmt: skip
def test_invalid_layers_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        chosen_layers(text, 28)


FAMILIES = {
    "llama": (LlamaConfig(**SMALL, tie_word_embeddings=False), "model.layers"),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8, sliding_window=3, tie_word_embeddings=True), "model.layers"),
    "gpt2": (GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=5, n_head=4, n_positions=64), "transformer.h"),
    "opt": (
        OPTConfig(vocab_size=VOCAB_SIZE, hidden_size=32, ffn_dim=48, num_hidden_layers=5, num_attention_heads=4,
                  word_embed_proj_dim=16, max_position_embeddings=64),
        "model.decoder.layers",
    ),
    "phi": (PhiConfig(**{**SMALL, "num_key_value_heads": 4}), "model.layers"),
    "qwen2": (Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=2), "model.layers"),
    "qwen3_moe": (
        Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        "model.layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_equals_the_original_without_the_other_layers(family, tmp_path):
    config, layers = FAMILIES[family]
    model = random_model(config)
    cut = cut_layers(model, (0, 1, 4))
    # The oracle is the same model with the other layers deleted.
    remaining = model.get_submodule(layers)
    whole = logits(model)
    for layer in (3, 2):
        del remaining[layer]
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(config, key, None):
            setattr(model.config, key, [getattr(config, key)[layer] for layer in (0, 1, 4)])
    model.config.num_hidden_layers = 3
    expected = logits(model)
    assert not torch.allclose(whole, expected, rtol=1e-2)
    torch.testing.assert_close(logits(cut), expected)
    numbers = {module.layer_idx for module in cut.modules() if isinstance(getattr(module, "layer_idx", None), int)}
    assert numbers in ({0, 1, 2}, set())
    cut.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(cut), rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.generate(IDS, max_new_tokens=4, do_sample=False),
                               again.generate(IDS, max_new_tokens=4, do_sample=False))  # fmt: skip


def test_layers_that_depend_on_their_number_are_refused():
    config = DiffLlamaConfig(**SMALL)
    with pytest.raises(ValueError, match=r"lambda_init of layer 4 is 0\.\d+, but 0\.\d+ as layer 1\); choose other"):
        cut_layers(random_model(config), (0, 4))
    xlm = random_model(XLMConfig(vocab_size=VOCAB_SIZE, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=64))
    with pytest.raises(ValueError, match=r"one list of 3 layers, .* \(XLMWithLMHeadModel\) with"):
        cut_layers(xlm, (0, 1))


def test_draft_can_be_cut_from_a_named_model(tiny, spec):
    draft = made(spec, draft=tiny.target, layers="1")
    assert draft.config.num_hidden_layers == 1
    plan = plan_draft(DraftSource(draft=tiny.target, layers="1,"), spec)
    assert plan.layers == (1,)
    assert plan.num_parameters == sum(p.numel() for p in draft.parameters())
    refused(spec, "draft_layers must be between 1 and 2, the number of layers of", draft=tiny.target, layers="3")


# Padding of the vocabulary


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("size", [VOCAB_SIZE + 37, VOCAB_SIZE])
def test_padding_changes_no_logit_and_its_rows_are_never_likeliest(family, size, tmp_path):
    model = random_model(FAMILIES[family][0])
    true = VOCAB_SIZE - 5  # five rows are already padding
    before = logits(model)[:, :true]
    pad_vocabulary(model, size, true)
    after = logits(model)
    assert after.shape[1] == model.config.vocab_size == size
    torch.testing.assert_close(after[:, :true], before)
    p = after.double().softmax(-1)
    assert p[:, true:].max() <= 1 / true
    assert (after[:, true:].max(-1).values < after[:, :true].max(-1).values).all()
    tied = family == "gpt2"
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), after)
    check_halves(SplitLM(model, true))


def test_padding_rows_changed_by_training_are_reset():
    model = random_model(FAMILIES["llama"][0])
    with torch.no_grad():
        model.lm_head.weight[500:] *= 40
    assert logits(model)[:, 500:].max() > logits(model)[:, :500].max()
    settle_padding(model, 500)
    assert (logits(model)[:, 500:].max(-1).values < logits(model)[:, :500].max(-1).values).all()


def test_pad_vocab_size_target_uses_the_size_of_the_targets_embedding(tiny, spec, tmp_path):
    small = make_model(tmp_path / "small", tiny.tokenizer, hidden=16, layers=1, vocab_size=VOCAB_SIZE)
    assert made(spec, draft=small, pad_vocab_size="target").config.vocab_size == PADDED_VOCAB_SIZE
    assert made(spec, config=("hidden_size=16",), pad_vocab_size="target").config.vocab_size == PADDED_VOCAB_SIZE
    assert made(spec, draft=tiny.draft, pad_vocab_size="512").config.vocab_size == VOCAB_SIZE
    refused(spec, "at least the vocabulary size 512, got pad_vocab_size=511", draft=small, pad_vocab_size="511")
    refused(spec, "a number or 'target', got pad_vocab_size=many", draft=small, pad_vocab_size="many")


# LoRA


def train_a_little(draft):
    split = SplitLM(draft, VOCAB_SIZE)
    optimizer = torch.optim.SGD([p for p in draft.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        rows = split.logits(split.hidden(IDS)[0, :-1])
        torch.nn.functional.cross_entropy(rows, IDS[0, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_lora_trains_only_its_updates_and_merges_into_an_ordinary_model(family, tmp_path):
    draft = random_model(FAMILIES[family][0])
    before, keys = logits(draft), set(draft.state_dict())
    add_lora(draft, Lora(rank=2, alpha=4.0, dropout=0.0), seed=3)
    assert has_lora(draft)
    torch.testing.assert_close(logits(draft), before)
    trained = [name for name, p in draft.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    train_a_little(draft)
    after = logits(draft)
    assert not torch.allclose(after, before, rtol=1e-2)

    draft.save_pretrained(tmp_path / "checkpoint")
    assert all("lora_" in name for name in load_file(tmp_path / "checkpoint" / "adapter_model.safetensors"))
    resumed = random_model(FAMILIES[family][0])
    add_lora(resumed, Lora(rank=2, alpha=4.0, dropout=0.0), seed=9)
    load_lora(resumed, tmp_path / "checkpoint")
    assert torch.equal(logits(resumed), after)

    merge_lora(draft)
    assert not has_lora(draft)
    assert set(draft.state_dict()) == keys
    torch.testing.assert_close(logits(draft), after, rtol=1e-3, atol=1e-3)
    draft.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(draft))


def test_lora_targets_select_layers_by_name(tiny, spec):
    draft = made(spec, draft=tiny.draft, lora=Lora(rank=4, alpha=8.0, dropout=0.1, targets=("q_proj", "v_proj")))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in draft.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "v_proj"}
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    refused(spec, "lora_targets must be linear layers.*choose from down_proj, gate_proj", draft=tiny.draft,
            lora=Lora(**lora, targets=("nothing",)))  # fmt: skip
    refused(spec, "lora_targets must be linear layers.*got lora_targets=q_proj nothing", draft=tiny.draft,
            lora=Lora(**lora, targets=("q_proj", "nothing")))  # fmt: skip
    refused(spec, "lora_targets must not include the head", draft=tiny.draft, lora=Lora(**lora, targets=("lm_head",)))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"rank": 0}, "lora_rank must be at least 1"), ({"alpha": 0.0}, "lora_alpha must be above 0"),
     ({"dropout": 1.0}, "lora_dropout must be at least 0 and below 1"), ({"targets": ()}, "lora_targets must name")],
)  # fmt: skip
def test_invalid_lora_settings_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        Lora(**{"rank": 2, "alpha": 4.0, "dropout": 0.0, **wrong})


def test_peft_too_old_for_transformers_is_refused_with_both_versions(monkeypatch):
    monkeypatch.setattr("trainer.drafts.lora.MIN_PEFT_VERSION", "99.1")
    needed = f"lora_rank needs peft >= 99.1 with transformers {version('transformers')}"
    with pytest.raises(ValueError, match=re.escape(f"{needed}, got lora_rank=2 with peft {version('peft')}; install")):
        Lora(rank=2, alpha=4.0, dropout=0.0)
