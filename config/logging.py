"""Logs: structlog to stderr, JSON for machines or lines for people. Never prompts, answers or keys."""

import logging
import sys
from collections.abc import Iterable

import structlog

from config.secrets import Redactor
from config.settings import LogSettings


def configure_logging(settings: LogSettings, *, hide: Iterable[str] = ()) -> None:
    """Set up logging for the process, once, at start.

    Args:
        settings: level and format.
        hide: secrets that no line may show, whatever an exception's text says.
    """
    level = logging.getLevelName(settings.level.upper())
    redact = Redactor(hide)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,  # rich's shows the values of variables
        )
    )

    def redact_line(_logger: object, _method: str, line: str) -> str:
        return redact(line)

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
            redact_line,  # type: ignore[list-item]  # behind the renderer there is a line, no longer an event
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_RedactingFormatter(redact))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class _RedactingFormatter(logging.Formatter):
    """For what libraries log."""

    def __init__(self, redact: Redactor) -> None:
        super().__init__("%(name)s: %(message)s")
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))
