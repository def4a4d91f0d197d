"""The components of the document for what is answered, written by pydantic from the answers' types."""

from functools import cache
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema
from typing_extensions import TypedDict

from proxy.openapi.schemas import Schema

REFERENCE = "#/components/schemas/{model}"
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


@cache
def write_answers(types: tuple[Any, ...]) -> tuple[dict[Any, Schema], dict[str, Schema]]:
    """Return a reference to each of these types, and the components that they lead to, by name.

    They are the members of one type, so that pydantic looks at each once: it takes a fifth of a second, once a process.
    """
    together: Any = TypedDict("together", {str(place): kind for place, kind in enumerate(types)})  # type: ignore[misc]
    written = TypeAdapter[Any](together).json_schema(
        mode="serialization", ref_template=REFERENCE, schema_generator=_Writer
    )
    components: dict[str, Schema] = written["$defs"]
    for shape in components.values():
        shape.pop("title", None)
    return {kind: written["properties"][str(place)] for place, kind in enumerate(types)}, components
