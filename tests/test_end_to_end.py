"""The whole pipeline by the jobs' own entry points, with the target gone after its dump."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import functions, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Dump, rename the target's folder away, then reference, losses, AdaSPEC draft and cache evaluation."""
    import dump_logits
    import evaluate_draft
    import ray
    import train_draft

    folder = tmp_path_factory.mktemp("run")
    store = str(folder / "cache.zarr")
    data = write_jsonl(folder / "data.jsonl", functions(40))
    target = Path(tiny.target)
    away = target.with_name("away")
    training = ["--store", store, "--draft", tiny.draft, "--max_steps", "30", "--per_device_train_batch_size", "4",
                "--learning_rate", "1e-2", "--disable_tqdm", "true", "--use_cpu", "true"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        ray.init(address="local", num_cpus=1, log_to_driver=False, include_dashboard=False)
        try:
            dump_logits.main(
                ["--store", store, "--target", tiny.target, "--data", data, "--max_length", "192",
                 "--shard_rows", "2048", "--scheme", "nucleus", "--mass", "0.95", "--num_proc", "1", "--no_progress"]
            )  # fmt: skip
            target.rename(away)
            try:
                train_draft.main([*training, "--output_dir", str(folder / "reference"), "--selection", "all"])
                dump_logits.main(["--store", store, "--reference", f"ref={folder / 'reference'}", "--no_progress"])
                dump_logits.main(["--store", store, "--reference", f"start={tiny.draft}", "--no_progress"])
                train_draft.main(
                    [*training, "--output_dir", str(folder / "draft"), "--selection", "adaspec", "--reference", "ref"]
                )
                cached = evaluate_draft.main(["--store", store, "--draft", str(folder / "draft"), "--no_progress"])
            finally:
                away.rename(target)
        finally:
            ray.shutdown()
    return SimpleNamespace(folder=folder, store=logitstore.open(store), cached=cached["cached"])


def test_reference_losses_trainings_and_cache_evaluation_need_no_target(run):
    assert sorted(run.store.layers) == ["losses/ref", "losses/start", "target", "tokens"]
    assert logitstore.verify(run.store) == []
    gap = run.store.gap("start", "ref")
    means = [float(gap[i][run.store[i].loss_mask].mean()) for i in range(len(run.store))]
    assert sum(means) / len(means) > 0.05  # the reference has learned
    assert 0 < run.cached["alpha_lower"] <= run.cached["alpha_estimate"] <= run.cached["alpha_upper"] <= 1


def test_adaspec_kept_the_fraction_it_was_asked_for(run):
    history = json.loads((run.folder / "draft" / "trainer_state.json").read_text())["log_history"]
    kept = [entry["kept_fraction"] for entry in history if "kept_fraction" in entry]
    assert kept
    assert all(abs(fraction - 0.4) < 0.02 for fraction in kept)


def test_assisted_generation_with_the_trained_draft_is_the_targets_own_text(run, tiny):
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    draft = AutoModelForCausalLM.from_pretrained(run.folder / "draft").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "draft")
    for pair in functions(6):
        prompt = tokenizer(pair["prompt"], return_tensors="pt")["input_ids"][:, :48]
        settings = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        alone = target.generate(prompt, **settings)
        assisted = target.generate(prompt, assistant_model=draft, **settings)
        assert torch.equal(alone, assisted)
