"""Measures fidelity: how much stored rows differ from the exact distributions of the target. Uses torch, but no Ray.

Fidelity is measured during the dump, while the exact distributions are in memory. For a few rows of each shard, the
target's exact distribution is compared with three others: the stored row; the same distribution, computed a second time
(the control); and the distribution of another model. All sums are in float64. docs/fidelity.md explains the meaning of
the sums.

n: number of rows measured. N: number of rows in a batch. V: vocabulary size. K: largest number of entries in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from logitstore.dump.scoring.batch_runner import documents_of, rows_of
from logitstore.errors import FidelityError
from logitstore.models.support import Support, acceptance_estimate, estimated_cross_entropy, on_support

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from logitstore.format.spec import TargetSpec
    from logitstore.rows.rows import Rows
    from logitstore.rows.shard import Shard

DOCUMENTS = 4
"""Maximum number of documents measured in a shard."""
ROWS = 16
"""Maximum number of rows measured in a document."""
CONTROL_SHARE = 128
"""Limits the cost of the control, a second run of the target. The control runs on at most 1 / CONTROL_SHARE of the
tokens of a shard, but on at least one document."""
VALUES_PER_CHUNK = 2**20
"""Number of float64 values that are compared at once. A comparison needs about ten arrays of 8 MiB each."""
SMALLEST = 1e-45
"""Stored tail masses below this value are raised to it before their logarithm is taken. The value is about the
smallest positive float32."""

NO_ROWS: NDArray[np.intp] = np.zeros(0, dtype=np.intp)
"""Selection of no rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The exact distributions of some rows of a shard, on the device that computed them."""

    rows: NDArray[np.intp]
    """[n]: positions of the rows in the shard, in ascending order."""
    logprobs: Tensor
    """Float32 [n, V], nats, normalised; NaN for rows that were not computed."""

    @staticmethod
    def of(rows: NDArray[np.intp], vocab_size: int, device: torch.device) -> Exact:
        """Allocates memory for the distributions of some rows, and fills it with NaN.

        64 rows with a vocabulary of 2**18 tokens take 64 MiB.

        Args:
            rows: [n]: positions of the rows in the shard, in ascending order.
            vocab_size: Size V of the vocabulary.
            device: Device of the model.
        """
        return Exact(rows=rows, logprobs=torch.full((len(rows), vocab_size), torch.nan, device=device))

    def keep(self, rows: NDArray[np.intp], logits: Tensor) -> None:
        """Stores the distributions of those rows of a chunk that are in `self.rows`. Ignores the other rows.

        Args:
            rows: [N]: positions of the chunk's rows in the shard.
            logits: Float32 [N, V].
        """
        if not len(self.rows):
            return
        # The last row is left out of the search, so that every result is a valid index. np.isin would be slower.
        places = np.searchsorted(self.rows[:-1], rows)
        here = np.flatnonzero(self.rows[places] == rows)
        if len(here):
            found = logits[torch.from_numpy(here).to(logits.device)].log_softmax(-1)
            self.logprobs[torch.from_numpy(places[here]).to(logits.device)] = found

    def only(self, kept: NDArray[np.bool_]) -> Exact:
        """Returns the distributions of the rows for which `kept`, a mask over all rows of the shard, is True."""
        places = np.flatnonzero(kept[self.rows])
        # If all rows are kept, no copy is made, because the distributions may be large.
        if len(places) == len(self.rows):
            return self
        return Exact(rows=self.rows[places], logprobs=self.logprobs[torch.from_numpy(places).to(self.logprobs.device)])

    def chunks(self) -> Iterator[slice]:
        """Returns slices that together cover the rows. Small slices keep the memory for a comparison small."""
        size = max(1, VALUES_PER_CHUNK // self.logprobs.shape[1])
        return (slice(start, start + size) for start in range(0, len(self.rows), size))

    def probs(self, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logprobs and probabilities of the rows in `chunk`, normalised again in float64."""
        logprobs = self.logprobs[chunk].double().log_softmax(-1)
        return logprobs, logprobs.exp()


NOTHING = Exact(rows=NO_ROWS, logprobs=torch.zeros(0, 0))
"""Exact distributions of no rows. Put in place of distributions that are no longer needed, to free their memory."""


def choose(shard: Shard) -> NDArray[np.intp]:
    """Chooses the rows to measure. The choice depends only on the shard, so that every job measures the same rows.

    The rows with loss mask 1 are put in random order. The first DOCUMENTS documents that appear in this order are
    measured, with up to ROWS rows of each. All rows with loss mask 1 thus have about the same chance of being chosen,
    whatever the lengths of their documents.

    Args:
        shard: The shard. Its number is the seed of the random order.

    Returns:
        Positions of the chosen rows in the shard, in ascending order.
    """
    key = np.array([int.from_bytes(b"fidelity"), shard.index], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    counted = generator.permutation(np.flatnonzero(shard.loss_mask))
    owners = documents_of(shard, counted)
    documents, first = np.unique(owners, return_index=True)
    met = documents[np.argsort(first)][:DOCUMENTS]
    return np.sort(np.concatenate([NO_ROWS, *(counted[owners == document][:ROWS] for document in met)]))


def control_of(shard: Shard, rows: NDArray[np.intp]) -> Shard:
    """Returns the shard with a loss mask that selects the rows of the control, the second run of the target.

    The control runs on the measured rows of the first measured documents. Documents are added as long as they together
    have at most 1 / CONTROL_SHARE of the shard's tokens. The first document is always taken.

    Args:
        shard: The shard.
        rows: Positions of the measured rows in the shard, in ascending order.
    """
    documents = np.unique(documents_of(shard, rows))
    is_cheap = np.cumsum(shard.lengths[documents]) <= len(shard.ids) // CONTROL_SHARE
    is_cheap[:1] = True
    mask = np.zeros(len(shard.ids), dtype=bool)
    mask[rows] = True
    return replace(shard, loss_mask=mask & rows_of(shard, documents[is_cheap]))


@torch.no_grad()
def measure_target(exact: Exact, again: Exact, rows: Rows, spec: TargetSpec) -> dict[str, float]:
    """Compares exact distributions of the target with the stored rows, and with a second run of the target.

    Args:
        exact: Exact distributions of n rows of the shard. Each of these rows has at least one entry.
        again: Exact distributions of some of these rows, computed in the second run.
        rows: The n stored rows, decoded.
        spec: Truncation scheme and codebook of the rows.

    Returns:
        Sums by name (docs/fidelity.md); empty if n is 0. Sums whose names begin with `control_` are over the rows of
        `again` for which the divergence is finite. All other sums are over the n rows.
    """
    if not len(exact.rows):
        return {}
    vocab_size, device = exact.logprobs.shape[1], exact.logprobs.device
    sums = _Sums()
    for chunk in exact.chunks():
        places = np.arange(chunk.start, min(chunk.stop, len(exact.rows)))
        logprobs, probs = exact.probs(chunk)
        stored = _support(rows, places, device)
        # Padding points at the first entry, so that `scatter` changes only kept entries. Every row has an entry.
        token_ids = stored.token_ids.where(stored.used, stored.token_ids[:, :1])
        kept = probs.gather(1, stored.token_ids).where(stored.used, 0.0)
        left = probs.scatter(1, token_ids, 0.0)
        tail, num_left = left.sum(-1), vocab_size - stored.used.sum(-1)
        sums.add(
            rows=torch.ones_like(tail),
            mass=kept.sum(-1),
            kl_tail=torch.xlogy(left, left).sum(-1) - torch.xlogy(tail, tail / num_left.clamp_min(1)),
            kl_renormalised=-kept.sum(-1).log(),
            kl_codes=(torch.xlogy(kept, kept) - torch.xlogy(kept, stored.probs.where(stored.used, 1.0))).sum(-1)
            + (torch.xlogy(tail, tail) - torch.xlogy(tail, stored.tail.clamp_min(SMALLEST))),
        )
        if spec.scheme.draws:
            sums.add(tv_draws=probs.scatter_add(1, stored.token_ids, -_weights(stored)).abs().sum(-1) / 2)
    places_of_again = _at(exact, again)
    for chunk in again.chunks():
        (logprobs, probs), (other, others) = exact.probs(places_of_again[chunk]), again.probs(chunk)
        divergence = torch.where(probs > 0, probs * (logprobs - other), 0.0).sum(-1)
        # The divergence is infinite if the second run gives probability 0 to a token that has some in the first run.
        fine = divergence.isfinite()
        sums.add(
            control_rows=fine.double(),
            control_kl=divergence.where(fine, 0.0),
            control_tv=((probs - others).abs().sum(-1) / 2).where(fine, 0.0),
        )
    return sums.rounded()


@torch.no_grad()
def measure_losses(exact: Exact, draft: Exact, rows: Rows) -> dict[str, float]:
    """Compares a draft's gradient and acceptance rate on stored rows with the same figures on exact distributions.

    Args:
        exact: Exact distributions of the target, for some rows of the shard.
        draft: Exact distributions of the draft, or of a reference in its place, for n of the rows in `exact`.
        rows: All rows of the shard, decoded.

    Returns:
        Sums over the n rows by name (docs/fidelity.md), angles in degrees; empty if n is 0.
    """
    if not len(draft.rows):
        return {}
    device = draft.logprobs.device
    places_of_draft = _at(exact, draft)
    sums = _Sums()
    total = torch.zeros(2, draft.logprobs.shape[1], dtype=torch.float64, device=device)
    for chunk in draft.chunks():
        places = draft.rows[chunk]
        (_, p), (logprobs, q) = exact.probs(places_of_draft[chunk]), draft.probs(chunk)
        stored = _support(rows, places, device)
        kept, log_tail = on_support(logprobs, stored)
        alpha, estimate = torch.minimum(p, q).sum(-1), acceptance_estimate(stored, kept, log_tail)
        # q - p is the gradient of the cross entropy over the whole vocabulary with respect to the logits.
        wanted, found = q - p, _gradient(logprobs, stored)
        total += torch.stack([wanted.sum(0), found.sum(0)])
        sums.add(
            rows=torch.ones_like(alpha),
            alpha=alpha,
            alpha_estimate=estimate,
            alpha_error=(estimate - alpha).abs(),
            angle_row=_angle(wanted, found),
        )
    sums.add(angle_shard=_angle(total[:1], total[1:]), shards=torch.ones_like(total[:1, 0]))
    return sums.rounded()


def check_budget(fidelity: Mapping[str, float], spec: TargetSpec, max_kl: float | None, shard: int) -> None:
    """Checks that a shard's target rows lose no more than `max_kl` when they are stored.

    The loss is the mean of kl_codes + kl_tail over the measured rows. Only truncated rows have a budget: if entries are
    drawn, nothing except rounding is lost on average.

    Args:
        fidelity: Sums that `measure_target` returned for the shard; if empty, nothing is checked.
        spec: Truncation scheme of the rows. The error message recommends options of this scheme.
        max_kl: Largest mean loss of a row, in nats; None for no limit.
        shard: Number of the shard. It appears in the error message.

    Raises:
        FidelityError: The loss is larger than `max_kl`.
    """
    if max_kl is None or not fidelity:
        return
    if (found := (fidelity["kl_codes"] + fidelity["kl_tail"]) / fidelity["rows"]) > max_kl:
        larger = "--mass or --k" if spec.scheme.name == "nucleus" else "--k"
        raise FidelityError(
            f"max_kl must be at least the nats that a row loses when it is stored, got max_kl={max_kl:g}, but the "
            f"{fidelity['rows']:.0f} measured rows of shard {shard} lose {found:.3g} on average (kl_codes + kl_tail); "
            f"give a larger --max_kl, or start another --store with a larger {larger}"
        )


def without(exact: Exact, shard: Shard, documents: Collection[int]) -> Exact:
    """Returns the exact distributions without the rows of the given documents, which are numbered within the shard."""
    return exact.only(~rows_of(shard, documents))


def _at(exact: Exact, part: Exact) -> Tensor:
    """Returns the index in `exact` of each row of `part`; int64 [n], on the device of `exact`."""
    return torch.from_numpy(np.searchsorted(exact.rows, part.rows)).to(exact.logprobs.device)


def _support(rows: Rows, places: NDArray[np.intp], device: torch.device) -> Support:
    """Copies some rows to a device. Converts them to float64, because all sums are in float64."""
    support = Support.of(rows.padded(places), device)
    weights = None if support.weights is None else support.weights.double()
    return replace(support, probs=support.probs.double(), tail=support.tail.double(), weights=weights)


def _weights(support: Support) -> Tensor:
    """Returns the weights of the entries. For truncated rows, these are the probabilities."""
    return support.probs if support.weights is None else support.weights


def _gradient(logprobs: Tensor, support: Support) -> Tensor:
    """Returns the gradient of the training loss on stored rows with respect to the logits; float64 [n, V]."""
    with torch.enable_grad():
        logits = logprobs.detach().requires_grad_()
        loss = estimated_cross_entropy(support, *on_support(logits.log_softmax(-1), support)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Returns the angle, in degrees, between each row of `a` and the same row of `b`."""
    # For small angles, this formula is more accurate than the arc cosine, because the cosine would round to 1.
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))


class _Sums:
    """Sums of figures by name. A figure is a tensor with one value per row. Sums stay on the device until the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            total = value.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def rounded(self) -> dict[str, float]:
        """Returns the sums, rounded to 7 significant digits."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        return {name: float(f"{value:.7g}") for name, value in zip(self._sums, values, strict=True)}
