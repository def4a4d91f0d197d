"""Private attributes of aiohttp and redis-py that the product uses: a release that drops one fails here, by its name.

asyncpg is used by its public names alone; of those one is overridden, and is listed, as without it nothing would be heard.
"""

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiohttp import web, web_protocol
from packaging.requirements import Requirement
from redis.asyncio.connection import AbstractConnection

from proxy.http import connection, fast_answer
from tests.support.paths import ROOT

_CONNECTION = "proxy/http/connection.py"
_ANSWER = "proxy/http/fast_answer.py"
_FACTS = "proxy/http/request_facts.py"
_HEAD = "proxy/http/request_head.py"

USES: list[tuple[str, Any, str, tuple[str, ...]]] = [
    ("aiohttp", web.Request, "_message", (_ANSWER, _HEAD)),
    ("aiohttp", web.Request, "_state", (_FACTS,)),
    ("aiohttp", web.Application, "_set_loop", (_CONNECTION,)),
    ("aiohttp", web.Application, "_make_request", (_CONNECTION,)),
    ("aiohttp", web.Application, "_handle", (_CONNECTION,)),
    ("aiohttp", web.AppRunner, "_app", (_CONNECTION,)),
    ("aiohttp", web.AppRunner, "_kwargs", (_CONNECTION,)),
    ("aiohttp", web.AppRunner, "_make_server", (_CONNECTION,)),
    ("aiohttp", web.Server, "_kwargs", (_CONNECTION,)),
    ("aiohttp", web.Server, "_loop", (_CONNECTION,)),
    ("aiohttp", web_protocol, "_ErrInfo", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_buffer_paused", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_current_request", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_messages", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_reading_paused", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_request_count", (_CONNECTION,)),
    ("aiohttp", web_protocol.RequestHandler, "_waiter", (_CONNECTION,)),
    ("aiohttp", web.Response, "_body", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_body_length", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_eof_sent", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_headers", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_keep_alive", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_payload_writer", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_reason", (_ANSWER,)),
    ("aiohttp", web.StreamResponse, "_status", (_ANSWER,)),
    ("redis", AbstractConnection, "_writer", ("billing/redis/connection.py",)),
    ("redis", importlib.import_module("redis._parsers.base"), "BaseParser", ("billing/redis/connection.py",)),
    ("asyncpg", asyncpg.Connection, "get_reset_query", ("billing/postgres/database.py",)),
]
# Our classes that inherit from the library's: what they say of themselves may be the library's.
HEIRS = (
    (connection.ClientProtocol, web_protocol.RequestHandler),
    (connection.ClientServer, web.Server),
    (connection.ClientRunner, web.AppRunner),
    (fast_answer._Lean, web.StreamResponse),
    (fast_answer._LeanAnswer, web.Response),
    (fast_answer._LeanStream, web.StreamResponse),
)


def has(owner: Any, name: str) -> bool:
    """Whether it is there: by itself, or set by a class on what it makes."""
    if hasattr(owner, name):
        return True
    mro = inspect.getmro(owner) if isinstance(owner, type) else ()
    bases = [base for base in mro if base.__module__.partition(".")[0] in ("aiohttp", "redis", "asyncpg")]
    return any(re.search(rf"\bself\.{name}\b.*=[^=]", inspect.getsource(base)) for base in bases)


def sources() -> list[Path]:
    return [
        path for room in ("proxy", "billing", "scripts", "config") for path in (ROOT / room).rglob("*.py")
    ]


@pytest.mark.parametrize(("library", "owner", "name", "files"), USES, ids=lambda one: str(one)[:40])
def test_each_is_still_there(library: str, owner: Any, name: str, files: tuple[str, ...]) -> None:
    assert has(owner, name), f"{library} has no {owner.__name__}.{name} any more: {', '.join(files)} uses it"
    for file in files:
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (
            f"{file} no longer uses {name}: strike it"
        )


def test_what_is_gone_is_noticed() -> None:
    assert not has(web.Request, "_gone")
    assert not has(AbstractConnection, "_gone")
    assert not has(web_protocol, "_Gone")


def test_no_other_object_is_looked_into() -> None:
    """Attributes with an underscore of anything but ``self``, ``cls`` and modules' own: each is in the list."""
    listed = {(file, name) for _, _, name, files in USES for file in files}
    own = {(str(path.relative_to(ROOT)), "_exit") for path in sources()}  # os._exit is documented
    found = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                of_super = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
                if not of_itself and not of_super:
                    found.add((str(path.relative_to(ROOT)), node.attr))
    assert found - listed - own == set()


@pytest.mark.parametrize(("heir", "base"), HEIRS, ids=lambda one: one.__name__)
def test_no_other_attribute_is_inherited(heir: type, base: type) -> None:
    said = set(re.findall(r"(?:\bself\.|\bdef |^ {4})(_[a-z]\w*)", inspect.getsource(heir), re.MULTILINE))
    inherited = {name for name in said if has(base, name)}
    ours = {"_server"} if heir is connection.ClientProtocol else set()  # which the library calls _manager
    assert inherited - ours <= {name for _, _, name, _ in USES}


def test_the_libraries_have_upper_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for library in ("aiohttp", "redis", "asyncpg"):
        assert any(part.operator == "<" for part in bounds[library]), library
