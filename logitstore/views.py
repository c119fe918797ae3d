"""A store read as if it had been dumped with a smaller scheme: its rows are truncated further as they are decoded.

Only where the stored rows hold all that the smaller scheme would have kept. What a row loses goes to its tail mass, so
that kept probabilities and tail sum to what they did; label logprob and entropy stay. Of entries whose codes are equal,
of which the dump would have kept the likelier ones, those with the lower ids are kept; and a nucleus ends where the
decoded probabilities reach its mass. N rows, E entries.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from logitstore import codec
from logitstore.codec import LARGEST_TAIL, LEVELS
from logitstore.errors import IdentityError, LayerNotFoundError
from logitstore.rows import Rows
from logitstore.schemes import OPTIONS, Scheme, describe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from logitstore.reader import Store
    from logitstore.spec import TargetSpec

PLACE_BITS = 16
"""A row has fewer than 2**16 entries."""
BLOCK_CELLS = 2**16
"""Most cells of a rectangle of rows and entries that is worked on at once: 2 MB. No row has as many entries."""


def truncated(store: Store, scheme: Scheme) -> Store:
    """Returns a store as it would be read if it had been dumped with a smaller scheme. Reads nothing.

    Its spec has that scheme, and neither it nor its layers have losses: those were computed on the stored entries.
    A store that is truncated already is asked for what is stored, not for what it is read as: another scheme replaces
    the one before, and the stored one gives the store as it is, with losses.

    Args:
        store: With a target layer of `topk` or `nucleus`.
        scheme: `topk` or `nucleus`, of no more entries at any row than are stored.

    Raises:
        LayerNotFoundError: The store has no target.
        ValueError: It is no scheme, or the stored rows do not hold all that it keeps.
    """
    if not isinstance(scheme, Scheme):
        raise ValueError(
            f"scheme must be a Scheme, got scheme={scheme!r}; make one with logitstore.schemes.make_scheme"
        )
    target = _target(store)
    if scheme == _read_as(store):
        return store
    # All layers, which a store that is truncated does not list.
    layers = vars(store).get("_stored_layers", store.layers)
    view = copy.copy(store)
    if scheme == target.scheme:
        vars(view).update(spec=store.stored, layers=layers)
        return view
    check_smaller(target.scheme, scheme)
    vars(view).update(
        spec=replace(store.stored, target=replace(target, scheme=scheme), losses={}),
        layers={name: layer for name, layer in layers.items() if not name.startswith("losses/")},
        _stored_layers=layers,
    )
    return view


def smaller(store: Store, *, k: int | None, mass: float | None) -> Store:
    """Returns a store with fewer entries at a row, as flags ask for it; the store itself where they are not given.

    Args:
        store: What they are given for; they ask of what is stored, however it is read.
        k: Most entries of a row; as stored by default.
        mass: Of a nucleus, which then also a store of `topk` is read as; as stored by default.

    Raises:
        LayerNotFoundError: The store has no target.
        ValueError: A value is out of range, or the stored rows do not hold all that is asked for.
    """
    if k is None and mass is None:
        return store
    stored = _target(store).scheme
    if stored.draws:
        check_smaller(stored, stored)  # says why not
    most = stored.k if k is None else k
    if mass is None and stored.name == "topk":
        return truncated(store, Scheme(k=most))
    k_min = stored.k_min if stored.name == "nucleus" else int(OPTIONS["nucleus"]["k_min"])
    wanted = stored.mass if mass is None else mass
    return truncated(store, Scheme(name="nucleus", k=most, mass=wanted, k_min=max(1, min(k_min, most))))


def check_smaller(stored: Scheme, scheme: Scheme) -> None:
    """Checks that rows of one scheme hold all that another keeps, whatever the distribution.

    Raises:
        ValueError: They do not.
    """
    whole = "leave scheme (--k and --mass) out to read the store as it is"
    if stored.draws or scheme.draws:
        which, one = ("stored rows", stored) if stored.draws else ("scheme", scheme)
        raise ValueError(
            f"{which} must be of topk or nucleus to be truncated further, got {describe(one)}: a token that was not "
            f"drawn may be likelier than one that was; {whole}"
        )
    if scheme.k > stored.k:
        raise ValueError(f"k must be at most {stored.k}, which the store keeps, got k={scheme.k}; {whole}")
    if stored.name == "topk":
        return
    if scheme.name == "topk":
        if scheme.k > stored.k_min:
            raise ValueError(
                f"k must be at most {stored.k_min}, the k_min of the stored nucleus, got topk with k={scheme.k}: rows "
                "that reach the mass sooner hold no more; give a nucleus of lower mass instead"
            )
        return
    for name in ("mass", "k_min"):
        if getattr(scheme, name) > getattr(stored, name):
            raise ValueError(
                f"{name} must be at most {getattr(stored, name):g} as in the stored nucleus, got "
                f"{name}={getattr(scheme, name):g}; {whole}"
            )


def check_losses(store: Store) -> None:
    """Raises IdentityError if a store is read by another scheme than its losses were computed with."""
    if store.spec.target != store.stored.target and store.stored.losses:
        raise IdentityError(
            f"losses must be of the rows that are read, got {', '.join(sorted(store.stored.losses))} of rows with "
            f"{_described(store.stored.target)} while they are read as {_described(store.spec.target)}; read the store "
            "as it is, or dump target and losses with the smaller scheme into a store of their own"
        )


def caption(store: Store) -> str:
    """Says how a store is read, empty where it is read as it is."""
    if store.spec.target == store.stored.target:
        return ""
    return f" read as {_described(store.spec.target)} (stored: {_described(store.stored.target)})"


def decode(store: Store, arrays: Mapping[str, NDArray[Any]]) -> Rows:
    """Turns the stored arrays of a `target` shard into rows as the store is read.

    Raises:
        LayerNotFoundError: The store has no target.
    """
    stored, scheme = _target(store), _read_as(store)
    rows = codec.decode(arrays, stored)
    return rows if scheme == stored.scheme else drop(rows, kept(rows, arrays["logprobs"], stored, scheme))


def decode_bounds(store: Store, arrays: Mapping[str, NDArray[Any]]) -> tuple[Rows, Rows]:
    """Returns the entries of `decode` at the least and at the most that the stored codes allow, and so the tails."""
    stored, scheme = _target(store), _read_as(store)
    least, most = codec.decode_bounds(arrays, stored.codebook)
    if scheme == stored.scheme:
        return least, most
    chosen = kept(codec.decode(arrays, stored), arrays["logprobs"], stored, scheme)
    return drop(least, chosen), drop(most, chosen)


def kept(rows: Rows, codes: NDArray[np.uint8], stored: TargetSpec, scheme: Scheme) -> NDArray[np.bool_]:
    """Finds the entries that a smaller scheme would have kept.

    Args:
        rows: As stored, decoded.
        codes: [E]: codes of the logprobs, which rise as these fall.
        stored: How the rows were truncated and coded.
        scheme: `check_smaller` has passed.

    Returns:
        [E]
    """
    counts, firsts = rows.counts[rows.counts > 0], rows.offsets[:-1][rows.counts > 0]
    # One number by which the entries of a row sort: code, then place. Cells at the end are no entry of any row.
    cells = np.full(len(codes) + counts.max(initial=0), LEVELS << PLACE_BITS, dtype=np.int32)
    keys = cells[: len(codes)]
    keys[:] = codes
    keys <<= PLACE_BITS
    keys += np.arange(len(codes), dtype=np.int32)
    keys -= np.repeat(firsts.astype(np.int32), counts)
    last_keys = np.zeros(len(counts), dtype=np.int32)
    # Rows of like counts are worked on together: one of many entries makes no wide rectangle of all.
    by_count = np.argsort(counts.astype(np.uint16), kind="stable")
    for block in _blocks(counts[by_count]):
        some = by_count[block]
        num, first = counts[some], firsts[some]
        in_order = sliding_window_view(cells, num[-1])[first]
        if num[0] < num[-1]:
            in_order[np.arange(num[-1]) >= num[:, None]] = LEVELS << PLACE_BITS
        in_order.sort(axis=1)
        most = np.minimum(num, scheme.k)
        if scheme.name == "nucleus":
            scale = np.exp(rows.logprobs[first] - stored.codebook.table[codes[first]])
            reached = _reached(in_order >> PLACE_BITS, scale, stored, scheme)
            if (stored.scheme.name, stored.scheme.mass) == ("nucleus", scheme.mass):
                # The exact probabilities needed all that is stored beyond k_min; decoded ones may seem to need less.
                reached = np.where(num > stored.scheme.k_min, num, reached)
            most = np.minimum(most, reached)
        last_keys[some] = in_order[np.arange(len(some)), most - 1]
    chosen: NDArray[np.bool_] = keys <= np.repeat(last_keys, counts)
    return chosen


def _blocks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Yields rows that make a rectangle of at most `BLOCK_CELLS`, and of at most twice as many cells as entries.

    Args:
        counts: [N], rising, each at least 1.
    """
    start = 0
    while start < len(counts):
        stop = int(np.searchsorted(counts, 2 * counts[start], side="right"))
        stop = min(stop, start + int(BLOCK_CELLS // counts[stop - 1]))
        yield slice(start, stop)
        start = stop


def _reached(
    codes: NDArray[np.int32], scale: NDArray[np.float32], stored: TargetSpec, scheme: Scheme
) -> NDArray[np.intp]:
    """Returns how many of its entries each row needs to reach a mass, and k_min.

    Args:
        codes: [N, K], ascending; LEVELS beyond a row's entries.
        scale: [N]: what the coded probabilities of each row are multiplied by when they are decoded.
        stored: Has the codebook.
        scheme: A nucleus.

    Returns:
        [N], at least 1. More than a row has where that does not suffice.
    """
    probs = np.append(np.exp(stored.codebook.table), np.float32(0.0))[codes]
    before = probs.cumsum(axis=1)
    before -= probs
    before *= scale[:, None]
    reached: NDArray[np.intp] = np.maximum((before < scheme.mass).sum(axis=1), scheme.k_min)
    return reached


def drop(rows: Rows, chosen: NDArray[np.bool_]) -> Rows:
    """Keeps some entries of truncated rows, and adds the probability of the others to the tails.

    Args:
        rows: Without weights.
        chosen: [E]; at least one of each row that has entries.
    """
    there = rows.counts > 0
    firsts = rows.offsets[:-1][there]
    counts, tail_mass = rows.counts.copy(), rows.tail_mass.copy()
    if len(firsts):
        dropped = np.exp(rows.logprobs)
        dropped[chosen] = 0.0
        tail_mass[there] = np.minimum(tail_mass[there] + np.add.reduceat(dropped, firsts), LARGEST_TAIL)
        counts[there] = np.add.reduceat(chosen, firsts, dtype=np.int64)
    return Rows(
        counts=counts,
        token_ids=rows.token_ids[chosen],
        logprobs=rows.logprobs[chosen],
        weights=None,
        tail_mass=tail_mass,
        label_logprob=rows.label_logprob,
        entropy=rows.entropy,
    )


def _target(store: Store) -> TargetSpec:
    if store.stored.target is None:
        raise LayerNotFoundError(f"store must have a target layer, got store={store.url}; dump the target first")
    return store.stored.target


def _read_as(store: Store) -> Scheme:
    return (store.spec.target or _target(store)).scheme


def _described(target: TargetSpec | None) -> str:
    return "no target" if target is None else describe(target.scheme)
