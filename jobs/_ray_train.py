"""Training on Ray: `--num_workers` processes of a Ray cluster train as those of torchrun would.

This process checks everything, asks for the workers, and begins again from the last finished checkpoint when one dies.
No other file of the trainer knows Ray.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _errors import end, is_of_storage, one_line, refusals
from _output import open_output
from _runs import STATE, find_checkpoint
from _train_arguments import check
from fsspec.config import conf
from transformers import TrainerState

from logitstore.errors import LogitStoreError
from logitstore.models.loading import loading_bars
from logitstore.storage.options import VARIABLE, storage_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from _output import Output
    from ray.train.torch import TorchTrainer

RESTARTS = 3
"""How often in a row workers may die without a new checkpoint."""
LAUNCHED = "WORLD_SIZE"
"""What torchrun and its like set."""


def check_ray(num_workers: int) -> None:
    """Raises ValueError if nothing can be asked of Ray here."""
    if LAUNCHED in os.environ:
        raise ValueError(
            f"num_workers must be left out where torchrun starts the processes, got num_workers={num_workers}; leave "
            "it out, or start one process without torchrun"
        )
    try:
        from ray.train import LoggingConfig  # noqa: F401 - of Ray Train's second version
    except ImportError as error:
        raise ValueError(
            f"num_workers must be left out where Ray Train cannot be loaded, got num_workers={num_workers} "
            f"({one_line(error)}); pip install 'ray[default]>=2.60' pandas pyarrow"
        ) from error


def train_on_ray(output: Output, values: dict[str, Any], repeated: dict[str, Any], start: str | None) -> TrainerState:
    """Trains on the workers of a Ray cluster: that which this process belongs to, or one of this machine.

    Ends the process, with one line, where a worker ends with one, or workers go on dying.

    Args:
        output: Where the files go: a folder that all machines of the cluster share, or a URL.
        values: The arguments that workers train by.
        repeated: What run.yaml is to hold.
        start: The checkpoint to go on from, None for none.

    Returns:
        How the training ended.
    """
    import ray

    if not ray.is_initialized():
        # As the dump does: a submitted job joins its cluster, RAY_ADDRESS is heeded, otherwise a local Ray starts.
        ray.init(logging_level=logging.ERROR)
    if output.remote is None:
        output.folder.mkdir(parents=True, exist_ok=True)  # workers see by it whether they share it
    num_workers, resources = _resources(values)
    task = {
        "values": values | {"num_workers": None, "storage_options": None},
        "repeated": repeated,
        "options": storage_options(values["storage_options"]),
        "fsspec": dict(conf),
        "folder": os.getcwd(),
        "num_threads": None if "GPU" in resources else int(resources["CPU"]),
    }
    run_until_done(lambda start: _run(task | {"start": start}, num_workers, resources), output, start)
    with refusals(), output.look() as held:
        if STATE not in held.names:
            end(
                f"output_dir must be a folder that all machines share, or a URL, got output_dir={output.where}, where "
                f"{platform.node()} sees no {STATE}; it is on another machine",
                1,
            )
        state: TrainerState = TrainerState.load_from_json(str(held.folder / STATE))
    return state


def run_until_done(run: Callable[[str | None], str | None], output: Output, start: str | None) -> None:
    """Has workers run again, from the last finished checkpoint, for as long as they get further.

    Args:
        run: Begins at a checkpoint, or at none. Returns what ended it early, None if it is done.
        output: Where the checkpoints are.
        start: The first to begin at.
    """
    left = RESTARTS
    while (died := run(start)) is not None:
        with refusals(), output.look() as held:
            last = find_checkpoint(held, "true") or start
        left = RESTARTS if last != start else left - 1
        since = last or "the beginning"
        if not left:
            end(f"workers must live, got {RESTARTS} deaths since {since}: {died}", 1)
        start = last
        print(f"note: {died}; going on from {since}", file=sys.stderr, flush=True)


def _resources(values: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Returns how many workers there are to be, and what each has: a GPU if there are any, else its share of CPUs."""
    import ray

    from logitstore.cluster.resources import room

    num, nodes = int(values["num_workers"]), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = float(not values["use_cpu"] and any(node.get("GPU", 0) >= 1 for node in nodes))
    most = room(nodes, 1.0, gpus)
    if num > most:
        each = "a GPU and a CPU" if gpus else "a CPU"
        print(
            f"note: {num} workers with {each} each are wanted where the cluster has room for {most}; waiting for it to "
            "grow", file=sys.stderr, flush=True,
        )  # fmt: skip
    if gpus:
        return num, {"CPU": 1.0, "GPU": 1.0}
    largest = int(max(node.get("CPU", 0) for node in nodes))
    return num, {"CPU": next((float(cpus) for cpus in range(largest, 0, -1) if room(nodes, cpus, 0) >= num), 1.0)}


def _run(task: dict[str, Any], num_workers: int, resources: dict[str, float]) -> str | None:
    """Runs the workers once.

    Returns:
        What ended them early, if that may pass; None if they are done.

    Raises:
        RuntimeError: One of them raised something unforeseen.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError, WorkerGroupError

    with tempfile.TemporaryDirectory(prefix="logitstore-ray-") as storage:
        try:
            _trainer(task, num_workers, resources, storage).fit()
        except SystemExit:  # how Ray answers to Ctrl-C
            raise KeyboardInterrupt from None
        except WorkerGroupError as error:
            found = error.worker_failures
            for failure in found.values():
                if isinstance(failure, SystemExit):
                    end(*failure.args)
            # of one that dies the others notice only that it does not answer
            deaths = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in found.items()}
            for rank, failure in deaths.items():
                if isinstance(failure, RayActorError):
                    return f"worker {rank} died ({one_line(failure):.300})"
            raise RuntimeError(str(error)) from None
        except TrainingFailedError as error:
            return one_line(error)
    return None


def _trainer(task: dict[str, Any], num_workers: int, resources: dict[str, float], storage: str) -> TorchTrainer:
    """Returns what runs the workers.

    Args:
        task: For `work`.
        num_workers: How many.
        resources: Of each.
        storage: Folder of this machine for Ray's own notes.
    """
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Workers stay in the folder where Ray starts them: relative paths are those of a submitted working directory.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # Of nodes that are to go nothing is asked: it is enough to begin again when they are gone.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # What workers print comes to the driver anyway, and would a second time as logs of Ray's.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
    jobs = str(Path(__file__).parent)

    def worker() -> None:
        # This function goes to the workers as it is. The jobs are scripts in a folder that they must find: that of this
        # machine, or that of the working directory which a submitted job brings along.
        sys.path[:0] = [jobs, str(Path("jobs").absolute())]
        from _ray_train import work

        work(task)

    return TorchTrainer(
        worker,
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        # mypy knows the first version of both classes
        run_config=RunConfig(  # type: ignore[call-arg]
            storage_path=storage,
            # Ray would begin again whatever was raised, a mistake or too little memory: `run_until_done` decides.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def work(task: dict[str, Any]) -> None:
    """Trains as one of the workers, in the process and with the environment that Ray gave it.

    Raises:
        SystemExit: With a line and an exit status for the job: what its process would end with by itself. A builtin
            exception, as it passes through processes that know none of ours.
    """
    import torch
    from train_draft import make_module, prepare, train  # it imports this module

    # What is raised here the job shows itself; where a worker dies, what the others raise is of no interest.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    if Path(task["folder"]).is_dir():
        os.chdir(task["folder"])
    os.environ.pop(VARIABLE, None)
    if task["options"] is not None:
        os.environ[VARIABLE] = json.dumps(task["options"])
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
            prepared = prepare(run, training)
            module = make_module(prepared)
        except (ValueError, LogitStoreError) as error:
            raise SystemExit(one_line(error), 2) from None
        try:
            train(prepared, module, training, output, task["repeated"], task["start"])
        except (OSError, ValueError) as error:
            if not is_of_storage(error):
                raise
            raise SystemExit(one_line(error) + output.kept(), 1) from None
