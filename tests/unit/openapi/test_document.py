"""The document says what is served, and nothing else."""

import json
import re
from typing import Any

from config.settings import load_settings
from proxy.app import init_app
from proxy.openapi.document import DOCUMENT


def document() -> tuple[Any, dict[str, Any]]:
    app = init_app(load_settings())
    return app, json.loads(app[DOCUMENT])


def test_every_route_is_in_the_document() -> None:
    app, shown = document()
    served = {
        (route.method.lower(), re.sub(r"{(\w+):[^}]*}", r"{\1}", route.resource.canonical))
        for route in app.router.routes()
        if route.method != "HEAD"
    }
    said = {(method, path) for path, methods in shown["paths"].items() for method in methods}
    assert said == served
    assert len(said) > 40


def test_every_reference_leads_somewhere() -> None:
    _, shown = document()
    text = json.dumps(shown)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= shown["components"]["schemas"].keys()
    assert {"Error", "KeyForm", "CapsForm", "NewKey"} <= references


def test_operations_have_names_and_words_of_their_own() -> None:
    _, shown = document()
    operations = [operation for methods in shown["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for operation in operations)


def test_what_needs_a_key_says_so() -> None:
    _, shown = document()
    for path, methods in shown["paths"].items():
        for operation in methods.values():
            wanted: list[dict[str, list[str]]] | None = (
                [{"operator": []}]
                if path.startswith("/admin")
                else [{"key": []}]
                if path.startswith(("/v1", "/api"))
                else None
            )
            assert operation.get("security") == wanted, path
