"""What a handler answers, as its annotation says: mypy holds the handler to it, and the document shows it."""

from collections.abc import Awaitable, Callable
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from aiohttp import web

from proxy.http.typed_answer import CsvAnswer, JsonAnswer, TextAnswer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@cache
def answer_type_of(handler: Handler) -> Any:
    """Return the shape of a handler's good answer; None where it is never JSON.

    Raises:
        TypeError: its annotation does not say; it must be one of those of ``proxy/http/typed_answer.py``.
    """
    said = get_type_hints(handler, include_extras=True).get("return")
    kinds = get_args(said) if get_origin(said) in (Union, UnionType) else (said,)
    shapes = [_shape_of(kind, handler) for kind in kinds if kind not in (TextAnswer, CsvAnswer)]
    if len(shapes) > 1:
        raise TypeError(f"{handler.__name__} has {len(shapes)} shapes")
    return shapes[0] if shapes else None


def _shape_of(kind: Any, handler: Handler) -> Any:
    if get_origin(kind) is JsonAnswer:
        return get_args(kind)[0]
    if get_origin(kind) is Annotated and get_args(kind)[0] is web.StreamResponse:
        return get_args(kind)[1]
    raise TypeError(f"{handler.__name__} does not say what it answers: {kind}")
