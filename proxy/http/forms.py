"""What self-service paths are sent: JSON forms, checked by pydantic, amounts exact."""

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from billing.errors import InputError
from billing.money import AMOUNT_MAX_NANO, NANO, parse_amount
from config.settings import LimitSettings
from proxy.http.body import read_body
from proxy.http.errors import BadRequestError

_Form = TypeVar("_Form", bound=BaseModel)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_AMOUNT = re.compile(r"[0-9]{1,10}(\.[0-9]{1,9})?", re.ASCII)


def _read_amount(value: object) -> int:
    """Read an amount in major units into nano units: a string, or a whole number; another number was a float somewhere."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("give an amount in major units as a string, as '12.50'")  # noqa: TRY004 - pydantic reads ValueError
    text = str(value)
    if not _AMOUNT.fullmatch(text):
        raise ValueError("the amount must have at most ten digits and nine decimals, as '12.50'")
    try:
        amount_nano = parse_amount(text)
    except InputError as error:
        raise ValueError(str(error)) from None
    return amount_nano


Amount = Annotated[
    int,
    BeforeValidator(_read_amount),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{_AMOUNT.pattern}$"},
                {"type": "integer", "minimum": 0, "maximum": AMOUNT_MAX_NANO // NANO},
            ],
            "examples": ["12.50"],
            "description": "Major units: a string, or a whole number; not a number with decimals.",
        }
    ),
]


def _only_text(value: object) -> object:
    """Let pydantic read a text; from a number it would make a moment since 1970, or an address."""
    if value is not None and (not isinstance(value, str) or value.strip("-+. ").isnumeric()):
        raise ValueError("give it as a text")
    return value


def _only_number(value: object) -> object:
    """Let through what is a number in JSON, as the number that pydantic expects."""
    if value is None or (isinstance(value, int | Decimal) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise ValueError("give it as a number")


_Limit = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
_Count = Annotated[int, Field(gt=0, lt=2**40, strict=True)]


class Form(BaseModel):
    """A JSON object with known members only."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


async def read_form(request: web.Request, form: type[_Form], limits: LimitSettings) -> _Form:
    """Read and check a form; an empty body is an empty form.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: nothing was changed.
    """
    return check_form(await read_fields(request, limits), form)


async def read_fields(request: web.Request, limits: LimitSettings) -> object:
    """Read the JSON of a form, of whichever kind; an empty body is an empty object.

    Raises:
        BodyTooLargeError, BodyTimeoutError, BadRequestError: it is none.
    """
    body = await read_body(request, limits.model_copy(update={"body_bytes": limits.form_bytes}))
    try:
        return json.loads(
            body or b"{}", parse_float=Decimal, parse_constant=_refuse, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"The body is not a valid JSON object: {str(error)[:200]}") from None


def check_form(fields: object, form: type[_Form]) -> _Form:
    """Check the fields of a form.

    Raises:
        BadRequestError: they do not fit; it names the first.
    """
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:200] or None
        raise BadRequestError(f"{name or 'The body'}: {first['msg']}", param=name) from None


def read_query(request: web.Request, name: str) -> str | None:
    """Return a parameter of the query; None when it is not there.

    Raises:
        BadRequestError: it is there twice: somebody else may read the other.
    """
    given = request.query.getall(name, [])
    if len(given) > 1:
        raise BadRequestError(f"'{name}' is there {len(given)} times.", param=name)
    return given[0] if given else None


def read_flag(request: web.Request, name: str) -> bool:
    """Read a flag of the query; False when it is not there.

    Raises:
        BadRequestError: it is neither true nor false.
    """
    given = read_query(request, name)
    found = {None: False, "true": True, "1": True, "false": False, "0": False}.get(given and given.lower())
    if found is None:
        raise BadRequestError(f"'{name}' must be true or false.", param=name)
    return found


def read_limit(request: web.Request, *, most: int, usual: int | None = None) -> int:
    """Read how long a page shall be; without one, as long as usual: the longest, if nothing else is.

    Raises:
        BadRequestError: it is no number from 1 to ``most``.
    """
    text = read_query(request, "limit")
    if text is None:
        return most if usual is None else usual
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))) or not 1 <= int(text) <= most:
        raise BadRequestError(f"'limit' must be a whole number from 1 to {most}.", param="limit")
    return int(text)


def read_moment(request: web.Request, name: str) -> datetime | None:
    """Read a moment of the query, in UTC where it names no zone; None when it is not there.

    What is before 1970 is 1970: ids count from there.

    Raises:
        BadRequestError: it is none.
    """
    text = read_query(request, name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
        return max(moment, _EPOCH)
    except (ValueError, OverflowError):
        raise BadRequestError(f"'{name}' must be a moment as 2027-01-31T00:00:00Z.", param=name) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is named twice")
    return found
