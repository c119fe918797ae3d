"""Evaluation during training: figures compared with plain arithmetic, the best draft, and early stopping."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitstore
from logitstore.documents.prepare import prepare
from logitstore.models.split_lm import SplitLM
from logitstore.storage.storage import Storage
from tests.helpers.runs import torchrun
from tests.helpers.tiny import VOCAB_SIZE, dense_logprobs, functions, write_jsonl
from trainer import DocumentDataset
from trainer.commands import train as train_command
from trainer.evaluation import held_out
from trainer.evaluation.held_out import GREATER_IS_BETTER, HeldOut, greater_is_better

FRACTION = "0.3"
FAST = [
    "--no_progress", "true", "--use_cpu", "true", "--learning_rate", "0.02", "--per_device_train_batch_size", "4",
    "--logging_steps", "1", "--eval_fraction", FRACTION,
]  # fmt: skip
STEPS = ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
BEST = [
    "--learning_rate", "2", "--lr_scheduler_type", "constant", "--max_steps", "6", "--save_total_limit", "1",
    "--load_best_model_at_end", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def draft(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny.draft)


@pytest.fixture(scope="module")
def no_target(tiny_store, tmp_path_factory):
    """A store with only the tokens layer."""
    folder = tmp_path_factory.mktemp("tokens") / "cache.zarr"
    shutil.copytree(tiny_store, folder, ignore=shutil.ignore_patterns("target", "losses"))
    return str(folder)


def dataset(*stores, fraction=float(FRACTION), reads_target=True):
    return DocumentDataset(stores, eval_fraction=fraction, reads_target=reads_target)


def run(tiny, store, folder, *extra):
    return train_command.run(["--store", store, "--draft", tiny.draft, "--output_dir", str(folder), *FAST, *extra])


def history(folder):
    return json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]


def evaluations(folder):
    return [entry for entry in history(folder) if "eval_rows" in entry]


def weights(folder):
    """Returns the weights of a saved draft, without the padding rows of the head, which are reset at the end."""
    found = load_file(Path(folder, "model.safetensors"))
    return {name: value[:VOCAB_SIZE] if "lm_head" in name else value for name, value in found.items()}


def assert_same(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **tolerances)


def oracle(data, documents, model, target):
    """Returns the means over the rows of documents, computed one row at a time in float64."""
    found = {name: [] for name in ("alpha_estimate", "forward_kl", "argmax_agreement", "label_nll", "alpha")}
    for store, number in documents:
        document = data.stores[store][number]
        q, p = dense_logprobs(model, document.ids), dense_logprobs(target, document.ids)
        for row in np.flatnonzero(document.loss_mask):
            kept = document.rows.slice(row, row + 1)
            ours, theirs = np.exp(kept.logprobs.astype(float)), np.exp(q[row, kept.token_ids])
            tail, left = float(kept.tail_mass[0]), max(1 - theirs.sum(), 1e-6)
            found["alpha_estimate"].append(np.minimum(ours, theirs).sum() + min(tail, left))
            found["forward_kl"].append((ours * np.log(ours / theirs)).sum() + tail * np.log(tail / left))
            found["argmax_agreement"].append(kept.token_ids[ours.argmax()] == q[row].argmax())
            found["label_nll"].append(-q[row, document.ids[row + 1]])
            found["alpha"].append(np.minimum(np.exp(p[row]), np.exp(q[row])).sum())
    return {name: np.mean(values) for name, values in found.items()} | {"rows": len(found["alpha"])}


@pytest.mark.parametrize("k", [None, 5])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_equal_plain_arithmetic(k, batch_size, draft, tiny, tiny_store, accelerator):
    """The tolerance is 1e-5 of float64, for the whole store and for a view with fewer entries."""
    data = dataset(logitstore.open(tiny_store).read_smaller(k=k, mass=None))
    held_out = HeldOut(data, batch_size=batch_size)
    draft.train()
    found = held_out.evaluate(SplitLM(draft, VOCAB_SIZE), accelerator)
    assert draft.training
    target = AutoModelForCausalLM.from_pretrained(tiny.target).eval()
    expected = oracle(data, data.order.held_out(), draft.eval(), target)
    assert found["documents"] == len(held_out) == data.order.num_held_out > 3
    assert found["rows"] == expected.pop("rows")
    assert found["alpha_lower"] <= expected.pop("alpha") <= found["alpha_upper"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert found["argmax_known"] == 1.0
    assert found["rows_per_second"] > 0


def test_at_most_the_given_number_of_documents_is_read(draft, tiny_store, accelerator):
    data = dataset(logitstore.open(tiny_store))
    found = HeldOut(data, at_most=2).evaluate(SplitLM(draft, VOCAB_SIZE), accelerator)
    masks = [data.stores[store][number].loss_mask for store, number in data.order.held_out(2)]
    assert (found["documents"], found["rows"]) == (2, sum(int(mask.sum()) for mask in masks))


def test_documents_stay_in_memory_up_to_a_limit(draft, tiny_store, accelerator, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_store, tmp_path / "copy")
    lm = SplitLM(draft, VOCAB_SIZE)
    kept = HeldOut(dataset(logitstore.open(copy)), batch_size=2)
    first = kept.evaluate(lm, accelerator)
    with monkeypatch.context() as patch:
        patch.setattr(held_out, "KEPT_BYTES", 0)
        reading = HeldOut(dataset(logitstore.open(copy)), batch_size=2)
        figures = [HeldOut.evaluate(one, lm, accelerator) for one in (reading, reading)]
    shutil.rmtree(copy)
    figures.append(kept.evaluate(lm, accelerator))
    for other in figures:
        assert {name: other[name] for name in kept.metrics} == {name: first[name] for name in kept.metrics}
    with pytest.raises(logitstore.LogitStoreError):
        reading.evaluate(lm, accelerator)


def test_store_without_a_target_is_evaluated_by_label_nll_only(draft, no_target, accelerator):
    data = dataset(logitstore.open(no_target), reads_target=False)
    held_out = HeldOut(data)
    found = held_out.evaluate(SplitLM(draft, VOCAB_SIZE), accelerator)
    assert set(found) == {"label_nll", "documents", "rows", "runtime", "rows_per_second"}
    nll = []
    for store, number in data.order.held_out():
        ids, mask = data.stores[store][number].ids, data.stores[store][number].loss_mask
        rows = np.flatnonzero(mask)
        nll.extend(-dense_logprobs(draft.eval(), ids)[rows, ids[rows + 1]])
    assert found["label_nll"] == pytest.approx(np.mean(nll), rel=1e-5)
    with pytest.raises(ValueError, match="metric_for_best_model must be label_nll if a store has no finished target"):
        held_out.check_metric("alpha_estimate")


def test_documents_without_rows_that_count_have_no_means(draft, tmp_path, tiny, accelerator):
    target = AutoModelForCausalLM.from_pretrained(tiny.target)
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    from tests.helpers.tiny import write_store

    documents = [(np.arange(3, 20) + i, [0] * 17) for i in range(6)]
    url = write_store(str(tmp_path / "s"), documents, target, tokenizer)
    found = HeldOut(dataset(logitstore.open(url), fraction=0.5)).evaluate(SplitLM(draft, VOCAB_SIZE), accelerator)
    assert found["rows"] == 0
    assert math.isnan(found["alpha_estimate"])


def test_held_out_documents_stay_held_out_when_a_store_grows(tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.tokenizer)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", functions(36)[18 * i : 18 * i + 18]) for i in range(2)]
    held_out, trained = [], []
    for append, file in enumerate(files):
        prepare(
            Storage(tmp_path / "s"), file, tokenizer, append=bool(append), max_length=64, shard_rows=256, num_proc=1,
            progress=False,
        )  # fmt: skip
        data = dataset(logitstore.open(tmp_path / "s"), reads_target=False)
        held_out.append({tuple(data.stores[0][number].ids.tolist()) for _, number in HeldOut(data).documents})
        epoch = data.order.epoch(0)
        trained.append({tuple(sample.ids.tolist()) for place in range(len(epoch)) for sample in data[epoch[place]]})
    assert 3 < len(held_out[0]) < len(held_out[1])
    assert held_out[0] < held_out[1]
    assert trained[0] < trained[1]
    assert not held_out[1] & trained[1]


@pytest.fixture(scope="module")
def two_ranks(tiny, tiny_store, tmp_path_factory):
    """Runs with one rank and with two ranks on the same batches: one of two steps, one that loads the best of six."""
    folder = tmp_path_factory.mktemp("ranks")
    common = ["--store", tiny_store, "--draft", tiny.draft, *FAST, "--per_device_eval_batch_size", "2", *STEPS]
    runs = {"few": ["--eval_on_start", "true", "--max_steps", "2"], "best": BEST}
    for name, extra in runs.items():
        train_command.run([*common, *extra, "--output_dir", str(folder / f"{name}1")])
    half = ["--per_device_train_batch_size", "2", "--output_dir"]
    torchrun(2, *([*common, *extra, *half, str(folder / f"{name}2")] for name, extra in runs.items()))
    return folder


def test_two_ranks_get_the_same_figures_as_one(two_ranks):
    """The figures are identical before training, and afterwards equal up to the float32 rounding of gradient sums."""
    one, two = (evaluations(two_ranks / f"few{ranks}") for ranks in (1, 2))
    assert [entry["step"] for entry in two] == [entry["step"] for entry in one] == [0, 1, 2]
    for ours, theirs in zip(one, two, strict=True):
        for name in (*GREATER_IS_BETTER, "rows", "documents"):
            tolerance = {"rel": 1e-4, "abs": 1e-5} if ours["step"] else {"rel": 0, "abs": 0}
            assert theirs[f"eval_{name}"] == pytest.approx(ours[f"eval_{name}"], **tolerance)


def test_all_ranks_load_the_best_draft_at_the_end(two_ranks):
    *during, final = evaluations(two_ranks / "best2")
    best = max(during, key=lambda entry: entry["eval_alpha_estimate"])
    assert best["step"] < 6
    assert {name: final[f"eval_{name}"] for name in GREATER_IS_BETTER} == {
        name: best[f"eval_{name}"] for name in GREATER_IS_BETTER
    }


@pytest.mark.parametrize(("metric", "best"), [("forward_kl", min), ("eval_alpha_estimate", max)])
def test_best_draft_by_the_metric_is_saved(metric, best, tiny, tiny_store, tmp_path):
    """The learning rate is so high that the draft becomes worse before the last step."""
    found = run(tiny, tiny_store, tmp_path / "out", *BEST, "--metric_for_best_model", metric, *STEPS)
    name = f"eval_{metric.removeprefix('eval_')}"
    *during, final = evaluations(tmp_path / "out")
    assert [entry["step"] for entry in during] == list(range(1, 7))
    values = {entry["step"]: entry[name] for entry in during}
    step = best(values, key=values.get)
    assert step < 6
    assert final[name] == found[name] == values[step] != values[6]
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "out" / f"checkpoint-{step}"), rtol=0, atol=0)


def test_early_stopping_ends_the_run_permanently(tiny, tiny_store, tmp_path):
    extra = ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_steps", "30", "--early_stopping", "2"]
    extra += ["--load_best_model_at_end", "true", "--save_total_limit", "2", *STEPS]
    found = run(tiny, tiny_store, tmp_path / "out", *extra)
    values = [entry["eval_alpha_estimate"] for entry in evaluations(tmp_path / "out")][:-1]
    assert found["steps"] == len(values) < 30
    assert len(values) - 1 - int(np.argmax(values)) == 2
    before = weights(tmp_path / "out")
    assert run(tiny, tiny_store, tmp_path / "out", *extra, "--resume_from_checkpoint", "true") == found
    # A run killed between its last step and its end trains no further step.
    (tmp_path / "out" / "trainer_state.json").unlink()
    again = run(tiny, tiny_store, tmp_path / "out", *extra, "--resume_from_checkpoint", "true")
    assert (again["steps"], again["eval_alpha_estimate"]) == (found["steps"], found["eval_alpha_estimate"])
    assert_same(weights(tmp_path / "out"), before, rtol=0, atol=0)


def test_resumed_run_keeps_the_count_of_early_stopping(tiny, tiny_store, tmp_path):
    """It stops at the same step as the uninterrupted run."""
    extra = ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_steps", "30", "--early_stopping", "3"]
    extra += ["--save_total_limit", "9"]
    found = run(tiny, tiny_store, tmp_path / "whole", *extra, *STEPS)
    last = int(found["steps"])
    resume = str(tmp_path / "whole" / f"checkpoint-{last - 1}")
    again = run(tiny, tiny_store, tmp_path / "more", *extra, *STEPS, "--resume_from_checkpoint", resume)
    assert again["steps"] == last
    assert_same(weights(tmp_path / "more"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_early_stopping_can_be_added_to_a_resumed_run(tiny, tiny_store, tmp_path):
    run(tiny, tiny_store, tmp_path / "first", "--max_steps", "2", *STEPS)
    more = ["--early_stopping", "9", "--max_steps", "4", "--resume_from_checkpoint"]
    assert run(tiny, tiny_store, tmp_path / "on", *STEPS, *more, str(tmp_path / "first" / "checkpoint-2"))["steps"] == 4


def test_save_strategy_best_saves_only_better_drafts(tiny, tiny_store, tmp_path):
    extra = ["--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--max_steps", "6", *STEPS]
    run(tiny, tiny_store, tmp_path / "out", *extra, "--save_strategy", "best", "--save_total_limit", "9")
    best, better = -1.0, []
    for entry in evaluations(tmp_path / "out"):
        if entry["eval_alpha_estimate"] > best:
            best = entry["eval_alpha_estimate"]
            better.append(f"checkpoint-{entry['step']}")
    assert len(better) < 6
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == better


@pytest.mark.parametrize(("rate", "falls"), [("0.02", False), ("0.5", True)])
def test_reduce_lr_on_plateau_lowers_the_rate_only_without_improvement(rate, falls, tiny, tiny_store, tmp_path):
    """For acceptance greater is better, while torch's schedule assumes the opposite by default."""
    extra = ["--learning_rate", rate, "--lr_scheduler_type", "reduce_lr_on_plateau", "--max_steps", "8"]
    extra += ["--lr_scheduler_kwargs", '{"patience": 0, "factor": 0.5}', *STEPS, "--save_strategy", "no"]
    run(tiny, tiny_store, tmp_path / "out", *extra)
    rates = [entry["learning_rate"] for entry in history(tmp_path / "out") if "learning_rate" in entry]
    assert (rates[-1] < float(rate)) == falls


def test_final_figures_are_in_the_result_the_state_and_the_card(tiny, tiny_store, tmp_path, capsys):
    """This holds even if nothing is evaluated during training."""
    found = run(tiny, tiny_store, tmp_path / "out", "--max_steps", "2", "--objective", "jsd", "--beta", "0.3", "--json")
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (entry,) = evaluations(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert printed == {"draft": str(tmp_path / "out"), **found}
    for name in GREATER_IS_BETTER:
        assert found[f"eval_{name}"] == entry[f"eval_{name}"]
        assert f"| {entry[f'eval_{name}']:.4g} |" in card
    (last,) = [entry["kl"] for entry in history(tmp_path / "out") if entry["step"] == 2 and "kl" in entry]
    assert f"{last:.4g}" in card
    assert "jsd, beta 0.3" in card
    assert "optimizer steps | 2 |" in card
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = draft.get_output_embeddings().weight.detach()
    torch.testing.assert_close(rows[VOCAB_SIZE:], rows[:VOCAB_SIZE].mean(0).expand_as(rows[VOCAB_SIZE:]))


def test_selection_is_described_in_the_card(tiny, tiny_store, tmp_path):
    extra = ["--selection", "adaspec", "--reference", "reference", "--outside_weight", "0.1", "--eval_fraction", "0"]
    found = run(tiny, tiny_store, tmp_path / "out", "--max_steps", "1", *extra, "--draft_layers", "1")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "adaspec, keep 0.4, scope micro_batch, denominator kept, outside_weight 0.1, reference_ce reference" in card
    assert f"{tiny.draft}, layers 1" in card
    assert not [name for name in found if name.startswith("eval_")]


def test_lora_run_can_be_resumed_and_is_saved_as_an_ordinary_model(tiny, tiny_store, tmp_path, accelerator):
    extra = ["--lora_rank", "4", "--learning_rate", "0.3", "--max_steps", "4", *STEPS, "--save_total_limit", "9"]
    extra += ["--load_best_model_at_end", "true", "--lora_dropout", "0.1"]
    found = run(tiny, tiny_store, tmp_path / "whole", *extra)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    again = run(tiny, tiny_store, tmp_path / "more", *extra, "--resume_from_checkpoint", str(checkpoint))
    assert again["loss"] > 0
    assert_same(weights(tmp_path / "more"), weights(tmp_path / "whole"), rtol=0, atol=0)
    assert run(tiny, tiny_store, tmp_path / "whole", *extra, "--resume_from_checkpoint", "true") == found
    (tmp_path / "whole" / "trainer_state.json").unlink()
    (tmp_path / "whole" / "config.json").unlink()
    late = run(tiny, tiny_store, tmp_path / "whole", *extra, "--resume_from_checkpoint", "true")
    assert late["eval_forward_kl"] == found["eval_forward_kl"]

    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    first = AutoModelForCausalLM.from_pretrained(tiny.draft)
    assert draft.state_dict().keys() == first.state_dict().keys()
    assert torch.equal(draft.model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert not torch.equal(draft.model.layers[0].mlp.up_proj.weight, first.model.layers[0].mlp.up_proj.weight)
    figures = HeldOut(dataset(logitstore.open(tiny_store))).evaluate(SplitLM(draft, VOCAB_SIZE), accelerator)
    assert found["eval_forward_kl"] == pytest.approx(figures["forward_kl"], rel=1e-5)
    assert "LoRA of rank 4, merged" in (tmp_path / "whole" / "README.md").read_text()


def test_run_with_label_nll_is_evaluated(tiny, no_target, tmp_path):
    extra = ["--objective", "label_nll", "--max_steps", "2", *STEPS, "--metric_for_best_model", "label_nll"]
    found = run(tiny, no_target, tmp_path / "out", *extra)
    assert {name for name in found if name.startswith("eval_")} == {"eval_label_nll", "eval_documents", "eval_rows"}


@pytest.mark.parametrize(("metric", "is_greater"), GREATER_IS_BETTER.items())
def test_greater_is_better_for_acceptance_and_not_for_nats(metric, is_greater):
    assert greater_is_better(metric) == greater_is_better(f"eval_{metric}") == is_greater
    assert is_greater == (metric[0] == "a")


BAD = {
    "metric": (["--metric_for_best_model", "eval_kl"], "got metric_for_best_model=eval_kl; did you mean forward_kl?"),
    "constant": (["--metric_for_best_model", "argmax_known"], "got metric_for_best_model=argmax_known; did you mean"),
    "direction": (
        ["--metric_for_best_model", "forward_kl", "--greater_is_better", "true"],
        "greater_is_better must be False with metric_for_best_model=forward_kl, got greater_is_better=True",
    ),
    "best": (
        ["--load_best_model_at_end", "true"],
        "eval_strategy must be steps or epoch to load the best checkpoint, got",
    ),
    "save": (["--save_strategy", "best"], "eval_strategy must be steps or epoch to save the best checkpoint, got"),
    "plateau": (["--lr_scheduler_type", "reduce_lr_on_plateau"], "eval_strategy must be steps or epoch to follow a"),
    "start": (["--eval_on_start", "true", "--eval_fraction", "0"], "got eval_fraction=0 with eval_on_start=True; add"),
    "nothing": (["--eval_strategy", "epoch", "--eval_fraction", "0"], "eval_fraction must be above 0 to evaluate, got"),
    "none held out": (
        ["--eval_fraction", "1e-9"],
        "eval_fraction must be large enough to hold out at least one document, got a fraction that",
    ),
    "no target": (
        ["--store", "{no_target}", "--objective", "label_nll", "--eval_strategy", "epoch"],
        "metric_for_best_model must be label_nll if a store has no finished target, got metric_for_best_model=alpha",
    ),
    "fsdp": (["--fsdp", "full_shard"], "fsdp must be None, got fsdp=full_shard (the loss "),
    "deepspeed": (["--deepspeed", "ds.json"], "deepspeed must be None, got deepspeed=ds.json (the loss "),
    "half": (["--bf16_full_eval", "true"], "bf16_full_eval must be False, got bf16_full_eval=True (eval"),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_evaluation_options_are_refused_before_weights_are_read(
    name, tiny, tiny_store, no_target, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("trainer.drafts.source.load_model", None)
    extra, message = BAD[name]
    with pytest.raises(SystemExit):
        run(tiny, tiny_store, tmp_path / "out", *(value.format(no_target=no_target) for value in extra))
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_launch_with_sharded_parameters_is_refused(tiny, tiny_store, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        run(tiny, tiny_store, tmp_path / "out")
    assert "ACCELERATE_USE_FSDP must be false, got ACCELERATE_USE_FSDP=true (the loss " in capsys.readouterr().err
