"""The page of all attributes of the components: `python -m pg_exports_tests.attributes_page` writes `docs/attributes.md`.

Everything on it is read from the components: a description, type or default is changed there.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import BaseModel

import pg_exports
from pg_exports.scaffold import as_yaml, properties

PAGE = Path(__file__).parent.parent / "docs" / "attributes.md"

_INTRODUCTION = """# Attributes

What may stand under `attributes` in a `defs.yaml`, and be given to the class of the same name in Python.
`make docs` writes this page from the code.
"""

_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true`, `false`", "null": ""}


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The page as it is to be."""
    exported = (getattr(pg_exports, name) for name in sorted(pg_exports.__all__))
    components = [one for one in exported if inspect.isclass(one) and issubclass(one, dg.Component)]
    return "\n".join([_INTRODUCTION, *(line for component in components for line in _component(component))])


def _component(component: type[dg.Component]) -> Iterator[str]:
    assert issubclass(component, BaseModel)
    schema = component.model_json_schema(by_alias=True)
    yield from _table(f"## pg_exports.{component.__name__}", schema | {"properties": properties(component)})
    for name, nested in sorted(schema.get("$defs", {}).items()):
        if "properties" in nested:
            yield from _table(f"### {name}", nested)


def _table(heading: str, schema: Mapping[str, Any]) -> Iterator[str]:
    said = schema.get("description", "")
    yield f"{heading}\n"
    yield " ".join(said.partition("\n\n")[0].split()) + "\n"
    yield "| attribute | values | default | |"
    yield "| --- | --- | --- | --- |"
    required = schema.get("required", [])
    in_docstring = _described(said)
    for name, attribute in sorted(schema["properties"].items(), key=lambda item: item[0] not in required):
        default = "required" if name in required else _code(as_yaml(attribute.get("default")))
        description = attribute.get("description") or in_docstring.get(name, "")
        cells = (f"`{name}`", _values(attribute), default, description)
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    yield ""


def _described(docstring: str) -> dict[str, str]:
    """The descriptions under `Attributes:`, by the attributes' names."""
    listed = docstring.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", listed, re.MULTILINE)
    described = {name: text for names, text in entries for name in names.split(", ")}
    return {name: text[:1].upper() + text[1:] for name, text in described.items()}


def _values(attribute: Mapping[str, Any]) -> str:
    if "$ref" in attribute:
        name = attribute["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in attribute or "oneOf" in attribute:
        kinds = (_values(kind) for kind in attribute.get("anyOf") or attribute["oneOf"])
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind))
    if "enum" in attribute or "const" in attribute:
        return ", ".join(_code(as_yaml(value)) for value in attribute.get("enum") or [attribute["const"]])
    if attribute.get("type") == "array":
        return f"list of {_values(attribute.get('items', {}))}".removesuffix(" of ")
    if attribute.get("type") == "object":
        values = attribute.get("additionalProperties")
        return f"mapping to {_values(values)}" if isinstance(values, Mapping) else "mapping"
    return {"date": "date", "date-time": "datetime"}.get(attribute.get("format", "")) or _TYPES.get(
        attribute.get("type", ""), ""
    )


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    main()
