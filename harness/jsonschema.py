"""The JSON Schema of config files, for editors (`harness schema`). Not used for checking: `resolve.py` does that.

It describes a file, which need not be whole (a base, a site file, overrides on the command line): nothing is required,
`null` resets a field, `base` names other files and `${env:NAME}` may stand for any value.

>>> schema()["properties"]["base"]["description"][:11]
'Config file'
"""

from __future__ import annotations

from typing import Any

from harness.config import Config

_REFERENCE = {"type": "string", "pattern": r"\$\{env:[A-Za-z_][A-Za-z0-9_]*(:-[^{}]*)?\}"}
_KEPT_OUTSIDE = ("description", "title", "default")


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a config file."""
    made = Config.model_json_schema()
    for section in (made, *made["$defs"].values()):
        section.pop("required", None)
        section["properties"] = {name: _relaxed(field, made["$defs"]) for name, field in section["properties"].items()}
    path = {"type": "string", "minLength": 1}
    base = {
        "description": "Config file, or list of them, whose values hold where this file has none; paths from here.",
        "anyOf": [path, {"type": "array", "items": path}],
    }
    made["properties"] = {"base": base, **made["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _relaxed(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    outside = {key: field[key] for key in _KEPT_OUTSIDE if key in field}
    inside = {key: value for key, value in field.items() if key not in _KEPT_OUTSIDE}
    branches = inside.pop("anyOf", []) or [inside]
    if {"type": "null"} not in branches:
        branches = [*branches, {"type": "null"}]
    sections = [branch["$ref"].rpartition("/")[2] for branch in branches if "$ref" in branch]
    if sections:  # what a section is for stands in its definition; editors look for it at the key
        return {"description": definitions[sections[0]]["description"], **outside, "anyOf": branches}
    return {**outside, "anyOf": [*branches, _REFERENCE]}
