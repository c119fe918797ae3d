"""The whole pipeline on a CPU, on real text, in minutes: one cache, two drafts, three ways to train each.

    make demo
    python jobs/demo.py [--output build/demo] [--scale 0.1]

The text is the running Python's own standard library (demo_corpus.py). A small target is trained on it first
(demo_models.py); from there on every stage is one of the jobs beside this file, called as the line printed before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _errors import user_errors
from demo_report import ADASPEC, DISTILLATION, RANDOM, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait for each other's tiny products make this up to 30 times slower where anything
    # else wants a core; asleep they cost a tenth where nothing does.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Read once, by libraries as they are loaded: before the first import of torch, transformers or ray."""

LINE_WIDTH = 110
MARKER = ".logitstore-demo"
VOCAB_SIZE = 2048
TARGET_STEPS = 1500
DRAFT_STEPS = 400
NUM_PROMPTS = 20
MAX_NEW_TOKENS = 48
DOCUMENTS = shlex.split("--max_length 256 --shard_rows 32768")
TRAINED_ON = shlex.split("--scheme hybrid --num_draws 50")
COMPARED_WITH = shlex.split("--scheme topk --k 1024")
"""Of the held-out rows, which are few, half of the vocabulary is kept: acceptance from the cache is nearly exact."""
SELECTION = {
    DISTILLATION: ["--selection", "all"],
    RANDOM: ["--selection", "random", "--keep", "0.4"],
    ADASPEC: ["--selection", "adaspec", "--keep", "0.4"],
}
TRAINING = shlex.split(
    "--per_device_train_batch_size 8 --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_steps 20 "
    "--weight_decay 0.1 --adam_beta2 0.95 --logging_strategy no --save_strategy no"
)


@dataclass(kw_only=True)
class Story:
    """Runs the stages one after another, and says which, how, and how long each took."""

    logs: Path
    """Folder for what the jobs print: the terminal shows their progress bars alone."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage, in order."""

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announces a stage of several steps and times it."""
        print(f"\n{len(self.seconds) + 1}. {title}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.say(f"[{self.seconds[name]:.1f} s]")

    def say(self, text: str) -> None:
        """Prints a line of the stage."""
        print(f"   {text}", flush=True)

    def job(self, name: str, main: Callable[[list[str]], dict[str, Any]], argv: list[str]) -> dict[str, Any]:
        """Calls a job in this process, as its command line would; imports are paid for once."""
        words = shlex.join(argv).replace(" --", "\n--").split("\n")  # a flag stays with its value
        lines, line = [], f"$ python jobs/{main.__module__}.py"
        for word in words:
            if len(line) + len(word) > LINE_WIDTH:
                lines.append(line)
                line = "     "
            line += f" {word}"
        print(" \\\n".join([*lines, line]), flush=True)
        with (self.logs / f"{name}.txt").open("w") as log, contextlib.redirect_stdout(log):
            return main(argv)


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR",
                   help="new, empty, or an earlier demo's, which is deleted (default %(default)s)")  # fmt: skip
    p.add_argument("--scale", type=float, default=1.0,
                   help="times all numbers of steps and prompts, for a quick look (default %(default)s)")  # fmt: skip
    return p


def prepare_output(folder: Path) -> None:
    """Makes the folder anew.

    Raises:
        ValueError: It holds something else than an earlier demo.
    """
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
            raise ValueError(
                f"output must be new, empty or an earlier demo's folder, got output={folder}, which holds something "
                "else; give another --output"
            )
        shutil.rmtree(folder)
    (folder / "logs").mkdir(parents=True)
    (folder / MARKER).touch()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Runs the demo; returns what is in results.json."""
    args = parser().parse_args(argv)
    with user_errors():
        if not 0.0 < args.scale <= 1.0:
            raise ValueError(f"scale must be above 0 and at most 1, got scale={args.scale}")
        prepare_output(args.output)
    began = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    story = Story(logs=args.output / "logs")
    print("logitstore demo: one cache, two drafts, end to end, on real text")
    results = run(story, args.output, args.scale)
    results["seconds"] = story.seconds | {"total": round(time.monotonic() - began, 1)}
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(report(results)))
    print(f"\nAll figures: {args.output / 'results.json'}; what the jobs printed: {story.logs}")
    return results


def run(story: Story, folder: Path, scale: float) -> dict[str, Any]:
    """Runs all stages in a fresh folder; returns their figures."""
    from demo_corpus import is_held_out, read_pairs, standard_library, train_tokenizer, write_jsonl

    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    with story.stage("text", f"Text: documented functions of Python {platform.python_version()}'s standard library"):
        pairs = read_pairs(standard_library())
        trained_on = [pair for pair in pairs if not is_held_out(pair)]
        write_jsonl(train, trained_on)
        write_jsonl(held_out, [pair for pair in pairs if is_held_out(pair)])
        tokenizer = train_tokenizer(trained_on, VOCAB_SIZE)
        num_held_out = len(pairs) - len(trained_on)
        story.say(f"{len(trained_on):,} functions to train on, {num_held_out:,} held out from all training;")
        story.say("signature and docstring are the prompt, the rest of the body is the response;")
        story.say(f"a byte-level BPE vocabulary of {len(tokenizer):,} tokens")

    # Slow imports come after the first lines are on the screen.
    import demo_models
    import dump_logits
    import evaluate_draft
    import torch
    import train_draft
    import transformers

    import logitstore

    transformers.logging.disable_progress_bar()  # those of loading weights, not Trainer's

    def steps(number: int) -> int:
        return max(2, round(number * scale))

    target, cache, check = folder / "target", folder / "cache.zarr", folder / "held_out.zarr"
    with story.stage("target", "Target: a small Llama, trained from scratch on whole functions"):
        shape = f"{demo_models.TARGET_BATCH} x {demo_models.MAX_LENGTH}"
        story.say(f"{steps(TARGET_STEPS):,} steps of {shape} tokens, next-token cross entropy")
        num_parameters = demo_models.train_target(trained_on, tokenizer, target, steps(TARGET_STEPS), story.logs)

    with story.stage("dump", "Dump: the target's distribution at every token, once, by Ray actors"):
        dumped = {}
        for name, data, store, rows in (
            ("train", train, cache, TRAINED_ON),
            ("held_out", held_out, check, COMPARED_WITH),
        ):
            argv = ["--store", str(store), "--target", str(target), "--data", str(data), *DOCUMENTS, *rows]
            dumped[name] = story.job(f"dump_{name}", dump_logits.main, argv)
        losses = demo_models.held_out_losses(logitstore.open(cache), logitstore.open(check))
        story.say(
            f"target of {num_parameters / 1e6:.2f} M parameters: {losses['target_nll']:.2f} nats a held-out token, "
            f"where the unigram distribution has {losses['unigram_nll']:.2f}"
        )

    drafts: list[dict[str, Any]] = []

    def train_drafts(*methods: str) -> None:
        for size in demo_models.DRAFTS:
            for method in methods:
                name = f"{size.name}_{SELECTION[method][1]}"
                argv = ["--store", str(cache), "--draft", str(folder / size.name), "--output_dir", str(folder / name)]
                argv += SELECTION[method] + (["--reference", f"ref_{size.name}"] if method == ADASPEC else [])
                argv += ["--max_steps", str(steps(DRAFT_STEPS)), *TRAINING]
                figures = story.job(f"train_{name}", train_draft.main, argv)
                drafts.append({"draft": size.name, "method": method, "folder": str(folder / name), "training": figures})

    with story.stage("references", "References: each draft distilled in the ordinary way, from the cache alone"):
        sizes = {
            size.name: demo_models.save_new_model(size, tokenizer, folder / size.name, seed=1)
            for size in demo_models.DRAFTS
        }
        story.say("random initial weights: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in sizes.items()))
        train_drafts(DISTILLATION)
        argv = ["--store", str(cache)]
        for draft in drafts:
            argv += ["--reference", f"ref_{draft['draft']}={draft['folder']}"]
        dumped["references"] = story.job("dump_references", dump_logits.main, argv)

    with story.stage("selective", "Selective distillation: the same initial weights, as many steps, 40 % of the rows"):
        train_drafts(RANDOM, ADASPEC)

    with story.stage("evaluate", "Evaluation: real speculative decoding of held-out functions, and the held-out cache"):
        torch.set_num_threads(1)  # one token at a time is too little work for two
        drafts.sort(key=lambda draft: list(sizes).index(draft["draft"]))
        for draft in drafts:
            argv = ["--target", str(target), "--draft", draft["folder"], "--data", str(held_out), "--store", str(check)]
            argv += ["--num_prompts", str(steps(NUM_PROMPTS)), "--max_new_tokens", str(MAX_NEW_TOKENS)]
            draft["evaluation"] = story.job(f"evaluate_{Path(draft['folder']).name}", evaluate_draft.main, argv)

    return {
        "settings": {"scale": scale, "cpus": os.cpu_count(), "python": platform.python_version()},
        "text": {"functions": len(trained_on), "held_out": num_held_out, "vocab_size": len(tokenizer)},
        "target": {"parameters": num_parameters, "steps": steps(TARGET_STEPS), **losses},
        "dump": dumped,
        "drafts": [draft | {"parameters": sizes[draft["draft"]]} for draft in drafts],
    }


if __name__ == "__main__":
    main()
