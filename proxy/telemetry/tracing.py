"""Traces by OpenTelemetry, where its standard variables ask for them: one span per request, one below it per stage.

Its SDK reads its own variables (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER`` …).
It is imported only then, and needs ``tuma[otel]``. The stages are timed anyway (``billing/stages.py``): their spans are
made when the request is over, all but the provider's, whose id goes along to it.

Attributes are what ``request.completed`` has in the log: never prompts, answers, keys.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from billing.errors import InputError
from billing.stages import Stages
from config.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

_CLOSE_S = 10.0
_NOT_TOLD = frozenset(("user_id", "message", "stages_ms"))
_CARRIED = ("traceparent", "tracestate")


def open_tracing(settings: Settings) -> "Tracing | None":
    """Return what traces; None where nobody asked for it.

    Raises:
        InputError: it was asked for, and is not installed.
    """
    if not settings.tracing:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - costs much
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        raise InputError(
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, but OpenTelemetry is not installed: pip install 'tuma[otel]'"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "tuma"} if _unnamed() else {}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


def _unnamed() -> bool:
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

    return str(Resource.create().attributes.get("service.name", "")).startswith("unknown_service")


class Tracing:
    """Makes spans.

    Args:
        provider: of OpenTelemetry's SDK, with somewhere to send them.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("tuma")
        self.carrier = TraceContextTextMapPropagator()
        # Stages are timed by a clock that never goes back, spans by the time of day.
        self.offset_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self, headers: Mapping[str, str], stages: Stages) -> "Following":
        """Begin to follow a request, as part of its client's trace if it names one."""
        given = {name: headers[name] for name in _CARRIED if name in headers}
        parent = self.carrier.extract(given) if given else None
        root = self.tracer.start_span(
            "request", context=parent, kind=_kind("SERVER"), start_time=self.at_ns(stages.began_s)
        )
        return Following(self, root)

    def at_ns(self, moment_s: float) -> int:
        """Return a moment of ``time.perf_counter`` as time of day."""
        return int(moment_s * 1e9) + self.offset_ns

    def end(self, stages: Stages, facts: Mapping[str, Any]) -> None:
        """Make the spans of a request that is over."""
        if isinstance(stages.trace, Following):
            stages.trace.end(stages, facts)

    async def close(self) -> None:
        """Send what is left, within some seconds."""
        try:
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.to_thread(self._provider.shutdown)
        except TimeoutError:
            return  # traces are not money


class Following:
    """One request that is followed."""

    def __init__(self, tracing: Tracing, root: "Span") -> None:
        self._tracing = tracing
        self._root = root
        self._upstream: Span | None = None

    def begin_upstream(self) -> Mapping[str, str]:
        """Begin the provider's span; return the headers that make the provider's own trace a part of it."""
        self._upstream = self._tracing.tracer.start_span(
            "upstream", context=_within(self._root), kind=_kind("CLIENT")
        )
        headers: dict[str, str] = {}
        self._tracing.carrier.inject(headers, context=_within(self._upstream))
        return headers

    def end(self, stages: Stages, facts: Mapping[str, Any]) -> None:
        """Make the spans of the stages, and end all."""
        last_s = stages.began_s
        upstream_s = None
        for stage, began_s, ended_s in stages.spans:
            last_s = max(last_s, ended_s)
            if stage == "upstream" and self._upstream is not None:
                upstream_s = ended_s  # named twice: to the head of its answer, and to the first byte
                continue
            span = self._tracing.tracer.start_span(
                stage, context=_within(self._root), start_time=self._tracing.at_ns(began_s)
            )
            span.end(self._tracing.at_ns(ended_s))
        if self._upstream is not None:
            self._upstream.end(None if upstream_s is None else self._tracing.at_ns(upstream_s))
        self._root.update_name(f"{facts['method']} {facts['route']}")
        self._root.set_attributes(
            {
                f"tuma.{name}": value
                for name, value in facts.items()
                if value is not None and name not in _NOT_TOLD
            }
        )
        if facts["status"] >= 500:  # noqa: PLR2004 - HTTP
            self._root.set_status(_failed())
        self._root.end(max(self._tracing.at_ns(last_s), time.time_ns()))


def _within(span: "Span") -> Any:
    from opentelemetry.trace import set_span_in_context  # noqa: PLC0415 - only where it is installed

    return set_span_in_context(span)


def _kind(name: str) -> Any:
    from opentelemetry.trace import SpanKind  # noqa: PLC0415

    return SpanKind[name]


def _failed() -> Any:
    from opentelemetry.trace import StatusCode  # noqa: PLC0415

    return StatusCode.ERROR
