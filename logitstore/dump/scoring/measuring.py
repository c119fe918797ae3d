"""How true what is stored is, measured while the exact distributions are at hand. torch only; knows no Ray.

A few rows of each shard are compared: the target's exact distribution with its stored row, with itself computed a
second time, and with a draft's. All sums are in float64. What they mean: docs/fidelity.md.

n rows measured, V vocabulary, K entries per row at most.
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
"""Measured in each shard."""
ROWS = 16
"""Most rows measured of a document."""
CONTROL_SHARE = 128
"""The control runs no more than one in so many tokens of a shard, but a document at least: that is what it costs."""
VALUES_PER_CHUNK = 2**20
"""Float64 values of rows that are compared at once: some ten arrays of 8 MiB."""
SMALLEST = 1e-45
"""A stored tail of less counts as this: float32 ends there."""

NO_ROWS: NDArray[np.intp] = np.zeros(0, dtype=np.intp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """The exact distributions of some rows of a shard, on the device that computed them."""

    rows: NDArray[np.intp]
    """[n]: places in the shard, ascending."""
    logprobs: Tensor
    """Float32 [n, V], normalised; NaN where nothing was computed."""

    @staticmethod
    def of(rows: NDArray[np.intp], vocab_size: int, device: torch.device) -> Exact:
        """Makes room for some rows: 64 of 2**18 tokens are 64 MiB."""
        return Exact(rows=rows, logprobs=torch.full((len(rows), vocab_size), torch.nan, device=device))

    def keep(self, rows: NDArray[np.intp], logits: Tensor) -> None:
        """Keeps what is wanted of a chunk of rows.

        Args:
            rows: [N]: places in the shard.
            logits: Float32 [N, V].
        """
        if not len(self.rows):
            return
        places = np.searchsorted(self.rows[:-1], rows)  # np.isin would take longer than all the rest
        here = np.flatnonzero(self.rows[places] == rows)
        if len(here):
            found = logits[torch.from_numpy(here).to(logits.device)].log_softmax(-1)
            self.logprobs[torch.from_numpy(places[here]).to(logits.device)] = found

    def only(self, kept: NDArray[np.bool_]) -> Exact:
        """Returns the rows that a mask over the shard's rows keeps."""
        places = np.flatnonzero(kept[self.rows])
        if len(places) == len(self.rows):
            return self
        return Exact(rows=self.rows[places], logprobs=self.logprobs[torch.from_numpy(places).to(self.logprobs.device)])

    def chunks(self) -> Iterator[slice]:
        """Cuts the rows so that what is computed of them stays small."""
        size = max(1, VALUES_PER_CHUNK // self.logprobs.shape[1])
        return (slice(start, start + size) for start in range(0, len(self.rows), size))

    def probs(self, chunk: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Returns logprobs and probabilities of some rows; float64, normalised as such."""
        logprobs = self.logprobs[chunk].double().log_softmax(-1)
        return logprobs, logprobs.exp()


NOTHING = Exact(rows=NO_ROWS, logprobs=torch.zeros(0, 0))


def choose(shard: Shard) -> NDArray[np.intp]:
    """Chooses the rows that are measured: the same ones whoever computes the shard, and how often.

    Documents are met by their rows, and equally many rows of each are taken: about every row that counts has the same
    chance, whatever the length of its document.

    Returns:
        Places of at most ROWS rows that count of each of at most DOCUMENTS documents, ascending.
    """
    key = np.array([int.from_bytes(b"fidelity"), shard.index], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    counted = generator.permutation(np.flatnonzero(shard.loss_mask))
    owners = documents_of(shard, counted)
    documents, first = np.unique(owners, return_index=True)
    met = documents[np.argsort(first)][:DOCUMENTS]
    return np.sort(np.concatenate([NO_ROWS, *(counted[owners == document][:ROWS] for document in met)]))


def control_of(shard: Shard, rows: NDArray[np.intp]) -> Shard:
    """Returns a shard in which only rows of the control count: of those measured, in as many documents as are cheap."""
    documents = np.unique(documents_of(shard, rows))
    is_cheap = np.cumsum(shard.lengths[documents]) <= len(shard.ids) // CONTROL_SHARE
    is_cheap[:1] = True
    mask = np.zeros(len(shard.ids), dtype=bool)
    mask[rows] = True
    return replace(shard, loss_mask=mask & rows_of(shard, documents[is_cheap]))


@torch.no_grad()
def measure_target(exact: Exact, again: Exact, rows: Rows, spec: TargetSpec) -> dict[str, float]:
    """Compares exact distributions with what is stored of them.

    Args:
        exact: Of n rows of the shard that have entries.
        again: Of some of them, computed a second time.
        rows: The n rows, decoded.
        spec: How they were kept.

    Returns:
        Sums over the n rows by name; nothing if there are none.
    """
    if not len(exact.rows):
        return {}
    vocab_size, device = exact.logprobs.shape[1], exact.logprobs.device
    sums = _Sums()
    for chunk in exact.chunks():
        places = np.arange(chunk.start, min(chunk.stop, len(exact.rows)))
        logprobs, probs = exact.probs(chunk)
        stored = _support(rows, places, device)
        token_ids = stored.token_ids.where(stored.used, stored.token_ids[:, :1])  # every row keeps something
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
        fine = divergence.isfinite()  # not where only one of the two runs gave a token no chance at all
        sums.add(
            control_rows=fine.double(),
            control_kl=divergence.where(fine, 0.0),
            control_tv=((probs - others).abs().sum(-1) / 2).where(fine, 0.0),
        )
    return sums.rounded()


@torch.no_grad()
def measure_losses(exact: Exact, draft: Exact, rows: Rows) -> dict[str, float]:
    """Compares what a draft would learn and score on stored rows with what it would on the exact distributions.

    Args:
        exact: The target's, of some rows of the shard.
        draft: The other model's, of n of them.
        rows: All of the shard, decoded.

    Returns:
        Sums over the n rows by name, angles in degrees; nothing if there are none.
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
    """Compares what storing loses with what it may.

    Args:
        fidelity: As measured of a shard's target.
        spec: How its rows were truncated. Draws lose nothing but what rounding does: they have no budget.
        max_kl: Most nats of a row, on average; None for any.
        shard: Which, for the message.

    Raises:
        FidelityError: It loses more.
    """
    if max_kl is None or not fidelity:
        return
    if (found := (fidelity["kl_codes"] + fidelity["kl_tail"]) / fidelity["rows"]) > max_kl:
        larger = "--mass or --k" if spec.scheme.name == "nucleus" else "--k"
        raise FidelityError(
            f"max_kl must be at least what storing loses, got max_kl={max_kl:g} where the {fidelity['rows']:.0f} rows "
            f"measured of shard {shard} lose {found:.3g} nats each (kl_codes + kl_tail); give a larger {larger} and "
            "another --store, or a larger --max_kl"
        )


def without(exact: Exact, shard: Shard, documents: Collection[int]) -> Exact:
    """Returns the rows of a shard that are not of some documents."""
    return exact.only(~rows_of(shard, documents))


def _at(exact: Exact, part: Exact) -> Tensor:
    """Returns where in `exact` the rows of `part` are."""
    return torch.from_numpy(np.searchsorted(exact.rows, part.rows)).to(exact.logprobs.device)


def _support(rows: Rows, places: NDArray[np.intp], device: torch.device) -> Support:
    support = Support.of(rows.padded(places), device)
    weights = None if support.weights is None else support.weights.double()
    return replace(support, probs=support.probs.double(), tail=support.tail.double(), weights=weights)


def _weights(support: Support) -> Tensor:
    """Returns what entries stand for."""
    return support.probs if support.weights is None else support.weights


def _gradient(logprobs: Tensor, support: Support) -> Tensor:
    """Returns what training on stored rows does: the gradient of its loss by the logits; float64 [n, V]."""
    with torch.enable_grad():
        logits = logprobs.detach().requires_grad_()
        loss = estimated_cross_entropy(support, *on_support(logits.log_softmax(-1), support)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


def _angle(a: Tensor, b: Tensor) -> Tensor:
    """Returns the angle between vectors, degrees; true for small ones too, where a cosine is rounded to 1."""
    a, b = torch.nn.functional.normalize(a, dim=-1), torch.nn.functional.normalize(b, dim=-1)
    return torch.rad2deg(2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)))


class _Sums:
    """Adds up numbers of rows by name, on the device until the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            total = value.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def rounded(self) -> dict[str, float]:
        """Returns the sums with as many digits as mean anything."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        return {name: float(f"{value:.7g}") for name, value in zip(self._sums, values, strict=True)}
