"""Common model families: each is trained from a store, saved, loaded by transformers, and used as assistant model."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from logitstore.models.identity import tokenizer_spec
from logitstore.models.probes import check_halves
from logitstore.models.split_lm import SplitLM
from tests.helpers.tiny import VOCAB_SIZE, functions, write_store
from trainer.commands import train as train_command

FAMILIES = {
    "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gemma": GemmaConfig, "gemma2": Gemma2Config,
    "gpt_neox": GPTNeoXConfig, "gpt2": GPT2Config,
}  # fmt: skip
PADDED = VOCAB_SIZE + 8
PROMPTS = [[5, 40, 77, 9], [300, 12], [3, 111, 111, 64, 209, 90, 17]]
NEW_TOKENS = 28


def shaped(family, width, layers):
    """Returns a tiny configuration of a family. Large weights make its distributions peaked."""
    common = {"vocab_size": PADDED, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.2}
    if family == "gpt2":
        return GPT2Config(**common, n_embd=width, n_layer=layers, n_head=4, n_positions=512)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
             "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip
    if family == "gpt_neox":
        return GPTNeoXConfig(**common, **sizes)
    heads = {} if family in ("llama", "qwen2") else {"head_dim": width // 4}
    return FAMILIES[family](**common, **sizes, **heads, num_key_value_heads=2)


def saved(folder, config, tokenizer, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_documents(tokenizer):
    documents = []
    for pair in functions(6):
        ids = [*tokenizer(pair["prompt"] + pair["response"])["input_ids"][:80], tokenizer.eos_token_id]
        documents.append((ids, [1] * (len(ids) - 1) + [0]))
    return documents


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_draft_of_each_family_loads_and_keeps_the_targets_greedy_text(family, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    saved(tmp_path / "family", shaped(family, 32, 2), tokenizer, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "family")  # the tokenizer class of Qwen2 adds a token
    vocab_size = tokenizer_spec(tokenizer, uses_chat_template=False).vocab_size
    target = saved(tmp_path / "target", shaped(family, 32, 2), tokenizer, seed=1)
    before = saved(tmp_path / "draft", shaped(family, 16, 1), tokenizer, seed=2)
    store = write_store(str(tmp_path / "cache.zarr"), tiny_documents(tokenizer), target, tokenizer, k=8)
    train_command.run(
        ["--store", store, "--draft", str(tmp_path / "draft"), "--output_dir", str(tmp_path / "out"),
         "--max_steps", "3", "--per_device_train_batch_size", "3", "--learning_rate", "0.003", "--logging_steps", "1",
         "--no_progress", "true", "--use_cpu", "true"]
    )  # fmt: skip
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    kl = [entry["kl"] for entry in history if "kl" in entry]
    assert len(kl) == 3
    assert 0 < kl[-1] < kl[0] < 20

    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(draft) is type(before)
    assert draft.config.vocab_size == PADDED
    assert not torch.equal(draft.get_output_embeddings().weight, before.get_output_embeddings().weight)
    check_halves(SplitLM(draft, vocab_size))
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.assistant_confidence_threshold = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False,
                   "attention_mask": torch.ones_like(ids)}  # fmt: skip
        plain = target.generate(ids, **options)
        assert plain.shape[1] == len(prompt) + NEW_TOKENS
        assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)
