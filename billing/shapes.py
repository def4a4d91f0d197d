"""What texts and numbers of answers look like, for the document at ``/openapi.json``.

To mypy they are ``str`` and ``int``; the document says the rest. A TypedDict of members like these is named after its
component of the document, with ``Json`` behind it.
"""

from typing import Annotated

from pydantic import Field

Amount = Annotated[str, Field(pattern=r"^-?[0-9]+(\.[0-9]{1,9})?$", description="Major units, exact.")]
Price = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?$", description="USD, exact.")]
PriceOfOne = Annotated[Price, Field(description="USD, for one.")]
Rate = Annotated[Price, Field(description="Units of the currency for one USD.")]
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Id = Annotated[str, Field(json_schema_extra={"format": "uuid"})]
Count = Annotated[int, Field(ge=0)]
