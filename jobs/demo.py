"""The whole pipeline on a CPU, on real text, in minutes: one cache, two drafts, three ways to train each.

    make demo
    python jobs/demo.py [--output build/demo] [--scale 0.1]

The text is the standard library of the running Python (_demo/corpus.py). First a small target is trained on it
(_demo/models.py). Every later stage is a logitstore command, which the demo prints before it runs it.
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

from _demo.report import ADASPEC, DISTILLATION, RANDOM, report

from logitstore.commands.user_errors import user_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait for small matrix products make the demo up to 30 times slower on a busy
    # machine. Threads that sleep while they wait make it 10% slower on an idle machine.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables of the demo. They are set before the imports of torch, transformers and ray, because these
packages read them."""

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
"""Options of the held-out store. Each row keeps half of the vocabulary, so that acceptance rates from the cache are
nearly exact. The store stays small, because it has few rows."""
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
    """Runs the stages one after another, and prints the title, the command and the duration of each."""

    logs: Path
    """Folder for the output of the jobs. The terminal shows only their progress bars."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Duration of each stage, in order."""

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Context manager that prints the title of a stage at its start, and the duration at its end."""
        print(f"\n{len(self.seconds) + 1}. {title}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.say(f"[{self.seconds[name]:.1f} s]")

    def say(self, text: str) -> None:
        """Prints a line of the stage."""
        print(f"   {text}", flush=True)

    def command(self, name: str, run: Callable[[list[str]], dict[str, Any]], argv: list[str]) -> dict[str, Any]:
        """Runs a command in this process, which avoids repeated imports, and prints its command line.

        Args:
            name: Name of the log file, which starts with the name of the command.
            run: Function of the command.
            argv: Arguments of the command.
        """
        words = shlex.join(argv).replace(" --", "\n--").split("\n")  # Keeps each flag and its value on one line.
        lines, line = [], f"$ logitstore {name.partition('_')[0]}"
        for word in words:
            if len(line) + len(word) > LINE_WIDTH:
                lines.append(line)
                line = "     "
            line += f" {word}"
        print(" \\\n".join([*lines, line]), flush=True)
        with (self.logs / f"{name}.txt").open("w") as log, contextlib.redirect_stdout(log):
            return run(argv)


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR",
                   help="new or empty folder, or an earlier demo's (is deleted) (default %(default)s)")  # fmt: skip
    p.add_argument("--scale", type=float, default=1.0,
                   help="factor for the numbers of steps and prompts, at most 1 (default %(default)s)")  # fmt: skip
    return p


def prepare_output(folder: Path) -> None:
    """Creates an empty folder for the demo, after deleting an earlier demo in that folder.

    Raises:
        ValueError: The folder contains files that do not belong to an earlier demo.
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
    """Runs the demo. Returns the contents of results.json."""
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
    print(f"\nAll figures: {args.output / 'results.json'}; output of the jobs: {story.logs}")
    return results


def run(story: Story, folder: Path, scale: float) -> dict[str, Any]:
    """Runs all stages in an empty folder. Returns their figures."""
    from _demo.corpus import is_held_out, read_pairs, standard_library, train_tokenizer, write_jsonl

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
    import torch
    import transformers
    from _demo import models

    import logitstore
    from logitstore.commands import dump as dump_command
    from trainer.commands import evaluate as evaluate_command
    from trainer.commands import train as train_command

    transformers.logging.disable_progress_bar()  # Hides only the bars of loading weights.

    def steps(number: int) -> int:
        return max(2, round(number * scale))

    target, cache, check = folder / "target", folder / "cache.zarr", folder / "held_out.zarr"
    with story.stage("target", "Target: a small Llama, trained from scratch on whole functions"):
        shape = f"{models.TARGET_BATCH} x {models.MAX_LENGTH}"
        story.say(f"{steps(TARGET_STEPS):,} steps of {shape} tokens, next-token cross entropy")
        num_parameters = models.train_target(trained_on, tokenizer, target, steps(TARGET_STEPS), story.logs)

    with story.stage("dump", "Dump: the target's distribution at every token, once, by Ray actors"):
        dumped = {}
        for name, data, store, rows in (
            ("train", train, cache, TRAINED_ON),
            ("held_out", held_out, check, COMPARED_WITH),
        ):
            argv = ["--store", str(store), "--target", str(target), "--data", str(data), *DOCUMENTS, *rows]
            dumped[name] = story.command(f"dump_{name}", dump_command.run, argv)
        losses = models.held_out_losses(logitstore.open(cache), logitstore.open(check))
        story.say(
            f"target of {num_parameters / 1e6:.2f} M parameters: {losses['target_nll']:.2f} nats a held-out token, "
            f"where the unigram distribution has {losses['unigram_nll']:.2f}"
        )

    drafts: list[dict[str, Any]] = []

    def train_drafts(*methods: str) -> None:
        for size in models.DRAFTS:
            for method in methods:
                name = f"{size.name}_{SELECTION[method][1]}"
                argv = ["--store", str(cache), "--draft", str(folder / size.name), "--output_dir", str(folder / name)]
                argv += SELECTION[method] + (["--reference", f"ref_{size.name}"] if method == ADASPEC else [])
                argv += ["--max_steps", str(steps(DRAFT_STEPS)), *TRAINING]
                figures = story.command(f"train_{name}", train_command.run, argv)
                drafts.append({"draft": size.name, "method": method, "folder": str(folder / name), "training": figures})

    with story.stage("references", "References: each draft distilled in the ordinary way, from the cache alone"):
        sizes = {
            size.name: models.save_new_model(size, tokenizer, folder / size.name, seed=1) for size in models.DRAFTS
        }
        story.say("random initial weights: " + ", ".join(f"{name} {n / 1e6:.2f} M" for name, n in sizes.items()))
        train_drafts(DISTILLATION)
        argv = ["--store", str(cache)]
        for draft in drafts:
            argv += ["--reference", f"ref_{draft['draft']}={draft['folder']}"]
        dumped["references"] = story.command("dump_references", dump_command.run, argv)

    with story.stage("selective", "Selective distillation: the same initial weights, as many steps, 40 % of the rows"):
        train_drafts(RANDOM, ADASPEC)

    with story.stage("evaluate", "Evaluation: real speculative decoding of held-out functions, and the held-out cache"):
        torch.set_num_threads(1)  # Generating one token at a time is too little work for two threads.
        drafts.sort(key=lambda draft: list(sizes).index(draft["draft"]))
        for draft in drafts:
            argv = ["--target", str(target), "--draft", draft["folder"], "--data", str(held_out), "--store", str(check)]
            argv += ["--num_prompts", str(steps(NUM_PROMPTS)), "--max_new_tokens", str(MAX_NEW_TOKENS)]
            draft["evaluation"] = story.command(f"evaluate_{Path(draft['folder']).name}", evaluate_command.run, argv)

    return {
        "settings": {"scale": scale, "cpus": os.cpu_count(), "python": platform.python_version()},
        "text": {"functions": len(trained_on), "held_out": num_held_out, "vocab_size": len(tokenizer)},
        "target": {"parameters": num_parameters, "steps": steps(TARGET_STEPS), **losses},
        "dump": dumped,
        "drafts": [draft | {"parameters": sizes[draft["draft"]]} for draft in drafts],
    }


if __name__ == "__main__":
    main()
