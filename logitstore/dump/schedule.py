"""Decides which shard an actor gets next, and when a failing shard or actor is given up. Uses neither Ray nor a store.

A slot holds one actor: when the actor dies, a new actor is started in the same slot. A slot is open from the
moment when its actor has started until the actor is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

SHARDS_IN_FLIGHT = 2
"""Maximum number of shards in a slot at the same time. While one shard is on the device, the other is encoded and
written."""
MAX_ATTEMPTS = 3
"""Number of times that a shard is tried before it is set aside."""
MAX_IN_A_ROW = 10
"""A slot is given up after this number of failures without a finished shard in between."""


class Schedule:
    """Keeps track of which shards wait, run or have failed, and of the slots where they run.

    A shard that failed waits behind all other shards. It then runs in a slot where it has not failed yet, if there is
    such a slot. While it runs, no other shard runs in this slot: if the actor died, the other shard would count as
    failed too.
    """

    def __init__(self, shards: Sequence[int], num_slots: int, failed_before: Collection[int]) -> None:
        """Starts with all shards waiting and no slot open.

        Args:
            shards: Shards to run, in order.
            num_slots: Number of slots.
            failed_before: Shards that an earlier run set aside. They run last. If one of them fails again, the failure
                does not count against the slot where it ran.
        """
        self._waiting = [
            *(shard for shard in shards if shard not in failed_before),
            *(shard for shard in shards if shard in failed_before),
        ]
        self._failed_before = failed_before
        self._slots = set(range(num_slots))
        self._open: set[int] = set()
        self._failed_to_open: set[int] = set()
        self._any_opened = False
        self._at: dict[int, list[int]] = {slot: [] for slot in range(num_slots)}
        self._attempts = dict.fromkeys(shards, 0)
        self._failed_at: dict[int, set[int]] = {}
        self._in_a_row = dict.fromkeys(range(num_slots), 0)
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
    def has_slots(self) -> bool:
        """Whether at least one slot has not been given up."""
        return bool(self._slots)

    def open(self, slot: int) -> None:
        """Records that the actor in a slot has started. The slot gets shards from now on."""
        self._open.add(slot)
        self._any_opened = True

    def close(self, slot: int) -> None:
        """Records that the actor in a slot is lost. The slot gets no shards until a new actor has started there."""
        self._open.discard(slot)

    def attempts(self, shard: int) -> int:
        """Returns the number of times that a shard has failed."""
        return self._attempts[shard]

    def hand_out(self) -> Iterator[tuple[int, int]]:
        """Yields pairs (slot, shard) to start now.

        Every open slot gets a first shard before any slot gets a second shard. For each slot that is not open yet,
        one waiting shard is reserved, so that the slot has a shard as soon as it opens. Reserved shards are never
        handed out as second shards. Any slot without a shard may get them.
        """
        for depth in range(1, SHARDS_IN_FLIGHT + 1):
            num_kept = 0 if depth == 1 else len(self._slots - self._open)
            for slot in sorted(self._open):
                if len(self._waiting) > num_kept and (shard := self._next(slot, depth)) is not None:
                    self._waiting.remove(shard)
                    self._at[slot].append(shard)
                    yield slot, shard

    def _next(self, slot: int, depth: int) -> int | None:
        """Returns the first waiting shard that may start in a slot, or None. A slot runs at most `depth` shards."""
        beside = self._at[slot]
        # A shard that failed before runs alone, so nothing is started beside it.
        if len(beside) >= depth or any(self._attempts[shard] for shard in beside):
            return None

        def fits(shard: int) -> bool:
            # If the shard has failed in all open slots, it may run at any of them.
            elsewhere = self._open - self._failed_at.get(shard, set())
            return not self._attempts[shard] or (not beside and (slot in elsewhere or not elsewhere))

        return next(filter(fits, self._waiting), None)

    def finish(self, slot: int, shard: int) -> None:
        """Records that a shard was finished in a slot."""
        self._at[slot].remove(shard)
        # A finished shard shows that the actor works, so the earlier failures of the slot no longer count.
        self._in_a_row[slot] = 0
        self._num_finished += 1

    def fail(self, slot: int, shard: int, *, again: bool) -> bool:
        """Records that a shard failed.

        Args:
            slot: Place where the shard ran.
            shard: The shard.
            again: Whether another attempt may succeed.

        Returns:
            True if the shard is set aside, because it has failed MAX_ATTEMPTS times or another attempt cannot succeed.
            False if the shard waits for another attempt.
        """
        self._at[slot].remove(shard)
        self._attempts[shard] += 1
        self._failed_at.setdefault(shard, set()).add(slot)
        if again and self._attempts[shard] < MAX_ATTEMPTS:
            self._waiting.append(shard)
            return False
        return True

    def blame(self, slot: int, shard: int | None) -> bool:
        """Counts a failure of a slot.

        A slot is given up after MAX_IN_A_ROW failures there since its last finished shard. As long as no shard has
        been finished in any slot, MAX_ATTEMPTS failures are enough. If no actor has ever started, and the start has
        failed in every slot, all slots are given up together.

        Args:
            slot: Place where the failure happened.
            shard: Shard that failed; None if the actor could not be started.

        Returns:
            Whether the slot is given up.
        """
        # If the shard failed in an earlier run too, the likely cause is the shard, not the slot.
        if shard in self._failed_before:
            return False
        self._in_a_row[slot] += 1
        if shard is None:
            self._failed_to_open.add(slot)
            if not self._any_opened and self._failed_to_open >= self._slots:
                self._slots.clear()
                return True
        if self._in_a_row[slot] < (MAX_IN_A_ROW if self.has_finished_any else MAX_ATTEMPTS):
            return False
        self._slots.discard(slot)
        self._open.discard(slot)
        return True
