"""Which shard an actor gets next, and what becomes of one that fails. Knows neither Ray nor a store.

A place is where one actor runs at a time: when it dies, another is started in its place. A place is open while its
actor is known to have started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

SHARDS_IN_FLIGHT = 2
"""At a place: one on the device, one being encoded and written."""
MAX_ATTEMPTS = 3
"""How often a shard is tried before it is set aside."""
MAX_IN_A_ROW = 10
"""Failures at a place without a shard finished there, after which it is used no more."""


class Schedule:
    """Shards that wait, run and fail.

    A shard that failed is tried last, elsewhere if there is another place, and with nothing beside it: whoever else is
    on an actor dies with it, and must not be set aside for that.
    """

    def __init__(self, shards: Sequence[int], num_places: int, failed_before: Collection[int]) -> None:
        """Begins with all shards waiting, and no place open.

        Args:
            shards: Which, in order.
            num_places: How many actors there are to be.
            failed_before: Those that an earlier run set aside. They come last, and that they fail again says nothing
                about a place.
        """
        self._waiting = [
            *(shard for shard in shards if shard not in failed_before),
            *(shard for shard in shards if shard in failed_before),
        ]
        self._failed_before = failed_before
        self._places = set(range(num_places))
        self._open: set[int] = set()
        self._failed_to_open: set[int] = set()
        self._any_opened = False
        self._at: dict[int, list[int]] = {place: [] for place in range(num_places)}
        self._attempts = dict.fromkeys(shards, 0)
        self._failed_at: dict[int, set[int]] = {}
        self._in_a_row = dict.fromkeys(range(num_places), 0)
        self._num_finished = 0

    @property
    def is_done(self) -> bool:
        """Whether no shard waits or runs."""
        return not self._waiting and not any(self._at.values())

    @property
    def has_finished_any(self) -> bool:
        """Whether a shard was finished anywhere."""
        return self._num_finished > 0

    @property
    def has_places(self) -> bool:
        """Whether there is a place left, open or to be opened."""
        return bool(self._places)

    def open(self, place: int) -> None:
        """Notes that the actor at a place has started: shards may go there from now on."""
        self._open.add(place)
        self._any_opened = True

    def close(self, place: int) -> None:
        """Notes that the actor at a place is lost: no shard goes there until another has started."""
        self._open.discard(place)

    def attempts(self, shard: int) -> int:
        """Returns how often a shard has failed."""
        return self._attempts[shard]

    def hand_out(self) -> Iterator[tuple[int, int]]:
        """Yields (place, shard) that are to run from now on, a first shard for every open place before any has two.

        While there are places that are not open, as many shards are kept for them rather than be another's second.
        """
        for depth in range(1, SHARDS_IN_FLIGHT + 1):
            num_kept = 0 if depth == 1 else len(self._places - self._open)
            for place in sorted(self._open):
                if len(self._waiting) > num_kept and (shard := self._next(place, depth)) is not None:
                    self._waiting.remove(shard)
                    self._at[place].append(shard)
                    yield place, shard

    def _next(self, place: int, depth: int) -> int | None:
        beside = self._at[place]
        if len(beside) >= depth or any(self._attempts[shard] for shard in beside):
            return None

        def fits(shard: int) -> bool:
            elsewhere = self._open - self._failed_at.get(shard, set())
            return not self._attempts[shard] or (not beside and (place in elsewhere or not elsewhere))

        return next(filter(fits, self._waiting), None)

    def finish(self, place: int, shard: int) -> None:
        """Notes that a shard is done."""
        self._at[place].remove(shard)
        self._in_a_row[place] = 0
        self._num_finished += 1

    def fail(self, place: int, shard: int, *, again: bool) -> bool:
        """Notes that a shard failed.

        Args:
            place: Where.
            shard: Which.
            again: Whether another try may succeed.

        Returns:
            Whether it is set aside: it was tried often enough, or there is no use in it.
        """
        self._at[place].remove(shard)
        self._attempts[shard] += 1
        self._failed_at.setdefault(shard, set()).add(place)
        if again and self._attempts[shard] < MAX_ATTEMPTS:
            self._waiting.append(shard)
            return False
        return True

    def blame(self, place: int, shard: int | None) -> bool:
        """Counts a failure against a place.

        Args:
            place: Where.
            shard: Of which shard; None if its actor could not be started.

        Returns:
            Whether the place is given up: nothing was finished there for long, or nothing anywhere so far. All places
            are if an actor was tried at each, and none could be started ever.
        """
        if shard in self._failed_before:
            return False
        self._in_a_row[place] += 1
        if shard is None:
            self._failed_to_open.add(place)
            if not self._any_opened and self._failed_to_open >= self._places:
                self._places.clear()
                return True
        if self._in_a_row[place] < (MAX_IN_A_ROW if self.has_finished_any else MAX_ATTEMPTS):
            return False
        self._places.discard(place)
        self._open.discard(place)
        return True
