"""Resuming from every step of a run gives the same documents, weights and log as the uninterrupted run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import logitstore
from tests.helpers.training import history, logged, on_ranks, same_weights, train, trained, with_dropout
from trainer.loop import checkpoints

CASES = {
    "plain": {"per_device_train_batch_size": 8},
    "short last step": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
    "packed, accumulated, two stores": {
        "packing": True, "pack_length": 200, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "weights": [1.0, 0.5],
    },
    "workers": {"dataloader_num_workers": 2, "per_device_train_batch_size": 7, "num_train_epochs": 1.75},
    "a lasting worker, packed": {  # marked as long: torch waits seconds for each worker to end
        "dataloader_num_workers": 1, "packing": True, "pack_length": 400, "dataloader_persistent_workers": True,
    },
    "scores of recent steps": {"selection": "label_nll", "scope": "queue", "per_device_train_batch_size": 8},
    "scores of a step": {
        "selection": "adaspec", "scope": "step", "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2,
    },
    "low-rank updates": {"lora_rank": 2, "per_device_train_batch_size": 12, "selection": "random"},
    "logged by epoch": {"logging_strategy": "epoch", "per_device_train_batch_size": 8, "max_steps": 5},
    "dropped last step": {"dataloader_drop_last": True, "per_device_train_batch_size": 9, "eval_fraction": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def draft(tiny, tmp_path_factory):
    return with_dropout(tmp_path_factory.mktemp("draft") / "draft", tiny.draft)


def folders(output):
    return checkpoints.finished(Path(output))


def train_loss(state):
    return state.log_history[-1]["train_loss"]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * ("lasting" in case)) for case in CASES])
def test_resume_at_every_step_equals_the_uninterrupted_run(case, draft, tiny_store, tmp_path):
    options = dict(CASES[case])
    if "weights" in options:
        options["stores"] = [tiny_store]
    whole = tmp_path / "whole"
    trainer = train(tiny_store, draft, whole, **options)
    trainer.save_model(str(whole / "final"))
    state, saved = trainer.state, folders(whole)
    assert [path.name for path in saved] == [f"checkpoint-{step + 1}" for step in range(state.max_steps)]
    for step, checkpoint in enumerate(saved, start=1):
        again = tmp_path / str(step)
        found = train(tiny_store, draft, again, resume=checkpoint, save_strategy="no", **options)
        assert trained(again) == trained(whole, after=step)
        assert (found.state.global_step, found.state.epoch) == (state.global_step, state.epoch)
        # With logging by epoch, values of the last step are logged only by the run that made that step.
        left_out = ("grad_norm", "learning_rate") if options.get("logging_strategy") == "epoch" else ()
        assert logged(found.state.log_history, left_out) == logged(state.log_history, left_out)
        assert train_loss(found.state) == train_loss(state)
        found.save_model(str(again / "final"))
        assert same_weights(again / "final", whole / "final")


def test_every_document_is_trained_on_once_per_epoch(draft, tiny_store, tmp_path):
    state = train(tiny_store, draft, tmp_path / "out", packing=True, pack_length=250, save_strategy="no").state
    store = logitstore.open(tiny_store)
    texts = Counter(" ".join(map(str, store[i].ids.tolist())) for i in range(len(store)))
    found = trained(tmp_path / "out")
    assert Counter(text for _, text in found) == Counter({text: 2 * number for text, number in texts.items()})
    half = state.global_step // 2
    assert Counter(text for step, text in found if step <= half) == texts
    assert state.epoch == 2.0


PACKS = {"packing": True, "pack_length": 200}
"""Options that give 15 packs."""
OF_TWO = {
    "packed": (8, PACKS | {"per_device_train_batch_size": 2, "dataloader_num_workers": 1}),
    "queue": (6, {"selection": "label_nll", "scope": "queue", "per_device_train_batch_size": 4}),
    "step": (6, {"scope": "step", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
}
"""Runs with two ranks: the number of steps and the options."""


@pytest.fixture(scope="module")
def two_ranks(draft, tiny_store, tmp_path_factory):
    """Folder of runs with two ranks and a checkpoint at every step, and of runs resumed from each checkpoint."""
    folder = tmp_path_factory.mktemp("ranks")
    common = {"store": tiny_store, "draft": draft}
    specs = []
    for name, (num_steps, options) in OF_TWO.items():
        run = common | options
        specs.append(run | {"output": folder / name / "whole"})
        for step in range(1, num_steps):
            resume = folder / name / "whole" / f"checkpoint-{step}"
            specs.append(run | {"output": folder / name / f"{step}", "resume": resume, "save_steps": 1000})
    common |= OF_TWO["packed"][1]
    alone = {"store": tiny_store, "draft": draft, "per_device_train_batch_size": 4, "save_steps": 3}
    train(**alone | PACKS, output=folder / "alone")
    specs.append(
        common | {"output": folder / "from one", "resume": folder / "alone" / "checkpoint-3", "save_strategy": "no"}
    )
    digests = np.sort(logitstore.open(tiny_store).documents().digests)
    one_less = {"eval_fraction": (int(digests[0]) + 1) / 2**64, "packing": False, "save_strategy": "no"}
    specs.append(common | one_less | {"output": folder / "odd", "per_device_train_batch_size": 11})
    on_ranks(2, specs, folder)
    return folder


@pytest.mark.parametrize("name", OF_TWO)
def test_two_ranks_resume_to_the_same_result(name, two_ranks):
    runs = two_ranks / name
    whole = folders(runs / "whole")
    num_steps = OF_TWO[name][0]
    assert [path.name for path in whole] == [f"checkpoint-{step + 1}" for step in range(num_steps)]
    assert Path(whole[-1], "rng_state_1.pth").is_file()
    for step in range(1, num_steps):
        (again,) = folders(runs / f"{step}")
        assert again.name == whole[-1].name
        assert trained(runs / f"{step}") == trained(runs / "whole", after=step)
        assert same_weights(again, whole[-1])
        assert logged(history(again)) == logged(history(whole[-1]))


def test_two_ranks_read_the_same_documents_per_step_as_one(two_ranks):
    assert trained(two_ranks / "packed" / "whole") == trained(two_ranks / "alone")


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_one_rank_resumes_a_run_of_two(step, two_ranks, draft, tiny_store, tmp_path):
    checkpoint = two_ranks / "packed" / "whole" / f"checkpoint-{step}"
    options = {"packing": True, "pack_length": 200, "per_device_train_batch_size": 4, "save_strategy": "no"}
    state = train(tiny_store, draft, tmp_path / "out", resume=checkpoint, **options).state
    assert trained(tmp_path / "out") == trained(two_ranks / "alone", after=step)
    assert (state.global_step, state.epoch) == (8, 2.0)


def test_rank_without_documents_takes_part_in_the_step(two_ranks):
    sizes = []
    for rank in range(2):
        lines = map(json.loads, (two_ranks / "odd" / f"trained_{rank}.jsonl").read_text().splitlines())
        sizes.append([len(texts) for _, texts in lines])
    assert sizes == [[11, 1, 11, 1], [11, 0, 11, 0]]
    texts = Counter(text for _, text in trained(two_ranks / "odd"))
    assert set(texts.values()) == {2}
    assert len(texts) == 23


def test_two_ranks_resume_a_run_of_one(two_ranks):
    assert trained(two_ranks / "from one") == trained(two_ranks / "alone", after=3)


def test_resume_with_another_batch_size_continues_at_the_next_document(draft, tiny_store, tmp_path):
    options = {"per_device_train_batch_size": 5, "num_train_epochs": 3, "lr_scheduler_type": "constant"}
    train(tiny_store, draft, tmp_path / "whole", **options)
    expected = [text for _, text in in_order(tmp_path / "whole")]
    resume = tmp_path / "whole" / "checkpoint-7"  # after 5 steps of 5, 5, 5, 5, 4 and 10 documents of the second epoch
    state = train(
        tiny_store, draft, tmp_path / "more", resume=resume, **options | {"per_device_train_batch_size": 4}
    ).state
    steps = in_order(tmp_path / "more")
    assert [text for _, text in steps] == expected[34:]
    assert Counter(step for step, _ in steps) == {8: 4, 9: 4, 10: 4, 11: 2} | dict.fromkeys(range(12, 18), 4)
    assert (state.max_steps, state.global_step, state.epoch) == (17, 17, 3.0)
    epochs = [entry["epoch"] for entry in state.log_history if "loss" in entry]
    assert epochs[3] == pytest.approx(1 + 14 / 24)


def in_order(output):
    """Returns (step, document) of one rank in the order of training."""
    lines = map(json.loads, Path(output, "trained_0.jsonl").read_text().splitlines())
    return [(step, text) for step, texts in lines for text in texts]


def test_max_steps_includes_the_steps_before_the_resume(draft, tiny_store, tmp_path):
    options = {"per_device_train_batch_size": 5, "max_steps": 7}
    whole = train(tiny_store, draft, tmp_path / "whole", **options).state
    assert (whole.global_step, whole.epoch) == (7, pytest.approx(1 + 10 / 24))
    again = train(
        tiny_store, draft, tmp_path / "more", resume=tmp_path / "whole" / "checkpoint-6", **options | {"max_steps": 9}
    ).state
    assert (again.global_step, again.epoch) == (9, pytest.approx(1 + 20 / 24))
    nothing = train(tiny_store, draft, tmp_path / "none", resume=tmp_path / "whole" / "checkpoint-7", **options).state
    assert nothing.global_step == 7
    assert train_loss(nothing) == train_loss(whole)
    assert nothing.log_history[-1]["train_rows_per_second"] == 0
    assert not (tmp_path / "none" / "trained_0.jsonl").exists()


@pytest.mark.parametrize(
    "other", [{"seed": 8}, {"shuffle_window": 2}, {"packing": True}, {"eval_fraction": 0.2}, {"weights": [2.0]}]
)
def test_resume_with_another_order_of_documents_is_refused(other, draft, tiny_store, tmp_path):
    train(tiny_store, draft, tmp_path / "whole", max_steps=1)
    with pytest.raises(ValueError, match=r"order of documents must be the same as in the run to resume, got \d+ packs"):
        train(tiny_store, draft, tmp_path / "more", resume=tmp_path / "whole" / "checkpoint-1", **other)


def test_save_steps_and_logging_steps_may_change_on_resume(draft, tiny_store, tmp_path):
    train(tiny_store, draft, tmp_path / "whole", max_steps=2)
    options = {"save_steps": 3, "logging_steps": 4, "max_steps": 8}
    resumed = train(tiny_store, draft, tmp_path / "out", resume=tmp_path / "whole" / "checkpoint-2", **options)
    assert [path.name for path in folders(tmp_path / "out")] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [2, 4, 8]


def test_callback_states_can_be_restored(draft, tiny_store, tmp_path):
    options = {"restore_callback_states_from_checkpoint": True}
    train(tiny_store, draft, tmp_path / "whole", **options)
    resume = tmp_path / "whole" / "checkpoint-4"
    train(tiny_store, draft, tmp_path / "more", resume=resume, **options)
    assert trained(tmp_path / "more") == trained(tmp_path / "whole", after=4)
    assert json.loads(Path(folders(tmp_path / "more")[-1], "trainer_state.json").read_text())["epoch"] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 25}, "dataloader_drop_last must be False if"),
        ({"ignore_data_skip": True}, "ignore_data_skip must be False, got ignore_data_skip=True"),
        ({"dataloader_in_order": False}, "dataloader_in_order must be True, got dataloader_in_order=False"),
    ],
)
def test_arguments_that_would_lose_documents_are_refused(options, message, draft, tiny_store, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny_store, draft, tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out")
