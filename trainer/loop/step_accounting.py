"""Optimizer steps: what their micro-batches and ranks are divided by, which scores compete, and what is logged.

The loss of a step is one weighted sum over its rows, whatever micro-batches and ranks they are in, divided by one
number: so two ranks make the same update as one with the batches of both.
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
"""What the sum is divided by: the sum of the rows' weights (AdaSPEC's paper), or the number of all rows whose loss mask
is 1 (its released code)."""

QUEUE_ROWS = 30_000
"""How many recent rows' scores the scope `queue` keeps, as published (arXiv 2105.12967)."""


class Steps:
    """Follows the optimizer steps of one process.

    Attributes:
        queue: Float32: scores of the most recent rows of all ranks, oldest first; under the scope `queue` alone.
    """

    def __init__(
        self, rule: Rule, denominator: Denominator, accelerator: Accelerator, queue_rows: int = QUEUE_ROWS
    ) -> None:
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
        """Whether the scores of all micro-batches must be known before the first is trained on."""
        return self._rule.selection.competes and self._rule.scope == "step"

    @property
    def _has_queue(self) -> bool:
        return self._rule.selection.competes and self._rule.scope == "queue"

    def begin(self, num_rows: int) -> None:
        """Begins a step.

        Args:
            num_rows: Rows whose loss mask is 1 in all its micro-batches on this rank.
        """
        device = self._accelerator.device
        rows: Tensor = self._accelerator.reduce(torch.tensor(float(num_rows), device=device), "sum")
        # how many will be kept is known for sure in the end only: gradients are scaled by the difference then
        share = self._rule.keep if self._denominator == "kept" and self._rule.selection.selects else 1.0
        self._divisor = (rows * share).clamp_min(1.0)
        self._weight = torch.zeros((), device=device)
        self._window["steps"] = self._window.get("steps", torch.zeros((), device=device)) + 1.0

    def compared(self) -> dict[str, Tensor]:
        """Returns what the scores of the next micro-batch compete with beside each other, for `DraftModule.forward`."""
        return {"others": self.queue} if self._has_queue else {}

    def gather(self, scores: Tensor) -> Tensor:
        """Joins the scores of all ranks, in the order of ranks."""
        if self._accelerator.num_processes == 1:
            return scores
        sizes: Tensor = self._accelerator.gather(torch.tensor([len(scores)], device=scores.device))
        padded = torch.nn.functional.pad(scores, (0, int(sizes.max()) - len(scores)))
        parts = self._accelerator.gather(padded[None])
        joined: Tensor = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
        return joined

    def scaled(self, loss: Tensor) -> Tensor:
        """Divides a micro-batch's sum, for ranks whose gradients are averaged."""
        scaled: Tensor = loss * (self._accelerator.num_processes / self._divisor)
        return scaled

    def add(self, outputs: dict[str, Tensor]) -> None:
        """Takes what `DraftModule.forward` said of a micro-batch."""
        self._weight = self._weight + outputs["weight"]
        self.note({name: value.detach() for name, value in outputs.items() if name not in ("loss", "scores")})
        if self._has_queue:
            self.queue = torch.cat([self.queue, self.gather(outputs["scores"])])[-self._queue_rows :]

    def note(self, values: dict[str, Tensor]) -> None:
        """Adds sums of a micro-batch to what is logged."""
        for name, value in values.items():
            self._window[name] = self._window[name] + value if name in self._window else value

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Ends a step, when the gradients of all its micro-batches are summed: divides by what was really kept."""
        if self._denominator == "masked" or not self._rule.selection.selects:
            return
        weight: Tensor = self._accelerator.reduce(self._weight, "sum")
        factor = torch.where(weight > 0, self._divisor / weight, 1.0)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def state(self) -> dict[str, Any]:
        """Returns what a run that goes on needs of this process: recent scores, what was logged, and what not yet."""
        return {
            "queue": self.queue.cpu(),
            "window": self._window,
            "seconds": time.monotonic() - self._since,
            "totals": dict(self._totals),
        }

    def restore(self, state: dict[str, Any], *, window: bool) -> None:
        """Takes what `state` returned; what is yet to be logged only with `window`: it is of one rank among so many."""
        device = self._accelerator.device
        self.queue = state["queue"].to(device)
        self._totals = dict(state["totals"])
        self._rows_before = self._totals["rows"]
        if window:
            self._window = {name: value.to(device) for name, value in state["window"].items()}
            self._since = time.monotonic() - state["seconds"]
            rows: Tensor = self._accelerator.reduce(self._window.get("rows", torch.zeros((), device=device)), "sum")
            self._rows_before += float(rows)

    def statistics(self) -> dict[str, float]:
        """Returns what is logged of the steps since the last call, over all ranks; nothing where there were none.

        loss: the sum over the rows that count / the denominators, nats.
        kl, alpha, label_nll: means of KL(p‖draft), of acceptance and of minus the logprob of the text, of all masked
        rows where the selection looks at the draft, else of those trained on.
        kept_fraction: kept rows over masked rows; denominator: what a step was divided by, mean.
        kept_kl: mean KL(p‖draft) of the rows trained on.
        score_mean, score_std, score_kept, score_threshold: of what the selection goes by (adaspec: the loss gap,
        nats): mean, standard deviation, mean of the kept rows, mean threshold.
        rows_per_second: masked rows, all ranks together; whole ones, as Trainer prints others like 3.197e+04.
        """
        if not self._window:
            return {}
        names = sorted(self._window)
        stacked = torch.stack([self._window[name].double() for name in names])
        sums = dict(zip(names, self._accelerator.reduce(stacked, "sum").tolist(), strict=True))
        now = time.monotonic()
        seconds, self._since, self._window = now - self._since, now, {}
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
        """Returns what is logged at the end: the mean loss of the run, and the rate since it began or went on."""
        rows = self._totals["rows"] - self._rows_before
        found: dict[str, float] = {"train_rows_per_second": round(rows / max(seconds, 1e-9))}
        if self._totals["rows"]:
            found["train_loss"] = self._totals["objective"] / max(1.0, self._totals["denominator"])
        return found


def num_rows(batches: Iterable[dict[str, Tensor]]) -> int:
    """Counts the rows of micro-batches whose loss mask is 1."""
    return sum(len(batch["labels"]) for batch in batches)


def _means(sums: dict[str, float], names: tuple[str, ...], number: str) -> dict[str, float]:
    return {name: sums[name] / max(1.0, sums[number]) for name in names if name in sums}


def _of_scores(sums: dict[str, float]) -> dict[str, float]:
    if "scored" not in sums:
        return {}
    number = max(1.0, sums["scored"])
    mean = sums["score"] / number
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
