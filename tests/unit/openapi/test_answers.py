"""What the document says of an answer is the type that mypy holds the answer's handler to."""

import inspect
import json
from typing import Annotated, Any, get_args, get_origin

import pytest
from aiohttp import web
from pydantic import TypeAdapter, ValidationError

from proxy.account.answers import WalletJson
from proxy.endpoints import ENDPOINTS
from proxy.http.typed_answer import CsvAnswer, JsonAnswer, TextAnswer
from proxy.openapi.answer_types import answer_type_of
from proxy.openapi.document import make_document
from proxy.openapi.endpoint import Endpoint
from proxy.operator.endpoints import ADMIN

EVERY = (*ENDPOINTS, *ADMIN)
DOCUMENT = make_document(EVERY)
NO_JSON = {"/metrics", "/v1/wallet/statements/{month}"}


def name_of(shape: Any) -> str:
    return str(shape.__name__).removesuffix("Json")


def published(item: Endpoint) -> dict[str, Any]:
    """By media type, what the document says of a good answer."""
    path = item.path.replace(":.+", "")
    content: dict[str, Any] = DOCUMENT["paths"][path][item.method.lower()]["responses"][str(item.status)][
        "content"
    ]
    return content


@pytest.mark.parametrize("item", EVERY, ids=lambda item: f"{item.method} {item.path}")
def test_an_endpoint_publishes_what_its_handler_returns(item: Endpoint) -> None:
    """The annotation is read here by itself, not by what the document is made with."""
    said = inspect.signature(item.handler).return_annotation
    kinds = get_args(said) if get_origin(said) not in (JsonAnswer, Annotated) and get_args(said) else (said,)
    shapes = [
        get_args(kind)[0 if get_origin(kind) is JsonAnswer else 1]
        for kind in kinds
        if kind not in (TextAnswer, CsvAnswer)
    ]
    content = published(item)
    if item.path in NO_JSON:
        assert not shapes
        assert content.keys() == set(item.also)
        return
    (shape,) = shapes
    media = "text/event-stream" if item.streams else "application/json"
    assert content[media]["schema"] == {"$ref": f"#/components/schemas/{name_of(shape)}"}
    assert content.keys() == {media, *item.also}


def test_a_component_has_the_members_of_its_type() -> None:
    shapes = [item.answer for item in EVERY if hasattr(item.answer, "__required_keys__")]
    assert len(set(map(name_of, shapes))) == len({id(shape) for shape in shapes}) > 40
    for shape in shapes:
        component = DOCUMENT["components"]["schemas"][name_of(shape)]
        assert set(component.get("required", [])) == shape.__required_keys__, shape
        assert component["properties"].keys() == shape.__required_keys__ | shape.__optional_keys__, shape
        assert component["description"], shape


async def says_nothing(request: web.Request) -> web.Response:
    return web.json_response({}, headers=request.headers)


async def says_two(request: web.Request) -> JsonAnswer[WalletJson] | JsonAnswer[dict[str, int]]:
    raise NotImplementedError(request)


def test_a_handler_that_does_not_say_what_it_answers_is_not_published() -> None:
    with pytest.raises(TypeError, match="does not say"):
        answer_type_of(says_nothing)
    with pytest.raises(TypeError, match="2 shapes"):
        answer_type_of(says_two)
    with pytest.raises(TypeError, match="says_nothing"):
        make_document((Endpoint("GET", "/x", says_nothing, "house"),))


def test_no_two_types_have_one_name() -> None:
    assert all("__" not in name and not name.endswith("Json") for name in DOCUMENT["components"]["schemas"])


def test_what_may_be_null_is_written_on_one_line() -> None:
    call = DOCUMENT["components"]["schemas"]["Call"]["properties"]
    assert call["charge"] == {
        "type": ["string", "null"],
        "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?$",
        "description": "Major units, exact.",
    }
    assert call["accuracy"] == {"enum": ["exact", "estimated", None]}
    assert call["id"]["format"] == "uuid"
    assert call["ended_at"] == {"type": ["string", "null"], "format": "date-time"}


def test_an_answer_is_written_as_aiohttp_writes_json() -> None:
    body = {"text": "größer", "none": None, "list": [1, True]}
    ours, theirs = JsonAnswer(body, status=201, headers={"x": "y"}), web.json_response(body)
    assert (ours.body, ours.content_type, ours.charset) == (theirs.body, "application/json", "utf-8")
    assert (ours.status, ours.headers["x"], ours.headers["Content-Type"]) == (
        201,
        "y",
        theirs.headers["Content-Type"],
    )
    assert isinstance(ours.body, bytes)
    assert json.loads(ours.body) == body


def test_the_types_are_good_to_check_answers_with() -> None:
    wallet = {
        "object": "wallet",
        "id": "0192f0c1-0000-7000-8000-000000000000",
        "currency": "USD",
        "posted": "1.5",
        "held": "0",
        "available": "1.5",
        "overdraft": "0",
        "status": "active",
    }
    TypeAdapter(WalletJson).validate_python(wallet)
    with pytest.raises(ValidationError):
        TypeAdapter(WalletJson).validate_python({**wallet, "posted": "1e3"})
