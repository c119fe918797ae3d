"""The model card: its header for the hub, the description of the draft, the figures, and commands that work."""

import dataclasses
import json
import re
import shlex

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

import logitstore
from trainer.run.model_card import Training, model_card

FIGURES = {
    "steps": 1200, "rows": 4194304, "kl": 0.213456, "eval_alpha_lower": 0.71, "eval_alpha_upper": 0.742, "beans": 2.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tiny_store, tiny):
    spec = logitstore.open(tiny_store).spec
    model = dataclasses.replace(spec.target.model, name=tiny.target, revision="abc123")
    data = dataclasses.replace(spec.data, source="s3://key:secret@bucket/data.jsonl")
    return dataclasses.replace(spec, target=dataclasses.replace(spec.target, model=model), data=data)


def card(spec, name="out/draft", **changes):
    training = Training(draft="Qwen/Qwen3-0.6B", objective="forward_kl", selection="adaspec, keep 0.4",
                        figures=FIGURES)  # fmt: skip
    return model_card(name, {"s3://user:pass@bucket/cache.zarr": spec}, dataclasses.replace(training, **changes))


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_header_is_yaml_with_fields_of_the_hub(spec):
    found = header(card(spec))
    assert found["library_name"] == "transformers"
    assert found["base_model"] == "Qwen/Qwen3-0.6B"
    assert "speculative-decoding" in found["tags"]
    for draft in ('a "b": {c}\n#', "/models/qwen", "Qwen/Qwen3-8B, layers 4"):  # these are not names on the hub
        assert "base_model" not in header(card(spec, draft=draft))


def test_card_names_the_target_the_data_and_the_settings(spec):
    text = card(spec, command="python jobs/train_draft.py run.yaml")
    for said in (
        spec.target.model.name, "revision abc123", "float32", "topk, k 16", "forward_kl", "adaspec, keep 0.4",
        "s3://bucket/cache.zarr", "s3://bucket/data.jsonl", "512 tokens", "jobs/train_draft.py run.yaml",
    ):  # fmt: skip
        assert said in text
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in text


def test_card_names_every_store_and_its_data(spec):
    other = dataclasses.replace(spec, data=dataclasses.replace(spec.data, source="more.jsonl"))
    training = Training(draft="d", objective="o", selection="all", figures=FIGURES, settings={"optim": "sgd"})
    text = model_card("draft", {"a.zarr": spec, "b.zarr, 0.5 times an epoch": other}, training)
    rows = re.findall(r"\| (store|its data|settings) \| ([^ ]+)", text)
    assert [what for what, _ in rows] == ["store", "its data", "store", "its data", "settings"]
    assert "| b.zarr, 0.5 times an epoch |\n| its data | more.jsonl (" in text
    assert "| optim sgd |" in text
    assert "| weights |" not in text


def test_card_warns_of_unequal_vocabularies_and_names_the_step_of_the_weights(spec):
    text = card(spec, vocab_sizes=(2112, 2048), weights="of step 2 of 3")
    assert "must be equal (they are 2,112 and 2,048: it will refuse this draft):" in text
    assert "| weights | of step 2 of 3 |" in text


def test_card_has_no_credentials(spec):
    text = card(spec)
    assert "secret" not in text
    assert "pass" not in text
    assert "user" not in text


def test_figures_are_shown_in_order(spec):
    rows = [line for line in card(spec).split("## Numbers")[1].splitlines() if line.startswith("| ") and line[2] != "|"]
    assert [row.split("|")[2].strip() for row in rows] == ["1,200", "4,194,304", "0.2135", "0.71", "0.742", "2.5"]
    assert rows[-1].startswith("| beans")


def test_commands_of_the_card_are_valid_shell_and_json(spec):
    vllm, sglang = blocks(card(spec, gamma=4), "")
    words = shlex.split(vllm.replace("\\\n", ""))
    assert words[:3] == ["vllm", "serve", spec.target.model.name]
    assert json.loads(words[4]) == {"method": "draft_model", "model": "out/draft", "num_speculative_tokens": 4}
    words = shlex.split(sglang.replace("\\\n", ""))
    assert words[words.index("--speculative-draft-model-path") + 1] == "out/draft"
    assert words[words.index("--speculative-num-draft-tokens") + 1] == "4"


def test_python_code_of_the_card_runs(spec, tiny, capsys, monkeypatch):
    (code,) = blocks(card(spec, name=tiny.draft), "python")
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, device_map: load(name))
    torch.manual_seed(0)
    exec(code, {})
    assert "fibonacci" in capsys.readouterr().out


def test_names_with_special_characters_are_quoted_in_commands(spec):
    name = "it's a draft"
    for block in blocks(card(spec, name=name), ""):
        words = shlex.split(block.replace("\\\n", ""))
        assert name in words or json.loads(words[4])["model"] == name
    assert repr(name) in blocks(card(spec, name=name), "python")[0]


def test_card_can_be_made_for_a_store_without_a_target(spec):
    text = card(dataclasses.replace(spec, target=None))
    assert "vllm serve TARGET" in text
