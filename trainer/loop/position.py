"""Counts a run's progress through its documents, saves it in trainer_state.json, and reads it to resume the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, IntervalStrategy, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from trainer.data.sharding import Position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import TrainerControl, TrainingArguments

    from trainer.data.order import PackOrder
    from trainer.data.sharding import Deal

STATE = "trainer_state.json"
"""Name of the file in which Trainer saves its state."""


class Progress(TrainerCallback, ExportableState):
    """Callback that counts the packs that a run has trained on.

    Trainer saves the counts in each checkpoint, so that a resumed run knows which pack comes next. The value `epoch` in
    the logs is computed from the counts too. Trainer itself counts only steps. The step count alone does not determine
    the position, because the number of packs per step may change when a run is resumed.
    """

    def __init__(
        self, epoch: int = 0, packs: int = 0, is_open: bool = False, packs_per_epoch: int = 0, order: str = ""
    ) -> None:
        """Creates the callback. When a run resumes, Trainer passes the values that `state` returned.

        Args:
            epoch: Number of the current epoch, from 0. When an epoch ends, the next one becomes the current epoch.
            packs: Number of packs of the current epoch that were trained on.
            is_open: Whether Trainer still has to call `on_epoch_end` after the last step.
            packs_per_epoch: Number of packs in one epoch of the order.
            order: Fingerprint of the order of the packs.
        """
        self._epoch = epoch
        self._packs = packs
        self._is_open = is_open
        self._packs_per_epoch = packs_per_epoch
        self._order = order
        self._per_step = self._steps = 0

    def begin(self, order: PackOrder, deal: Deal, epoch: int, packs: int) -> None:
        """Starts an epoch.

        Args:
            order: Order of the packs.
            deal: Division of the packs into optimizer steps.
            epoch: Number of the epoch, from 0.
            packs: Number of packs of this epoch that were already trained on.
        """
        self._epoch, self._packs, self._is_open = epoch, packs, False
        self._packs_per_epoch, self._order = order.packs_per_epoch, order.fingerprint
        self._per_step, self._steps = deal.packs_per_step, deal.num_steps(order.packs_per_epoch - packs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Updates the counts. Trainer calls this before it logs or saves the step."""
        self._steps -= 1
        # After an epoch's last step all its packs count as done, even those that dataloader_drop_last leaves out.
        self._packs = self._packs + self._per_step if self._steps else self._packs_per_epoch
        self._is_open = True
        state.epoch = self._epoch + self._packs / self._packs_per_epoch
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            # Otherwise the last steps are not logged if max_steps is not a multiple of logging_steps.
            control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Moves to the next epoch if the current one is complete. Trainer calls this before it logs and evaluates."""
        self._is_open = False
        if self._packs == self._packs_per_epoch:
            self._epoch, self._packs = self._epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Returns the callback's entry in trainer_state.json; its "args" are the arguments of `__init__`."""
        return {
            "args": {
                "epoch": self._epoch,
                "packs": self._packs,
                "is_open": self._is_open,
                "packs_per_epoch": self._packs_per_epoch,
                "order": self._order,
            },
            "attributes": {},
        }


class AtTheEnd(TrainerCallback):
    """Callback that calls a function when the training ends."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Calls the function. Trainer has already logged the training's summary and loaded the best model."""
        self._action()


def note_callbacks(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> None:
    """Writes the states of callbacks into the trainer state. Trainer itself does this only when it saves a checkpoint.

    Args:
        state: The state that is changed.
        callbacks: All callbacks of the trainer; those without a state are skipped.
    """
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()  # type: ignore[call-overload, index]


def is_stopped_early(state: TrainerState) -> bool:
    """Returns whether early stopping has ended a training because the evaluations no longer improved."""
    # EarlyStoppingCallback saves its counter, and ends a training when the counter reaches the patience.
    found = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)  # type: ignore[union-attr]
    if found is None:
        return False
    return bool(found["attributes"]["early_stopping_patience_counter"] >= found["args"]["early_stopping_patience"])


def read_position(checkpoint: str | Path, order: PackOrder) -> Position:
    """Reads from a checkpoint the position in the order of packs at which a resumed run continues.

    Args:
        checkpoint: Folder of the checkpoint.
        order: Order of the packs of the run that resumes.

    Raises:
        ValueError: The run of the checkpoint read other documents, or the same documents in another order.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
    found = state.stateful_callbacks.get(Progress.__name__, {}).get("args", {})
    if found.get("order") != order.fingerprint:
        raise ValueError(
            f"order of documents must be the same as in the run to resume, got {order.packs_per_epoch} packs per epoch "
            f"here and {found.get('packs_per_epoch')} in {checkpoint}: the documents or their order are different; "
            "read the same unchanged stores with the same --seed, --data_seed, --shuffle_window, --store_weights, "
            "--packing, --pack_length and --eval_fraction, or start a new run in another --output_dir"
        )
    return Position(epoch=found["epoch"], packs=found["packs"], is_open=found["is_open"], steps=state.global_step)
