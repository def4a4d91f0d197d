"""Tables for spreadsheets: CSV (RFC 4180), in which no text is taken for a formula."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from aiohttp import web

from proxy.http.errors import BadRequestError
from proxy.http.forms import read_query
from proxy.http.request_facts import late_headers
from proxy.http.typed_answer import CsvAnswer

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def read_format(request: web.Request, allowed: Sequence[str]) -> str:
    """Return which format is wanted by ``format``, or by an ``Accept`` that begins with CSV; without a word, the first allowed.

    Raises:
        BadRequestError: another one is asked for.
    """
    named = read_query(request, "format")
    if named is not None and named not in allowed:
        raise BadRequestError(f"'format' must be {' or '.join(allowed)}.", param="format")
    accepted = request.headers.get("Accept", "").partition(",")[0].strip()
    return named or ("csv" if accepted == "text/csv" and "csv" in allowed else allowed[0])


def write_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], texts: Sequence[str]) -> bytes:
    """Write rows as CSV; a text of others, in ``texts``, that a spreadsheet would take for a formula gets an apostrophe before it."""
    written = io.StringIO()
    writer = csv.writer(written)
    for row in rows:
        cells = ["" if row[column] is None else str(row[column]) for column in columns]
        writer.writerow(
            f"'{cell}" if column in texts and cell.startswith(_FORMULA) else cell
            for column, cell in zip(columns, cells, strict=True)
        )
    return written.getvalue().encode()


async def begin_csv(
    request: web.Request, name: str, columns: Sequence[str], *, as_of: datetime | None = None
) -> CsvAnswer:
    """Begin an answer that is a file of CSV, with its first line; rows follow by ``write``."""
    headers = {
        **late_headers(request, as_of),
        "Content-Disposition": f'attachment; filename="tuma-{name}.csv"',
    }
    response = CsvAnswer(headers=headers)
    response.content_type, response.charset = "text/csv", "utf-8"
    await response.prepare(request)
    await response.write(write_csv([dict(zip(columns, columns, strict=True))], columns, ()))
    return response
