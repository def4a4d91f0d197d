"""The components of the document for what is answered, written by pydantic from the answers' types."""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from proxy.openapi.schemas import Schema

REFERENCE = "#/components/schemas/{model}"
_MODE: Literal["serialization"] = "serialization"
_SUFFIX = "Json"  # of the types' names, which are those of the components without it


class _Writer(GenerateJsonSchema):
    """Writes what may be null on one line, as ``"type": ["string", "null"]``, and no titles, which would repeat the names."""

    def normalize_name(self, name: str) -> str:
        """Return the component's name of a type's."""
        return super().normalize_name(name).removesuffix(_SUFFIX)

    def field_title_should_be_set(self, schema: object) -> bool:
        """Say that there are no titles."""
        del schema
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Schema:
        """Write what may be null."""
        whole = super().nullable_schema(schema)
        inner = next((item for item in whole.get("anyOf", ()) if item != {"type": "null"}), None)
        if inner is None or not isinstance(inner.get("type"), str):
            return whole
        if "enum" in inner:
            return {"enum": [*inner["enum"], None]}
        return {**inner, "type": [inner["type"], "null"]}


def write_answers(types: Iterable[Any]) -> tuple[dict[Any, Schema], dict[str, Schema]]:
    """Return a reference to each of these types, and the components that they lead to, by name."""
    wanted = [(kind, _MODE, TypeAdapter[Any](kind)) for kind in dict.fromkeys(types)]
    found, written = TypeAdapter.json_schemas(wanted, ref_template=REFERENCE, schema_generator=_Writer)
    components: dict[str, Schema] = written.get("$defs", {})
    for shape in components.values():
        shape.pop("title", None)
    return {kind: dict(reference) for (kind, _), reference in found.items()}, components
