"""One training run in a process of its own: from the cache, on the text alone, or AdaSPEC with all models loaded.

    python -m benchmarks._train_worker '{"kind": "ce", "store": ..., "draft": ..., "steps": 20, ...}'

All three use transformers' Trainer with the same arguments on the same batches of the same store in the same order. The
last line of output is JSON with the seconds of each step except the first few, and the memory. AdaSPEC with all models
in one loop is implemented from its paper (arXiv 2510.19779, section 3), without using other code.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import logitstore
from trainer import DocumentDataset, DraftModule, DraftTrainer
from trainer.data.loader import RankBatches, make_loader
from trainer.data.sharding import make_deal
from trainer.loss.objectives import make_objective
from trainer.loss.selection import make_rule

LEFT_OUT = 3
"""Number of warm-up steps that are not timed."""


class Stopwatch(TrainerCallback):
    """Times steps, from the first micro-batch to the update."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


class OtherTrainer(Trainer):
    """A Trainer that reads the same batches as DraftTrainer."""

    def __init__(self, dataset, args, model, callbacks):
        super().__init__(model=model, args=args, train_dataset=dataset, callbacks=callbacks)
        self.dataset = dataset

    def get_train_dataloader(self):
        return make_loader(self.dataset, RankBatches(self.dataset.order, make_deal(self.args, self.dataset.order)))


class PlainTrainer(OtherTrainer):
    """Fine-tunes on the text. The model computes its own loss, as is usual."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs["input_ids"]
        labels = torch.full((ids.numel() + 1,), -100, dtype=torch.int64, device=ids.device)
        labels[inputs["rows"] + 1] = inputs["labels"]
        return model(input_ids=ids, labels=labels[:-1].reshape(ids.shape), use_cache=False).loss


class PublishedTrainer(OtherTrainer):
    """Distils over the whole vocabulary from a target, and optionally a reference, that run in the training loop."""

    def __init__(self, dataset, args, model, callbacks, target, reference, keep, vocab_size):
        super().__init__(dataset, args, model, callbacks)
        self.target, self.reference, self.keep, self.vocab_size = target, reference, keep, vocab_size

    def _logprobs(self, model, inputs):
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits.flatten(0, 1)
        return logits[inputs["rows"], : self.vocab_size].float().log_softmax(-1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            log_p = self._logprobs(self.target, inputs)
            p = log_p.exp()
        losses = (p * (log_p - self._logprobs(model, inputs))).sum(-1)
        if self.reference is None:
            return losses.mean()
        with torch.no_grad():
            gap = losses - (p * (log_p - self._logprobs(self.reference, inputs))).sum(-1)
            kept = gap >= torch.quantile(gap, 1 - self.keep)
        return losses[kept].mean()


def load(name):
    return AutoModelForCausalLM.from_pretrained(name)


def resident():
    """Returns the bytes that this process uses now, or on a GPU the bytes of its tensors."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_trainer(spec, args, watch):
    store = logitstore.open(spec["store"])
    vocab_size = store.spec.tokenizer.vocab_size
    draft = load(spec["draft"])
    if spec["kind"] == "cache":
        rule = make_rule(spec.get("selection", "all"), keep=spec.get("keep", 0.4))
        losses = {"reference_ce": spec["reference"]} if "reference_ce" in rule.selection.needs else {}
        dataset = DocumentDataset(
            [store], columns=rule.selection.columns, losses=losses, seed=spec["seed"],
            packing=spec.get("packing", False),
        )  # fmt: skip
        module = DraftModule(draft, vocab_size=vocab_size, objective=make_objective("forward_kl"), rule=rule)
        trainer = DraftTrainer(module, args, dataset, AutoTokenizer.from_pretrained(spec["draft"]))
        trainer.add_callback(watch)
        return trainer, draft
    dataset = DocumentDataset([store], reads_target=False, seed=spec["seed"], packing=spec.get("packing", False))
    if spec["kind"] == "ce":
        return PlainTrainer(dataset, args, draft, [watch]), draft
    target = load(spec["target"]).to(args.device)
    reference = load(spec["reference_model"]).to(args.device) if "reference_model" in spec else None
    return PublishedTrainer(
        dataset, args, draft, [watch], target, reference, spec.get("keep", 0.4), vocab_size
    ), draft  # fmt: skip


def main(argv=None):
    spec = json.loads((sys.argv[1:] if argv is None else argv)[0])
    torch.set_num_threads(spec.get("threads", os.cpu_count()))
    libraries = resident()
    watch = Stopwatch()
    args = TrainingArguments(
        output_dir=spec["output_dir"], max_steps=spec["steps"], per_device_train_batch_size=spec["batch"],
        seed=spec["seed"], learning_rate=spec.get("learning_rate", 5e-3), lr_scheduler_type="cosine", warmup_steps=20,
        weight_decay=0.1, adam_beta2=0.95, logging_strategy="no", save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, remove_unused_columns=False, bf16=spec.get("bf16", False),
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer, draft = make_trainer(spec, args, watch)
    forget_peak()
    began = time.perf_counter()
    trainer.train()
    found = {
        "steps_s": watch.seconds[LEFT_OUT:],
        "train_s": time.perf_counter() - began,
        "peak_bytes": peak(),
        "libraries_bytes": libraries,
    }
    if spec.get("save"):
        draft.save_pretrained(spec["output_dir"])
        AutoTokenizer.from_pretrained(spec["draft"]).save_pretrained(spec["output_dir"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
