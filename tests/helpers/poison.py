"""Arenas whose dead slots hold 0xFF bytes (NaN, in floating point): a result that somebody still needs is not there by luck."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from fxmem.codegen import arena as runtime


class PoisonedArena(runtime.Arena):
    """Fills each slot as soon as a later step writes into the arena, and what is about to be written before it is."""

    def __init__(self, layout, device):
        super().__init__(layout, device)
        self.waiting, self.poisoned = [], 0
        self._memory.fill_(0xFF)

    def write(self, node, operator, *args, **kwargs):
        slots = [slot for slot in self.layout.slots[node] if slot.offset is not None]
        now = min(slot.begin for slot in slots)
        if any(slot.begin >= now for slot in self.waiting):
            self.waiting.clear()  # another step of training
        for slot in [s for s in self.waiting if s.end <= now]:
            self._fill(slot)
            self.waiting.remove(slot)
        for slot in slots:
            self._fill(slot)
        self.waiting += slots
        return super().write(node, operator, *args, **kwargs)

    def _fill(self, slot):
        self._memory[slot.offset : slot.offset + slot.size_bytes].fill_(0xFF)
        self.poisoned += 1


@contextlib.contextmanager
def poisoned_arenas() -> Iterator[list[PoisonedArena]]:
    """Inside, all arenas that are made are such; the list holds them."""
    made: list[PoisonedArena] = []

    def make(layout, device):
        made.append(PoisonedArena(layout, device))
        return made[-1]

    with mock.patch.object(runtime, "Arena", make):
        yield made
