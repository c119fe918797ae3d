"""Runs a function on Ray workers that train together, and starts the workers again when one of them dies.

The function is an argument, so that this module does not depend on the trainer.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

from logitstore.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.train.torch import TorchTrainer

RESTARTS = 3
"""Number of worker deaths in a row, without a new checkpoint in between, after which the run is given up."""
LAUNCHED = "WORLD_SIZE"
"""Environment variable that torchrun and similar launchers set."""


class WorkersDiedError(RuntimeError):
    """Workers died RESTARTS times in a row without a new checkpoint."""


class WorkerEndedError(RuntimeError):
    """A worker ended the run on purpose.

    Attributes:
        status: Exit status for the process that started the workers.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_ray(num_workers: int) -> None:
    """Checks that Ray Train is installed, and that no launcher such as torchrun started this process.

    Raises:
        ValueError: Ray Train is not installed, or a launcher started this process.
    """
    if LAUNCHED in os.environ:
        raise ValueError(
            f"num_workers must be omitted under torchrun, got num_workers={num_workers}; omit it, or start one process "
            "without torchrun"
        )
    try:
        from ray.train import LoggingConfig  # noqa: F401 - only Ray Train's second version has it
    except ImportError as error:
        raise ValueError(
            f"num_workers needs Ray Train, got num_workers={num_workers} without it ({one_line(error)}); "
            "pip install 'logitstore[train-ray]'"
        ) from error


def run_until_done(
    run: Callable[[str | None], str | None],
    last_checkpoint: Callable[[], str | None],
    start: str | None,
    note: Callable[[str], None],
) -> None:
    """Runs workers until they are done. If they end early, starts them again from the last finished checkpoint.

    Args:
        run: Runs the workers from a checkpoint (None: from the beginning). Returns the reason if they ended early,
            None if they are done.
        last_checkpoint: Returns the last finished checkpoint; None if there is none.
        start: Checkpoint from which the first run starts; None to start from the beginning.
        note: Called with a line of text about each restart.

    Raises:
        WorkersDiedError: Workers died RESTARTS times in a row without a new checkpoint.
    """
    left = RESTARTS
    while (died := run(start)) is not None:
        last = last_checkpoint() or start
        # A new checkpoint shows that the workers make progress, so the deaths before it no longer count.
        left = RESTARTS if last != start else left - 1
        since = last or "the beginning"
        if not left:
            raise WorkersDiedError(f"workers died {RESTARTS} times without a new checkpoint since {since}: {died}")
        start = last
        note(f"{died}; going on from {since}")


def run_workers(work: Callable[[], None], num_workers: int, resources: dict[str, float]) -> str | None:
    """Starts workers, and runs a function once on each of them.

    Args:
        work: Function that each worker runs. It is pickled, and workers import the module that defines it.
        num_workers: Number of workers.
        resources: CPUs and GPUs of each worker.

    Returns:
        The reason why the workers ended early, if a restart may help; None if the workers are done.

    Raises:
        WorkerEndedError: A worker raised SystemExit with a message and a status.
        RuntimeError: A worker raised anything else.
    """
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError, WorkerGroupError

    with tempfile.TemporaryDirectory(prefix="logitstore-ray-") as storage:
        try:
            _trainer(work, num_workers, resources, storage).fit()
        except SystemExit:  # Ray raises SystemExit on Ctrl-C.
            raise KeyboardInterrupt from None
        except WorkerGroupError as error:
            found = error.worker_failures
            for failure in found.values():
                if isinstance(failure, SystemExit):
                    raise WorkerEndedError(*failure.args) from None
            # When one worker dies, the others only report that it does not answer. Only the error of the dead worker
            # shows the cause.
            deaths = {rank: getattr(failure, "health_check_failure", failure) for rank, failure in found.items()}
            for rank, failure in deaths.items():
                if isinstance(failure, RayActorError):
                    return f"worker {rank} died ({one_line(failure):.300})"
            raise RuntimeError(str(error)) from None
        except TrainingFailedError as error:
            return one_line(error)
    return None


def _trainer(work: Callable[[], None], num_workers: int, resources: dict[str, float], storage: str) -> TorchTrainer:
    """Returns Ray's trainer. `storage` is a local folder for the files that Ray itself writes."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Ray starts workers in the submitted folder, to which relative paths refer, so workers must stay in this folder.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # The watcher warns workers before their node is taken away. No warning is needed: a restart afterwards is enough.
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    # The driver already shows the output of workers. Ray Train's own logs would show this output a second time.
    os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"

    def worker() -> None:
        # `work` may hold credentials, so it is not in train_loop_config, which Ray stores and shows.
        work()

    return TorchTrainer(
        worker,
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        # mypy takes RunConfig and FailureConfig for the classes of the same names in Ray Train's first version.
        run_config=RunConfig(  # type: ignore[call-arg]
            storage_path=storage,
            # Ray would restart workers after any error, even a mistake in an argument. Instead, `run_until_done`
            # decides whether to restart them.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
