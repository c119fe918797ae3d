"""How far a training run is in the order of its documents: kept in trainer_state.json, read when a run goes on."""

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


class Progress(TrainerCallback, ExportableState):
    """Counts the packs of optimizer steps, so that a checkpoint says which comes next and `epoch` in logs is true.

    Trainer itself counts the steps of an epoch, which differ with the number of ranks and the size of a step.
    """

    def __init__(
        self, epoch: int = 0, packs: int = 0, is_open: bool = False, packs_per_epoch: int = 0, order: str = ""
    ) -> None:
        """Takes what `state` returned.

        Args:
            epoch: The epoch of the last step, or of the next one after its end.
            packs: Packs of it that are done.
            is_open: Whether that end is still to come.
            packs_per_epoch: Of the order.
            order: Its fingerprint.
        """
        self._epoch = epoch
        self._packs = packs
        self._is_open = is_open
        self._packs_per_epoch = packs_per_epoch
        self._order = order
        self._per_step = self._steps = 0

    def begin(self, order: PackOrder, deal: Deal, epoch: int, packs: int) -> None:
        """Begins an epoch, some packs of which may be done."""
        self._epoch, self._packs, self._is_open = epoch, packs, False
        self._packs_per_epoch, self._order = order.packs_per_epoch, order.fingerprint
        self._per_step, self._steps = deal.packs_per_step, deal.num_steps(order.packs_per_epoch - packs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Runs before the step is logged and saved."""
        self._steps -= 1
        # of what is left after the last step, if anything, nothing is trained on
        self._packs = self._packs + self._per_step if self._steps else self._packs_per_epoch
        self._is_open = True
        state.epoch = self._epoch + self._packs / self._packs_per_epoch
        if state.global_step >= state.max_steps and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True  # the last steps too, whatever their number

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Runs before what is logged, evaluated and saved for each epoch."""
        self._is_open = False
        if self._packs == self._packs_per_epoch:
            self._epoch, self._packs = self._epoch + 1, 0

    def state(self) -> dict[str, Any]:
        """Returns what goes into trainer_state.json."""
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
    """Does something when a training ends."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Runs after the summary is logged and the best model loaded."""
        self._action()


def note_callbacks(state: TrainerState, callbacks: Iterable[TrainerCallback]) -> None:
    """Has a state hold what callbacks know when a training ends; Trainer notes it in checkpoints alone."""
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            state.stateful_callbacks[type(callback).__name__] = callback.state()  # type: ignore[call-overload, index]


def is_stopped_early(state: TrainerState) -> bool:
    """Tells whether a training ended because evaluations became no better."""
    found = state.stateful_callbacks.get(EarlyStoppingCallback.__name__)  # type: ignore[union-attr]
    if found is None:
        return False
    return bool(found["attributes"]["early_stopping_patience_counter"] >= found["args"]["early_stopping_patience"])


def read_position(checkpoint: str | Path, order: PackOrder) -> Position:
    """Reads where the run of a checkpoint goes on.

    Raises:
        ValueError: It was trained on other documents, or in another order.
    """
    state = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
    found = state.stateful_callbacks.get(Progress.__name__, {}).get("args", {})
    if found.get("order") != order.fingerprint:
        raise ValueError(
            f"order of documents must be as in the run to go on with, got {order.packs_per_epoch} packs in an epoch, "
            f"and {found.get('packs_per_epoch')} of other documents, or in another order, in {checkpoint}; read the "
            "same stores as they were, with the same --seed, --data_seed, --shuffle_window, --store_weights, "
            "--packing, --pack_length and --eval_fraction, or begin a run in another --output_dir"
        )
    return Position(epoch=found["epoch"], packs=found["packs"], is_open=found["is_open"], steps=state.global_step)
