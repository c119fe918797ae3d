"""SplitLM on architectures of transformers: some can be split and packed, the others are refused by name."""

import copy
import itertools
import re

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    ElectraConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    SmolLM3Config,
    XLNetConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from logitstore.models.probes import check_halves, check_packing
from logitstore.models.split_lm import SplitLM
from tests.helpers.tiny import VOCAB_SIZE

SMALL = {
    "vocab_size": VOCAB_SIZE + 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GPT2 = {"vocab_size": VOCAB_SIZE + 4, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    "ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {**SMALL, "head_dim": 8}
EIGHT = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}

PACKING = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}),
    "gpt2": GPT2Config(**GPT2),
    "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(**GEMMA, sliding_window=4),
    "gemma3_text": Gemma3TextConfig(**GEMMA, sliding_window=4, final_logit_softcapping=20.0),
    "cohere": CohereConfig(**SMALL, logit_scale=0.2),
    "cohere2": Cohere2Config(**SMALL, logit_scale=0.2, sliding_window=4),
    "granite": GraniteConfig(**SMALL, logits_scaling=7.0),
    "hyperclovax": HyperCLOVAXConfig(**SMALL, logits_scaling=0.3),
    "phi": PhiConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "smollm3": SmolLM3Config(**SMALL),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
}
ALONE = {
    "opt": OPTConfig(**OPT),
    "opt, projected": OPTConfig(**OPT, word_embed_proj_dim=16),
    "bloom": BloomConfig(vocab_size=VOCAB_SIZE + 4, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=VOCAB_SIZE + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "falcon_h1": FalconH1Config(**SMALL, **EIGHT, lm_head_multiplier=0.02),
    "mamba": MambaConfig(vocab_size=VOCAB_SIZE + 4, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent_gemma": RecurrentGemmaConfig(**SMALL | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=8),
    "llama4": Llama4TextConfig(**SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
}
NOT_THERE = ("gemma2", "sdpa")
REFUSED = {
    "bert": (BertConfig(**SMALL, is_decoder=True), "logits differ by up to"),
    "electra": (ElectraConfig(**SMALL, embedding_size=16, is_decoder=True), "which has another step between the two"),
    "xlnet": (XLNetConfig(vocab_size=VOCAB_SIZE, d_model=32, n_layer=2, n_head=4, d_inner=48), "must be causal"),
}


def random_model(config, **options):
    torch.manual_seed(0)
    # Copied, because from_config stores its options in the configuration.
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()


@pytest.mark.parametrize("family", [*PACKING, *ALONE])
def test_split_halves_give_the_logits_of_the_whole_model(family):
    model = random_model({**PACKING, **ALONE}[family])
    lm = SplitLM(model, VOCAB_SIZE)
    check_halves(lm)
    ids = torch.tensor([[7, 300, 21, 5, 450]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
        torch.testing.assert_close(lm.logits(lm.hidden(ids)[0]), whole.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_split_or_are_not_causal_are_refused_by_name(family):
    config, reason = REFUSED[family]
    model = random_model(config)
    with pytest.raises(ValueError, match=rf"model={family} \({type(model).__name__}\).*") as caught:
        check_halves(SplitLM(model, VOCAB_SIZE))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["softcap", "scale"])
def test_check_finds_a_wrong_softcap_or_scale_despite_small_logits(change):
    # The logits of a random model are about 0.01, where a soft cap of 30 changes nothing.
    lm = SplitLM(random_model(GemmaConfig(**GEMMA)), VOCAB_SIZE)
    if change == "softcap":
        lm.softcap = 30.0
    else:
        lm.scale = 1.1
    with pytest.raises(ValueError, match=r"model=gemma \(GemmaForCausalLM\), whose logits differ by up to"):
        check_halves(lm)


def test_checks_keep_the_training_mode_and_work_in_bfloat16():
    for config in (PACKING["gemma2"], PACKING["mixtral"], ALONE["mamba"]):
        model = random_model(config, dtype=torch.bfloat16).train()
        check_halves(SplitLM(model, VOCAB_SIZE))
        assert model.training


@pytest.mark.parametrize(
    ("family", "attention"),
    # On a CPU, transformers implements the soft cap of Gemma 2's attention scores only for eager attention.
    [(family, attention) for family in PACKING for attention in ("sdpa", "eager") if (family, attention) != NOT_THERE],
)
def test_packed_documents_give_the_same_hidden_states_as_alone(family, attention):
    model = random_model(PACKING[family], attn_implementation=attention)
    lm = SplitLM(model, VOCAB_SIZE)
    check_packing(lm)
    generator = torch.Generator().manual_seed(1)
    lengths = [6, 1, 9, 4]
    documents = [torch.randint(VOCAB_SIZE, (length,), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        # The documents of the two rows begin at different positions.
        ids = torch.stack([torch.cat(documents), torch.cat(documents[::-1])])
        backwards = torch.cat([torch.arange(length) for length in lengths[::-1]])
        packed = lm.hidden(ids, torch.stack([positions, backwards]))
        alone = [lm.hidden(document[None])[0] for document in documents]
    torch.testing.assert_close(packed[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed[1], torch.cat(alone[::-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ALONE)
def test_models_that_would_mix_packed_documents_are_refused_by_name(family, dtype):
    model = random_model(ALONE[family], dtype=dtype)
    name, attention = type(model).__name__, model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"\({name}\) with attn_implementation={attention}, which .*without packing"):
        check_packing(SplitLM(model, VOCAB_SIZE))


def test_check_finds_a_leak_between_documents_through_tiny_weights():
    config = FalconConfig(**{key: getattr(ALONE["falcon"], key) for key in ("vocab_size", "hidden_size")},
                          num_hidden_layers=1, num_attention_heads=4, initializer_range=0.001)  # fmt: skip
    with pytest.raises(ValueError, match="when the document before it changes") as caught:
        check_packing(SplitLM(random_model(config), VOCAB_SIZE))
    percent = float(re.search(r"states by (\S+) %", str(caught.value))[1])
    assert 0.01 < percent < 2


def test_check_finds_positions_that_do_not_restart():
    model = random_model(GPT2Config(**GPT2))
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[-1])[None].expand_as(ids))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel\).*when its place in the row changes"):
        check_packing(SplitLM(model, VOCAB_SIZE))


def one_row_attention(module, query, key, value, attention_mask, position_ids=None, **options):
    """Attention like flash attention: without a mask, and with document boundaries only in a batch of one row."""
    if len(query) > 1 or position_ids is None:
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **options)
    starts = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), query.shape[2]]
    parts = [
        sdpa_attention_forward(
            module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, is_causal=True, **options
        )[0]
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, 1), None


def test_flash_attention_is_given_the_batch_as_one_row(monkeypatch):
    AttentionInterface.register("my_flash", one_row_attention)
    AttentionMaskInterface.register("my_flash", lambda *_arguments, **_options: None)
    # The checks must run this function as it is; it stands for flash attention on a GPU.
    monkeypatch.setattr("logitstore.models.probes.is_flash_attention_requested", lambda config: False)
    model = random_model(PACKING["llama"])
    dense = SplitLM(model, VOCAB_SIZE)
    ids = torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1, 2]])
    with torch.no_grad():
        expected = dense.hidden(ids, positions)
        model.config._attn_implementation = "my_flash"  # set_attn_implementation would look for a GPU kernel
        torch.testing.assert_close(dense.hidden(ids, positions), expected, rtol=1e-4, atol=1e-4)
    check_packing(dense)
