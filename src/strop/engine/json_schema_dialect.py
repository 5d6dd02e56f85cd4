"""Older drafts of JSON Schema: what their keywords are called in draft 2020-12."""

import re
from typing import Any

_DIALECT = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09|draft/2020-12)/schema#?")
_LATEST = "draft/2020-12"


def dialect_of(schema_uri: Any) -> str | None:
    """The draft that a `$schema` names, such as "draft-07"; None if it is unknown here."""
    found = _DIALECT.fullmatch(schema_uri) if isinstance(schema_uri, str) else None
    return found and found[1]


def translated(schema: dict[str, Any], dialect: str | None) -> dict[str, Any]:
    """One schema, without those in it, as draft 2020-12 would write it."""
    if dialect in (None, _LATEST):
        return schema
    schema = dict(schema)
    if dialect == "draft-04":
        for bound in ("Minimum", "Maximum"):
            is_exclusive = schema.get(f"exclusive{bound}")
            if isinstance(is_exclusive, bool):
                del schema[f"exclusive{bound}"]
                if is_exclusive and bound.lower() in schema:
                    schema[f"exclusive{bound}"] = schema.pop(bound.lower())
    rest = schema.pop("additionalItems", None)
    if isinstance(schema.get("items"), list):  # else additionalItems says nothing
        schema["prefixItems"] = schema.pop("items")
        if rest is not None:
            schema["items"] = rest
    return schema


def ignored(schema: dict[str, Any], dialect: str | None) -> set[str]:
    """Keywords of one schema that draft 2020-12 heeds, and this one does not."""
    if dialect in (None, _LATEST, "draft/2019-09"):
        return set()
    return schema.keys() - {"$ref"} if "$ref" in schema else schema.keys() & {"unevaluatedProperties"}
