"""Decides which shard an actor gets next, and when a failing shard or actor is given up. Uses neither Ray nor a store.

A place is a slot for one actor: when the actor dies, a new actor is started at the same place. A place is open from the
moment when its actor has started until the actor is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

SHARDS_IN_FLIGHT = 2
"""Maximum number of shards at a place at the same time. While one shard is on the device, the other is encoded and
written."""
MAX_ATTEMPTS = 3
"""Number of times that a shard is tried before it is set aside."""
MAX_IN_A_ROW = 10
"""A place is given up after this number of failures without a finished shard in between."""


class Schedule:
    """Keeps track of which shards wait, run or have failed, and of the places where they run.

    A shard that failed waits behind all other shards. It then runs at a place where it has not failed yet, if there is
    such a place. While it runs, no other shard runs at this place: if the actor died, the other shard would count as
    failed too.
    """

    def __init__(self, shards: Sequence[int], num_places: int, failed_before: Collection[int]) -> None:
        """Starts with all shards waiting and no place open.

        Args:
            shards: Shards to run, in order.
            num_places: Number of places.
            failed_before: Shards that an earlier run set aside. They run last. If one of them fails again, the failure
                does not count against the place where it ran.
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
        """Whether all shards are finished or set aside."""
        return not self._waiting and not any(self._at.values())

    @property
    def has_finished_any(self) -> bool:
        """Whether at least one shard was finished."""
        return self._num_finished > 0

    @property
    def has_places(self) -> bool:
        """Whether at least one place has not been given up."""
        return bool(self._places)

    def open(self, place: int) -> None:
        """Records that the actor at a place has started. The place gets shards from now on."""
        self._open.add(place)
        self._any_opened = True

    def close(self, place: int) -> None:
        """Records that the actor at a place is lost. The place gets no shards until a new actor has started there."""
        self._open.discard(place)

    def attempts(self, shard: int) -> int:
        """Returns the number of times that a shard has failed."""
        return self._attempts[shard]

    def hand_out(self) -> Iterator[tuple[int, int]]:
        """Yields pairs (place, shard) to start now.

        Every open place gets a first shard before any place gets a second shard. For each place that is not open yet,
        one waiting shard is reserved, so that the place has a shard as soon as it opens. Reserved shards are not handed
        out as second shards, but may be handed out as first shards.
        """
        for depth in range(1, SHARDS_IN_FLIGHT + 1):
            num_kept = 0 if depth == 1 else len(self._places - self._open)
            for place in sorted(self._open):
                if len(self._waiting) > num_kept and (shard := self._next(place, depth)) is not None:
                    self._waiting.remove(shard)
                    self._at[place].append(shard)
                    yield place, shard

    def _next(self, place: int, depth: int) -> int | None:
        """Returns the first waiting shard that may start at a place, or None. A place runs at most `depth` shards."""
        beside = self._at[place]
        # A shard that failed before runs alone, so nothing is started beside it.
        if len(beside) >= depth or any(self._attempts[shard] for shard in beside):
            return None

        def fits(shard: int) -> bool:
            # If the shard has failed at all open places, it may run at any of them.
            elsewhere = self._open - self._failed_at.get(shard, set())
            return not self._attempts[shard] or (not beside and (place in elsewhere or not elsewhere))

        return next(filter(fits, self._waiting), None)

    def finish(self, place: int, shard: int) -> None:
        """Records that a shard was finished at a place."""
        self._at[place].remove(shard)
        # A finished shard shows that the actor works, so the earlier failures of the place no longer count.
        self._in_a_row[place] = 0
        self._num_finished += 1

    def fail(self, place: int, shard: int, *, again: bool) -> bool:
        """Records that a shard failed.

        Args:
            place: Place where the shard ran.
            shard: The shard.
            again: Whether another attempt may succeed.

        Returns:
            True if the shard is set aside, because it has failed MAX_ATTEMPTS times or another attempt cannot succeed.
            False if the shard waits for another attempt.
        """
        self._at[place].remove(shard)
        self._attempts[shard] += 1
        self._failed_at.setdefault(shard, set()).add(place)
        if again and self._attempts[shard] < MAX_ATTEMPTS:
            self._waiting.append(shard)
            return False
        return True

    def blame(self, place: int, shard: int | None) -> bool:
        """Counts a failure of a place.

        A place is given up after MAX_IN_A_ROW failures there since its last finished shard. As long as no shard has
        been finished at any place, MAX_ATTEMPTS failures are enough. If no actor has ever started, and the start has
        failed at every place, all places are given up together.

        Args:
            place: Place where the failure happened.
            shard: Shard that failed; None if the actor could not be started.

        Returns:
            Whether the place is given up.
        """
        # If the shard failed in an earlier run too, the likely cause is the shard, not the place.
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
