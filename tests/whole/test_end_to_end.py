"""The whole pipeline through the entry points of the jobs. The target is not available after its dump."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from tests.helpers.tiny import functions, write_jsonl


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Dumps, renames the target's folder, then trains a reference, dumps losses, trains a draft and evaluates it."""
    import ray

    from logitstore.commands import dump as dump_command
    from trainer.commands import evaluate as evaluate_command
    from trainer.commands import train as train_command

    folder = tmp_path_factory.mktemp("run")
    store = str(folder / "cache.zarr")
    data = write_jsonl(folder / "data.jsonl", functions(40))
    target = Path(tiny.target)
    away = target.with_name("away")
    training = ["--store", store, "--draft", tiny.draft, "--max_steps", "30", "--per_device_train_batch_size", "4",
                "--learning_rate", "1e-2", "--no_progress", "true", "--use_cpu", "true"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
        try:
            dump_command.run(
                ["--store", store, "--target", tiny.target, "--data", data, "--max_length", "192",
                 "--shard_rows", "2048", "--scheme", "nucleus", "--mass", "0.95", "--num_proc", "1", "--no_progress"]
            )  # fmt: skip
            target.rename(away)
            try:
                train_command.run([*training, "--output_dir", str(folder / "reference"), "--selection", "all"])
                dump_command.run(["--store", store, "--reference", f"ref={folder / 'reference'}", "--no_progress"])
                dump_command.run(["--store", store, "--reference", f"start={tiny.draft}", "--no_progress"])
                train_command.run(
                    [*training, "--output_dir", str(folder / "draft"), "--selection", "adaspec", "--reference", "ref"]
                )
                cached = evaluate_command.run(["--store", store, "--draft", str(folder / "draft"), "--no_progress"])
            finally:
                away.rename(target)
        finally:
            ray.shutdown()
    return SimpleNamespace(folder=folder, store=logitstore.open(store), cached=cached["cached"])


def test_losses_training_and_cache_evaluation_need_no_target(run):
    assert sorted(run.store.layers) == ["losses/ref", "losses/start", "target", "tokens"]
    assert logitstore.verify(run.store) == []
    gap = run.store.gap("start", "ref")
    means = [float(gap[i][run.store[i].loss_mask].mean()) for i in range(len(run.store))]
    assert sum(means) / len(means) > 0.05  # the reference has learned
    assert 0 < run.cached["alpha_lower"] <= run.cached["alpha_estimate"] <= run.cached["alpha_upper"] <= 1


def test_adaspec_keeps_the_requested_fraction(run):
    history = json.loads((run.folder / "draft" / "trainer_state.json").read_text())["log_history"]
    kept = [entry["kept_fraction"] for entry in history if "kept_fraction" in entry]
    assert kept
    assert all(abs(fraction - 0.4) < 0.02 for fraction in kept)


def test_assisted_generation_with_the_trained_draft_gives_the_targets_text(run, tiny):
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    draft = AutoModelForCausalLM.from_pretrained(run.folder / "draft").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "draft")
    for pair in functions(6):
        prompt = tokenizer(pair["prompt"], return_tensors="pt")["input_ids"][:, :48]
        settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        alone = target.generate(prompt, **settings)
        assisted = target.generate(prompt, assistant_model=draft, **settings)
        assert torch.equal(alone, assisted)
