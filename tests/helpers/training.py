"""Trains drafts and records the documents of each step, in this process or with `torchrun training.py SPECS`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers.paths import environment

RATES = ("runtime", "per_second")
"""Parts of the names of logged values that differ from run to run."""


def train(store, draft, output, *, stores=(), scope=None, selection="adaspec", lora_rank=None, **options):
    """Trains a draft and returns the trainer. By default it saves a checkpoint at every step.

    Args:
        store: URL of the store.
        draft: Folder of a draft with its tokenizer.
        output: Folder for checkpoints and for `trained_RANK.jsonl`, the documents of each micro-batch as token ids.
        stores: URLs of more stores.
        scope: Scope of the selection; by default the one that the selection defines.
        selection: Name of the rule that selects rows.
        lora_rank: Rank of LoRA updates to train in place of the weights; None trains the weights.
        options: Arguments of the dataset and of TrainingArguments. `resume` is the folder of a checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

    import logitstore
    from trainer import DocumentDataset, DraftModule, DraftTrainer
    from trainer.drafts.lora import Lora, add_lora
    from trainer.loss.objectives import make_objective
    from trainer.loss.selection import SELECTIONS, Rule

    class Recording(DraftTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            lines = zip(inputs["input_ids"], positions(inputs), strict=True)
            batch = [document for line in lines for document in documents(*line)]
            with Path(output, f"trained_{self.args.process_index}.jsonl").open("a") as file:
                print(json.dumps([self.state.global_step + 1, batch]), file=file)
            return super().training_step(model, inputs, num_items_in_batch)

    Path(output).mkdir(parents=True, exist_ok=True)
    names = ("weights", "packing", "pack_length", "eval_fraction", "shuffle_window")
    resume, remote = options.pop("resume", None), options.pop("remote", None)
    chosen = SELECTIONS[selection]
    data = DocumentDataset(
        [logitstore.open(url) for url in (store, *stores)], columns=chosen.columns,
        losses={"reference_ce": "reference"}, seed=options.get("seed", 7),
        **{name: options.pop(name) for name in names if name in options},
    )  # fmt: skip
    args = TrainingArguments(**{
        "output_dir": str(output), "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01,
        "use_cpu": True, "disable_tqdm": True, "report_to": "none", "remove_unused_columns": False, "save_steps": 1,
        "logging_steps": 2, "dataloader_pin_memory": False, "ddp_find_unused_parameters": False, "seed": 7,
    } | options)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(draft)
    if lora_rank is not None:
        add_lora(model, Lora(rank=lora_rank, alpha=8.0, dropout=0.1), seed=3)
    module = DraftModule(
        model, vocab_size=data.stores[0].spec.tokenizer.vocab_size,
        objective=make_objective("forward_kl"),
        rule=Rule(selection=chosen, scope=scope or chosen.scope, keep=0.4, outside_weight=0.0),
    )  # fmt: skip
    trainer = Recording(module, args, data, AutoTokenizer.from_pretrained(draft), remote=remote)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def positions(inputs):
    import torch

    width = inputs["input_ids"].shape[1]
    return inputs.get("position_ids", torch.arange(width).expand_as(inputs["input_ids"]))


def documents(ids, places):
    """Splits one line of a batch into documents, as text. Padding at the end is dropped."""
    parts = []
    for token, place in zip(ids.tolist(), places.tolist(), strict=True):
        if place == 0:
            parts.append([])
        parts[-1].append(token)
    while parts and not any(parts[-1]):
        parts.pop()
    return [" ".join(map(str, part)).rstrip(" 0") for part in parts]


def with_dropout(folder, draft):
    """Copies a draft and gives it dropout, so that training depends on random numbers."""
    shutil.copytree(draft, folder)
    config = json.loads(Path(folder, "config.json").read_text())
    Path(folder, "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return str(folder)


def trained(output, after=0):
    """Returns (step, document) of all ranks, sorted, for the steps after `after`."""
    found = []
    for path in sorted(Path(output).glob("trained_*.jsonl")):
        for line in path.read_text().splitlines():
            step, texts = json.loads(line)
            found += [(step, text) for text in texts if step > after]
    return sorted(found)


def history(checkpoint):
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]


def logged(entries, left_out=()):
    """Returns the entries of a history that log a step, without speeds and the values in `left_out`."""
    names = (*RATES, *left_out)
    steps = [entry for entry in entries if "loss" in entry]
    return [{k: v for k, v in entry.items() if not any(part in k for part in names)} for entry in steps]


def weights(checkpoint):
    from safetensors.torch import load_file

    return {name: value for path in Path(checkpoint).glob("*.safetensors") for name, value in load_file(path).items()}


def same_weights(one, other):
    import torch

    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_ranks(num, specs, folder):
    """Runs several trainings one after another on several ranks, each rank in a process of its own.

    Args:
        num: Number of ranks.
        specs: Arguments of `train`, one dictionary for each training.
        folder: Folder for the output of the processes.
    """
    log = Path(folder, "ranks.txt")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num), __file__,
        json.dumps(specs, default=str),
    ]  # fmt: skip
    with log.open("w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=environment(OMP_NUM_THREADS="1"), check=False, timeout=400
        )
    if done.returncode:
        raise AssertionError(log.read_text()[-6000:])


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        train(**one)
