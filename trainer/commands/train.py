"""Trains a draft from a store. The target is not needed, and not loaded.

  logitstore train --store URL --draft MODEL --output_dir DIR [--selection adaspec --reference NAME]
  logitstore train run.yaml [--output_dir OTHER ...]               # keys are names of flags; flags override the file
  torchrun --nproc_per_node 8 -m trainer.commands.train ...        # one process for each GPU
  ray job submit --working-dir . -- python jobs/train_draft.py ... --num_workers 8      # the same on a Ray cluster

DIR (a folder or a URL) becomes an ordinary Hugging Face model with its tokenizer. DIR/run.yaml repeats the run.
Every flag of transformers.TrainingArguments works too: --help_all shows them.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerState

from logitstore.commands.user_errors import command, leave, refusals, say, user_errors
from logitstore.models.loading import loading_bars
from logitstore.storage.options import storage_options, without_credentials
from trainer.commands.train_arguments import full_help, help_text, parse, read_values, repeated
from trainer.run.dry_run import describe
from trainer.run.output import open_output
from trainer.run.run_folder import (
    RUN,
    check_new,
    check_own,
    check_same_run,
    figures,
    find_checkpoint,
    find_finished,
    result_lines,
)
from trainer.run.train import first_lines, make_module, make_trainer, prepare, train

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainingArguments

    from trainer.run.options import RunArguments
    from trainer.run.output import Output
    from trainer.run.run_folder import Held


def find_start(held: Held, training: TrainingArguments, values: dict[str, Any]) -> TrainerState | str | None:
    """Decides where the training starts, and refuses an output that holds another run.

    Args:
        held: Contents of the output.
        training: Training arguments of transformers.
        values: All arguments by name.

    Returns:
        The state of a finished run if no training is left; the folder or URL of the checkpoint to resume from; or None
        to start from the draft.

    Raises:
        ValueError: The output already holds a run, but the arguments do not ask to resume it; the run to resume has
            other arguments; or the checkpoint to resume from is not finished.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        check_new(held)
        return None
    if RUN in held.names:
        before = read_values([str(held.folder / RUN)])
        check_same_run(held, before, values | {"store": [without_credentials(url) for url in values["store"]]})
    found = find_finished(held, training) or find_checkpoint(held, wanted)
    check_own(held)
    return found


def _finish(
    run: RunArguments,
    training: TrainingArguments,
    values: dict[str, Any],
    options: dict[str, Any] | None,
    output: Output,
    start: TrainerState | str | None,
) -> TrainerState:
    """Trains from `start` to the end, in this process or in Ray workers; returns the state at the end."""
    workers = run.batches.num_workers
    if isinstance(start, TrainerState):
        return start
    if workers is not None:
        # Ray takes seconds to import, and may not be installed.
        from logitstore.cluster.train_workers import check_ray
        from trainer.commands.train_on_ray import train_on_ray

        with user_errors():
            # Wrong options and unreadable stores are reported here, before any worker starts.
            check_ray(workers)
            prepare(run, training, options)
        return train_on_ray(output, values, repeated(values), start, options)
    with loading_bars(not training.disable_tqdm):
        with user_errors():
            prepared = prepare(run, training, options)
            module = make_module(prepared)
        with refusals(output.kept):
            checkpoint = output.begin(training, start)
            with user_errors():
                trainer = make_trainer(prepared, module, training, output, checkpoint)
            if trainer.is_world_process_zero():
                say(first_lines(prepared, output, checkpoint, start))
            return train(prepared, module, trainer, output, repeated(values), checkpoint)


def run(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the training.

    Returns:
        Figures of the run: steps, loss (nats), train_runtime (seconds), rows_per_second, and eval_NAME for held-out
        documents. Empty after --help or --dry_run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help", "--help_all"} & {*argv}:
        print(full_help(str(__doc__)) if "--help_all" in argv else help_text(str(__doc__)))
        return {}
    with user_errors():
        run, training, values = parse(argv)
        options = storage_options(run.store.storage_options)
        output = open_output(values["output_dir"], options)
        workers = run.batches.num_workers
        # Ranks on several machines share only the files at the URL, not a checkpoint on one machine.
        on_one = workers is None and os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE")
        with output.look(with_kept=on_one) as held:
            start = find_start(held, training, values)
    if run.batches.dry_run:
        with user_errors(), loading_bars(wanted=False):
            prepared = prepare(run, training, options)
            print(describe(prepared.dataset, make_module(prepared), prepared.plan, training, ranks=workers))
        return {}
    # With --json, everything except the figures goes to stderr, even the losses that transformers prints to stdout.
    with contextlib.redirect_stdout(sys.stderr) if run.batches.json else contextlib.nullcontext():
        state = _finish(run, training, values, options, output, start)
    found = figures(state)
    if training.process_index == 0:
        if state is start:
            finished = (
                f"{output.where} holds this run, finished after {state.global_step} steps: nothing is left to train"
            )
            print(finished, file=sys.stderr if run.batches.json else None)
        if run.batches.json:
            print(json.dumps({"draft": output.where, **found}))
        else:
            say(result_lines(output.where, values["store"][0], found))
    return found


@command(
    "finished checkpoints are kept; run the same command with --resume_from_checkpoint true to go on", extra="train"
)
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    run(argv)
    end_process_group()
    return 0


def end_process_group() -> None:
    """Closes the connections between the ranks of a torchrun, if there are any. All ranks must call this function.

    Otherwise a thread of gloo may still run when the interpreter ends. The thread then aborts the process, and torchrun
    reports a failed training.
    """
    if torch.distributed.is_initialized():
        # A rank that leaves early would break the connections of the others.
        torch.distributed.barrier()
        # The threads end with the last reference to the group, which the trainer holds in reference cycles.
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    leave(main())
