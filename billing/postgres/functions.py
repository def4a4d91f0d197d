"""The functions in Postgres: each stands in a ``.sql`` file of the room that calls it, ``billing/*/*.sql``.

They are applied as a whole: an *edition*, of which ``schema_functions`` keeps the digests. A program runs on its own
edition and on those that came after it; what a newer one needs of a signature is the matter of a numbered migration.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

_NAME = re.compile(r"^CREATE OR REPLACE FUNCTION (\w+)\(", re.MULTILINE)
# What a language says of a function's body when it is made, asked once all of them are there.
_VALIDATORS = {"sql": "fmgr_sql_validator", "plpgsql": "plpgsql_validator"}


@dataclass(frozen=True, slots=True)
class FunctionFile:
    """One file of functions, ``room/name.sql``; ``digest`` is the SHA-256 of its text."""

    name: str
    sql: str
    digest: str


@dataclass(frozen=True, slots=True)
class Edition:
    """Functions as they were applied; ``files`` are their digests by name."""

    edition: int
    number: int
    digest: str
    files: dict[str, str]


def load_functions() -> list[FunctionFile]:
    """Read this version's functions."""
    found = []
    for room in files("billing").iterdir():
        if room.is_dir():
            for entry in room.iterdir():
                if entry.name.endswith(".sql"):
                    text = entry.read_text(encoding="utf-8")
                    digest = hashlib.sha256(text.encode()).hexdigest()
                    found.append(FunctionFile(f"{room.name}/{entry.name}", text, digest))
    return sorted(found, key=lambda item: item.name)


def digest_of(functions: Sequence[FunctionFile]) -> str:
    """Return one digest of all files, by which a program asks for its functions."""
    lines = "".join(f"{item.digest} {item.name}\n" for item in functions)
    return hashlib.sha256(lines.encode()).hexdigest()


async def list_editions(connection: Any) -> list[Edition]:
    """Return what was applied, the oldest first; nothing on a schema that is older than ``schema_functions``."""
    if await connection.fetchval("SELECT to_regclass('schema_functions')") is None:
        return []
    rows = await connection.fetch(
        "SELECT edition, number, digest, files::text AS files FROM schema_functions ORDER BY edition"
    )
    return [Edition(row["edition"], row["number"], row["digest"], json.loads(row["files"])) for row in rows]


async def apply_functions(connection: Any, number: int, functions: Sequence[FunctionFile]) -> None:
    """Make the functions of those files that are not as they were applied last; inside a transaction.

    What others may do with them is lost by it: `apply_access` follows in the same transaction.

    Args:
        connection: of a user who may act as the owner.
        number: of the newest migration.
        functions: this version's.
    """
    editions = await list_editions(connection)
    last = editions[-1] if editions else Edition(0, 0, "", {})
    if (last.number, last.digest) == (number, digest_of(functions)):
        return
    # A function may call one of a file that comes later: bodies are checked when all of them are there.
    await connection.execute("SET LOCAL check_function_bodies = off")
    for item in functions:
        if last.files.get(item.name) != item.digest:
            await connection.execute(item.sql)
    await connection.execute("SET LOCAL check_function_bodies = on")
    names = sorted({name for item in functions for name in _NAME.findall(item.sql)})
    for language, validator in _VALIDATORS.items():
        await connection.execute(
            f"SELECT {validator}(p.oid) FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang"  # noqa: S608 - a name of ours
            " WHERE p.pronamespace = current_schema()::regnamespace AND l.lanname = $1 AND p.proname = ANY ($2)",
            language,
            names,
        )
    await connection.execute(
        "INSERT INTO schema_functions (edition, number, digest, files) VALUES ($1, $2, $3, $4::text::jsonb)",
        last.edition + 1,
        number,
        digest_of(functions),
        json.dumps({item.name: item.digest for item in functions}),
    )
