"""Accounting of optimizer steps: the denominator of the loss, the scores of competing rows, and logged statistics.

The loss of an optimizer step is one weighted sum over all rows of the step, divided by one number. The loss therefore
does not depend on how the rows are spread over micro-batches and ranks: two ranks make the same update as one rank that
gets the batches of both.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from accelerate import Accelerator
    from torch import Tensor, nn

    from trainer.loss.selection import Rule

Denominator = Literal["kept", "masked"]
DENOMINATORS: tuple[Denominator, ...] = ("kept", "masked")
"""Names of the numbers by which the weighted loss sum of a step can be divided.

kept: the sum of the rows' weights (AdaSPEC's paper). masked: the number of rows with loss mask 1 (AdaSPEC's released
code)."""

QUEUE_ROWS = 30_000
"""Default number of recent rows whose scores the scope `queue` keeps. The value is that of arXiv 2105.12967."""


class Steps:
    """Accounting of the optimizer steps of one process.

    Attributes:
        queue: Float32 scores of the most recent rows of all ranks, oldest first; empty unless the scope is `queue`.
    """

    def __init__(
        self, rule: Rule, denominator: Denominator, accelerator: Accelerator, queue_rows: int = QUEUE_ROWS
    ) -> None:
        """Creates the accounting of a run that has made no steps yet.

        Args:
            rule: Rule that decides which rows are kept.
            denominator: Name of the number by which the weighted loss sum of a step is divided.
            accelerator: The accelerator that all ranks share.
            queue_rows: Maximum number of scores in the queue.
        """
        self._rule = rule
        self._denominator = denominator
        self._accelerator = accelerator
        self._queue_rows = queue_rows
        self.queue = torch.zeros(0, device=accelerator.device)
        self._divisor = torch.ones(())
        self._weight = torch.zeros(())
        self._window: dict[str, Tensor] = {}
        self._since = time.monotonic()
        self._totals = {"objective": 0.0, "denominator": 0.0, "rows": 0.0}
        self._rows_before = 0.0

    @property
    def needs_all_scores(self) -> bool:
        """Whether all micro-batches of a step must be scored before any of them is trained on."""
        return self._rule.selection.competes and self._rule.scope == "step"

    @property
    def _has_queue(self) -> bool:
        return self._rule.selection.competes and self._rule.scope == "queue"

    def begin(self, num_rows: int) -> None:
        """Starts a step. All ranks must call this method.

        Args:
            num_rows: Number of rows with loss mask 1 in all micro-batches of this step on this rank.
        """
        device = self._accelerator.device
        rows: Tensor = self._accelerator.reduce(torch.tensor(float(num_rows), device=device), "sum")
        # The total weight of the kept rows is only known after the last micro-batch. Until then the loss is divided by
        # the expected weight, and `finish` corrects the gradients.
        share = self._rule.keep if self._denominator == "kept" and self._rule.selection.selects else 1.0
        # The divisor must not be 0 if no rank has rows in this step.
        self._divisor = (rows * share).clamp_min(1.0)
        self._weight = torch.zeros((), device=device)
        self._window["steps"] = self._window.get("steps", torch.zeros((), device=device)) + 1.0

    def compared(self) -> dict[str, Tensor]:
        """Returns a dict with the scores in the queue, as the keyword argument `others` of `DraftModule.forward`.

        The rows of the next micro-batch compete with these scores. The dict is empty unless the scope is `queue`.
        """
        return {"others": self.queue} if self._has_queue else {}

    def gather(self, scores: Tensor) -> Tensor:
        """Returns the float32 scores of all ranks, concatenated in the order of the ranks."""
        if self._accelerator.num_processes == 1:
            return scores
        # The ranks may have different numbers of rows, but the accelerator gathers tensors of one size only.
        sizes: Tensor = self._accelerator.gather(torch.tensor([len(scores)], device=scores.device))
        padded = torch.nn.functional.pad(scores, (0, int(sizes.max()) - len(scores)))
        parts = self._accelerator.gather(padded[None])
        joined: Tensor = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
        return joined

    def scaled(self, loss: Tensor) -> Tensor:
        """Divides the loss sum of a micro-batch by the step's divisor.

        The result is also multiplied by the number of ranks, because gradients are averaged over the ranks later.
        """
        scaled: Tensor = loss * (self._accelerator.num_processes / self._divisor)
        return scaled

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Adds the outputs of `DraftModule.forward` for one micro-batch to the sums of the step and to the queue."""
        self._weight = self._weight + outputs["weight"]
        self.note({name: value.detach() for name, value in outputs.items() if name not in ("loss", "scores")})
        if self._has_queue:
            self.queue = torch.cat([self.queue, self.gather(outputs["scores"])])[-self._queue_rows :]

    def note(self, values: dict[str, Tensor]) -> None:
        """Adds sums of one micro-batch to the statistics that are logged next."""
        for name, value in values.items():
            self._window[name] = self._window[name] + value if name in self._window else value

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Ends a step: rescales the gradients from the expected weight of the kept rows to their actual weight.

        The loss was divided by the expected weight, because the actual weight is only known now. Call this method when
        the gradients of all micro-batches are summed, and before the optimizer uses them.
        """
        if self._denominator == "masked" or not self._rule.selection.selects:
            return
        weight: Tensor = self._accelerator.reduce(self._weight, "sum")
        # If no row was kept, all gradients are 0, and an infinite factor would turn them into NaN.
        factor = torch.where(weight > 0, self._divisor / weight, 1.0)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def state(self) -> dict[str, Any]:
        """Returns the state of this process for a checkpoint: recent scores, totals, and sums not logged yet."""
        return {
            "queue": self.queue.cpu(),
            "window": self._window,
            "seconds": time.monotonic() - self._since,
            "totals": dict(self._totals),
        }

    def restore(self, state: dict[str, Any], *, window: bool) -> None:
        """Restores a state that `state` returned.

        Args:
            state: The saved state.
            window: Whether to also restore the sums that were not logged yet. These sums belong to one rank, so they
                are valid only if the number of ranks is unchanged.
        """
        device = self._accelerator.device
        # The queue and the totals are the same on all ranks, so the saved state of any rank can be used.
        self.queue = state["queue"].to(device)
        self._totals = dict(state["totals"])
        # `totals` reports the speed since the resume, so it must not count the rows before the resume.
        self._rows_before = self._totals["rows"]
        if window:
            self._window = {name: value.to(device) for name, value in state["window"].items()}
            # Clocks of two processes have different origins, so the checkpoint holds the elapsed time.
            self._since = time.monotonic() - state["seconds"]
            rows: Tensor = self._accelerator.reduce(self._window.get("rows", torch.zeros((), device=device)), "sum")
            self._rows_before += float(rows)

    def statistics(self) -> dict[str, float]:
        """Returns the statistics of the steps since the last call, over all ranks; empty if there were no steps.

        All ranks must call this method.

        Returns:
            loss: Weighted sum of the losses of all rows, divided by the sum of the steps' denominators, in nats.
            kl, alpha, label_nll: Mean KL(p‖draft) in nats, mean acceptance rate, and mean negative logprob of the
                document's next token in nats. The means are over all rows with loss mask 1 if the selection evaluates
                the draft on all of them, otherwise over the rows trained on. Without a target, kl and alpha are absent.
            kept_fraction: Kept rows divided by rows with loss mask 1.
            denominator: Mean denominator of a step.
            kept_kl: Mean KL(p‖draft) of the rows trained on, in nats. Only if the selection scores rows, and only with
                a target.
            score_mean, score_std, score_kept: Mean and standard deviation of the selection's scores (for adaspec the
                loss gap, in nats), and mean score of the kept rows. Only if the selection scores rows.
            score_threshold: Mean threshold. Only if the rule has a threshold.
            rows_per_second: Rows with loss mask 1 per second, summed over all ranks. It is an integer, because Trainer
                prints large floats in the form 3.197e+04.
        """
        if not self._window:
            return {}
        names = sorted(self._window)
        stacked = torch.stack([self._window[name].double() for name in names])
        sums = dict(zip(names, self._accelerator.reduce(stacked, "sum").tolist(), strict=True))
        now = time.monotonic()
        seconds, self._since, self._window = now - self._since, now, {}
        # All ranks counted the same steps, and the sum above is over ranks.
        steps = sums["steps"] / self._accelerator.num_processes
        denominator = sums["weight"] if self._denominator == "kept" else sums["rows"]
        for name, value in (("objective", sums["objective"]), ("denominator", denominator), ("rows", sums["rows"])):
            self._totals[name] += value
        return {
            "loss": sums["objective"] / max(1.0, denominator),
            **_means(sums, ("kl", "alpha", "label_nll"), "known"),
            "kept_fraction": sums["kept"] / max(1.0, sums["rows"]),
            "denominator": denominator / max(1.0, steps),
            **_of_scores(sums),
            "rows_per_second": round(sums["rows"] / max(seconds, 1e-9)),
        }

    def totals(self, seconds: float) -> dict[str, float]:
        """Returns the figures logged at the end of the run.

        Args:
            seconds: Duration of the training since it was started or resumed.

        Returns:
            train_rows_per_second: Rows with loss mask 1 per second since the start or the last resume.
            train_loss: Mean loss of the whole run, in nats; absent if no row was trained on.
        """
        rows = self._totals["rows"] - self._rows_before
        found: dict[str, float] = {"train_rows_per_second": round(rows / max(seconds, 1e-9))}
        if self._totals["rows"]:
            found["train_loss"] = self._totals["objective"] / max(1.0, self._totals["denominator"])
        return found


def num_rows(batches: Iterable[dict[str, Tensor]]) -> int:
    """Returns the number of rows with loss mask 1 in all given micro-batches together."""
    return sum(len(batch["labels"]) for batch in batches)


def _means(sums: dict[str, float], names: tuple[str, ...], number: str) -> dict[str, float]:
    return {name: sums[name] / max(1.0, sums[number]) for name in names if name in sums}


def _of_scores(sums: dict[str, float]) -> dict[str, float]:
    if "scored" not in sums:
        return {}
    number = max(1.0, sums["scored"])
    mean = sums["score"] / number
    # Rounding can make the variance of equal scores slightly negative, so it is raised to 0.
    found = {
        "score_mean": mean,
        "score_std": max(0.0, sums["score_squared"] / number - mean**2) ** 0.5,
        "score_kept": sums["score_kept"] / max(1.0, sums["kept"]),
    }
    if sums["thresholds"]:
        found["score_threshold"] = sums["threshold"] / sums["thresholds"]
    if "kept_kl" in sums:
        found["kept_kl"] = sums["kept_kl"] / max(1.0, sums["trained"])
    return found
