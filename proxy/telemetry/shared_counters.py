"""What the workers of one master tell each other: memory that they share, made by the master before it forks.

Each worker has a slot, and publishes its numbers there. Whoever is scraped adds up all slots. A worker that dies leaves
its last numbers; its replacement takes the slot over and goes on counting from them. So nothing shown goes back, there
are no files to clean up, and no worker waits for another.

A slot has two halves that are written in turn, each with its length and checksum: a worker killed while it writes
leaves the other half whole.
"""

import mmap
import struct
import zlib

import orjson

from billing.meters import Reading
from config.logging import LEVELS
from config.settings import LogLevel

_WORD = struct.Struct("<Q")
_RESTARTS, _LEVEL, _HEAD_BYTES = 0, 8, 16
_SLOT = struct.Struct("<QQ")  # taken, turn
_HALF = struct.Struct("<II")  # length, checksum
_HALF_BYTES = 2 * 1024 * 1024  # pages that are never written take no memory
_SLOT_BYTES = _SLOT.size + 2 * _HALF_BYTES
_READS_MAX = 5  # of a half that was written anew meanwhile


class SharedCounters:
    """The memory.

    Args:
        slots: one for each worker.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._memory = mmap.mmap(-1, _HEAD_BYTES + slots * _SLOT_BYTES)

    @property
    def restarts(self) -> int:
        """How many workers died and were replaced."""
        return int(_WORD.unpack_from(self._memory, _RESTARTS)[0])

    @property
    def level(self) -> LogLevel | None:
        """The log level that was set since the start; None for none."""
        number = int(_WORD.unpack_from(self._memory, _LEVEL)[0])
        return LEVELS[number - 1] if number else None

    @level.setter
    def level(self, level: LogLevel) -> None:
        _WORD.pack_into(self._memory, _LEVEL, LEVELS.index(level) + 1)

    def leave(self, slot: int) -> None:
        """Note that a worker died; the master alone does."""
        _WORD.pack_into(self._memory, _RESTARTS, self.restarts + 1)
        at = self._at(slot)
        _SLOT.pack_into(self._memory, at, 0, _SLOT.unpack_from(self._memory, at)[1])

    @staticmethod
    def _at(slot: int) -> int:
        return _HEAD_BYTES + slot * _SLOT_BYTES

    def publish(self, slot: int, reading: Reading) -> bool:
        """Show a worker's numbers; False when they are too many."""
        text = orjson.dumps(reading)
        if len(text) > _HALF_BYTES - _HALF.size:
            return False
        at = self._at(slot)
        turn = _SLOT.unpack_from(self._memory, at)[1] + 1
        half = at + _SLOT.size + turn % 2 * _HALF_BYTES
        _HALF.pack_into(self._memory, half, len(text), zlib.crc32(text))
        self._memory[half + _HALF.size : half + _HALF.size + len(text)] = text
        _SLOT.pack_into(self._memory, at, 1, turn)
        return True

    def read(self, slot: int) -> Reading:
        """Return what a worker showed last; of one that is gone, what it counted."""
        at = self._at(slot)
        for _ in range(_READS_MAX):
            taken, turn = _SLOT.unpack_from(self._memory, at)
            half = at + _SLOT.size + turn % 2 * _HALF_BYTES
            length, checksum = _HALF.unpack_from(self._memory, half)
            text = self._memory[half + _HALF.size : half + _HALF.size + length]
            if turn and zlib.crc32(text) == checksum:
                reading = Reading(**orjson.loads(text))
                return reading if taken else Reading(reading.counters, reading.histograms)
        return Reading()

    @property
    def taken(self) -> int:
        """How many workers live."""
        return sum(bool(_SLOT.unpack_from(self._memory, self._at(slot))[0]) for slot in range(self.slots))


class WorkerSlot:
    """One worker's place in the shared counters.

    Args:
        shared: of the master.
        number: of the slot.
    """

    def __init__(self, shared: SharedCounters, number: int) -> None:
        self.shared = shared
        self._number = number

    def publish(self, reading: Reading) -> bool:
        """Show this worker's numbers; False when they are too many."""
        return self.shared.publish(self._number, reading)

    def before(self) -> Reading:
        """Return what the worker showed last whose slot this was."""
        return self.shared.read(self._number)

    def others(self) -> list[Reading]:
        """Return what the other workers showed last."""
        return [self.shared.read(slot) for slot in range(self.shared.slots) if slot != self._number]
