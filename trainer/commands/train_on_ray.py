"""`logitstore train --num_workers`: trains on Ray workers instead of in the process of the command.

The process of the command checks the arguments and starts the workers. When a worker dies, the process starts new
workers, which continue from the last finished checkpoint. No other module of the trainer uses Ray.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.config import conf
from transformers import TrainerState

from logitstore.cluster.resources import join_cluster, worker_resources
from logitstore.cluster.train_workers import WorkerEndedError, WorkersDiedError, run_until_done, run_workers
from logitstore.commands.user_errors import end, refusals, say, user_errors
from logitstore.errors import LogitStoreError, one_line
from logitstore.models.loading import loading_bars
from logitstore.storage.failures import is_of_storage
from trainer.commands.train_arguments import check
from trainer.run.output import open_output
from trainer.run.run_folder import STATE, find_checkpoint
from trainer.run.train import first_lines, make_module, make_trainer, prepare, train

if TYPE_CHECKING:
    from trainer.run.output import Output


def train_on_ray(
    output: Output, values: dict[str, Any], repeated: dict[str, Any], start: str | None, options: dict[str, Any] | None
) -> TrainerState:
    """Trains on workers of a Ray cluster: the cluster that this process belongs to, or a new one on this machine.

    Ends this process with a one-line error if a worker ended with an error, or if workers keep dying.

    Args:
        output: Location of the run's files: a folder that all machines of the cluster share, or a URL.
        values: Arguments of the run, by name.
        repeated: The contents of run.yaml.
        start: The checkpoint to resume from; None starts from the draft.
        options: fsspec options of the stores' and the output's URLs.

    Returns:
        The state at the end of the training.
    """
    with user_errors():
        join_cluster()
    if output.remote is None:
        output.folder.mkdir(parents=True, exist_ok=True)  # Each worker checks that it sees this folder.
    num_workers = int(values["num_workers"])
    resources, most = worker_resources(num_workers, use_gpus=not values["use_cpu"])
    if num_workers > most:
        each = "a GPU and a CPU" if "GPU" in resources else "a CPU"
        _note(f"{num_workers} workers with {each} each were requested, but the cluster has room for {most}; waiting "
              "for it to grow")  # fmt: skip
    # A worker must not start workers itself. It gets the parsed storage options, not the path of the file with them.
    task = {
        "values": values | {"num_workers": None, "storage_options": None},
        "repeated": repeated,
        "options": options,
        "fsspec": dict(conf),
        "folder": os.getcwd(),
        "num_threads": None if "GPU" in resources else int(resources["CPU"]),
    }

    def last_checkpoint() -> str | None:
        with refusals(), output.look() as held:
            return find_checkpoint(held, "true")

    def run(start: str | None) -> str | None:
        return run_workers(functools.partial(work, task | {"start": start}), num_workers, resources)

    try:
        run_until_done(run, last_checkpoint, start, _note)
    except WorkerEndedError as error:
        end(error, error.status)
    except WorkersDiedError as error:
        end(error, 1)
    with refusals(), output.look() as held:
        if STATE not in held.names:
            end(
                f"output_dir must be a folder that all machines share, or a URL, got output_dir={output.where}, where "
                f"{platform.node()} sees no {STATE}; the trained files are on another machine",
                1,
            )
        state: TrainerState = TrainerState.load_from_json(str(held.folder / STATE))
    return state


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def work(task: dict[str, Any]) -> None:
    """Trains as one of the workers, in the process and environment that Ray prepared.

    Args:
        task: Dict that `train_on_ray` makes: the run's arguments, the checkpoint, and settings of the starting process.

    Raises:
        SystemExit: The options are wrong, or the storage failed. The exception carries a one-line message and the exit
            status for the process that started the workers. A builtin exception is needed here, because Ray passes
            it through processes that cannot import this package.
    """
    import torch

    # The starting process prints the first error. The other workers fail only as a result of it, so Ray must not log
    # their errors.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    # Relative paths in the arguments are relative to the folder of the starting process.
    if Path(task["folder"]).is_dir():
        os.chdir(task["folder"])
    conf.update(task["fsspec"])
    if task["num_threads"] is not None:
        torch.set_num_threads(task["num_threads"])
    with loading_bars(wanted=False):
        try:
            run, training = check(task["values"])
            training.disable_tqdm = True
            output = open_output(task["values"]["output_dir"], task["options"])
            if output.remote is None and not output.folder.is_dir():
                raise ValueError(
                    f"output_dir must be a folder that all machines share, or a URL, got output_dir={output.where}, "
                    f"which {platform.node()} does not have; give another"
                )
            prepared = prepare(run, training, task["options"])
            module = make_module(prepared)
        except (ValueError, LogitStoreError) as error:
            raise SystemExit(one_line(error), 2) from None
        try:
            checkpoint = output.begin(training, task["start"])
            try:
                trainer = make_trainer(prepared, module, training, output, checkpoint)
            except (ValueError, LogitStoreError) as error:
                raise SystemExit(one_line(error), 2) from None
            if trainer.is_world_process_zero():
                say(first_lines(prepared, output, checkpoint, task["start"]))
            train(prepared, module, trainer, output, task["repeated"], checkpoint)
        except (OSError, ValueError) as error:
            if not is_of_storage(error):
                raise
            raise SystemExit(one_line(error) + output.kept(), 1) from None
