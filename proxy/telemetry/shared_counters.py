"""What the workers of one master tell each other: memory that they share, made by the master before it forks.

Each worker has a seat, and publishes its numbers there. Whoever is scraped adds up all seats. A worker that dies leaves
its last numbers; its replacement takes the seat over and goes on counting from them. So nothing shown goes back, there
are no files to clean up, and no worker waits for another.

A seat has two halves that are written in turn, each with its length and checksum: a worker killed while it writes
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
_SEAT = struct.Struct("<QQ")  # taken, turn
_HALF = struct.Struct("<II")  # length, checksum
_HALF_BYTES = 2 * 1024 * 1024  # pages that are never written take no memory
_SEAT_BYTES = _SEAT.size + 2 * _HALF_BYTES
_READS_MAX = 5  # of a half that was written anew meanwhile


class Board:
    """The memory.

    Args:
        seats: one for each worker.
    """

    def __init__(self, seats: int) -> None:
        self.seats = seats
        self._memory = mmap.mmap(-1, _HEAD_BYTES + seats * _SEAT_BYTES)

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

    def leave(self, seat: int) -> None:
        """Note that a worker died; the master alone does."""
        _WORD.pack_into(self._memory, _RESTARTS, self.restarts + 1)
        at = self._at(seat)
        _SEAT.pack_into(self._memory, at, 0, _SEAT.unpack_from(self._memory, at)[1])

    @staticmethod
    def _at(seat: int) -> int:
        return _HEAD_BYTES + seat * _SEAT_BYTES

    def publish(self, seat: int, reading: Reading) -> bool:
        """Show a worker's numbers; False when they are too many."""
        text = orjson.dumps(reading)
        if len(text) > _HALF_BYTES - _HALF.size:
            return False
        at = self._at(seat)
        turn = _SEAT.unpack_from(self._memory, at)[1] + 1
        half = at + _SEAT.size + turn % 2 * _HALF_BYTES
        _HALF.pack_into(self._memory, half, len(text), zlib.crc32(text))
        self._memory[half + _HALF.size : half + _HALF.size + len(text)] = text
        _SEAT.pack_into(self._memory, at, 1, turn)
        return True

    def read(self, seat: int) -> Reading:
        """Return what a worker showed last; of one that is gone, what it counted."""
        at = self._at(seat)
        for _ in range(_READS_MAX):
            taken, turn = _SEAT.unpack_from(self._memory, at)
            half = at + _SEAT.size + turn % 2 * _HALF_BYTES
            length, checksum = _HALF.unpack_from(self._memory, half)
            text = self._memory[half + _HALF.size : half + _HALF.size + length]
            if turn and zlib.crc32(text) == checksum:
                reading = Reading(**orjson.loads(text))
                return reading if taken else Reading(reading.counters, reading.histograms)
        return Reading()

    @property
    def taken(self) -> int:
        """How many workers live."""
        return sum(bool(_SEAT.unpack_from(self._memory, self._at(seat))[0]) for seat in range(self.seats))


class Seat:
    """One worker's place at the board.

    Args:
        board: of the master.
        number: of the seat.
    """

    def __init__(self, board: Board, number: int) -> None:
        self.board = board
        self._number = number

    def publish(self, reading: Reading) -> bool:
        """Show this worker's numbers; False when they are too many."""
        return self.board.publish(self._number, reading)

    def before(self) -> Reading:
        """Return what the worker showed last whose seat this was."""
        return self.board.read(self._number)

    def others(self) -> list[Reading]:
        """Return what the other workers showed last."""
        return [self.board.read(seat) for seat in range(self.board.seats) if seat != self._number]
