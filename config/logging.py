"""Logs: structlog to stderr, JSON for machines or lines for people. Never prompts, answers or keys."""

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, get_args

import orjson
import structlog

from config.secrets import Redactor
from config.settings import LogLevel, LogSettings

LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
_NUMBERS: dict[str, int] = {name: logging.getLevelNamesMapping()[name.upper()] for name in LEVELS}


class _LevelGate:
    """Drops what is below a level that can be changed: loggers are cached, the gate they go through is one object."""

    def __init__(self, level: LogLevel) -> None:
        self.level = level
        self._number = _NUMBERS[level]

    def set(self, level: LogLevel) -> None:
        self.level = level
        self._number = _NUMBERS[level]

    def __call__(self, _logger: object, method: str, event: Any) -> Any:
        if _NUMBERS.get(method, logging.ERROR) < self._number:
            raise structlog.DropEvent
        return event


def configure_logging(settings: LogSettings, *, hide: Iterable[str] = ()) -> None:
    """Set up logging for the process, once, at start.

    Args:
        settings: level and format.
        hide: secrets that no line may show, whatever an exception's text says.
    """
    redact = Redactor(hide)

    def redact_line(_logger: object, _method: str, line: str) -> str:
        return redact(line)

    for_machines = settings.format == "json"
    structlog.configure(
        processors=[
            _LevelGate(settings.level),
            *([_LineForMachines()] if for_machines else _for_people()),
            redact_line,  # type: ignore[list-item]  # behind the renderer there is a line, no longer an event
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(redact))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def change_level(level: LogLevel) -> LogLevel | None:
    """Change the level of this process's logs at once; return the one before, None where logging was not set up."""
    for processor in structlog.get_config()["processors"]:
        if isinstance(processor, _LevelGate):
            before = processor.level
            processor.set(level)
            return before
    return None


class _LineForMachines:
    """Writes an event as one line of JSON, with its level, the time, and the process: one step, as each request is told."""

    def __init__(self) -> None:
        self._add_stack = structlog.processors.StackInfoRenderer()

    def __call__(self, logger: Any, method: str, event: Any) -> str:
        if "exc_info" in event:
            event = structlog.processors.format_exc_info(logger, method, event)
        if "stack_info" in event:
            event = self._add_stack(logger, method, event)
        event["level"] = method
        event["timestamp"] = f"{datetime.now(UTC).isoformat(timespec='microseconds')[:-6]}Z"
        event["pid"] = os.getpid()
        try:
            return orjson.dumps(event, default=repr).decode()
        except orjson.JSONEncodeError:  # an integer of more than 64 bits, half a surrogate
            return json.dumps(event, default=repr)


def _for_people() -> list[structlog.typing.Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        _shorten,
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            sort_keys=False,
            pad_event_to=20,
            exception_formatter=structlog.dev.plain_traceback,  # rich's shows the values of variables
        ),
    ]


def _shorten(_logger: object, _method: str, event: Any) -> Any:
    """Show the time of day, leave out what is not there, and write the stages in a row."""
    short = {name: value for name, value in event.items() if value is not None}
    stages = short.pop("stages_ms", None)
    if isinstance(stages, dict):
        short["stages"] = " ".join(f"{stage} {spent:g}" for stage, spent in stages.items())
    short["timestamp"] = f"{datetime.now().astimezone():%H:%M:%S}"
    return short


class _RedactingFormatter(logging.Formatter):
    """For what libraries log."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__("%(name)s: %(message)s")
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))
