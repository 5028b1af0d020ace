"""How results are written: JSON with a record to a line, so that a diff shows which changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, data: Any) -> None:
    """Write `data`; an item of a list of objects, and an object without objects, get one line."""
    path.write_text(_lines(data, "") + "\n", encoding="utf-8")


def _lines(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        records = [deeper + _flat(item) for item in value]
        return "[\n" + ",\n".join(records) + f"\n{indent}]"
    if isinstance(value, dict) and any(_holds_objects(item) for item in value.values()):
        members = [f"{deeper}{_flat(str(k))}: {_lines(item, deeper)}" for k, item in value.items()]
        return "{\n" + ",\n".join(members) + f"\n{indent}}}"
    return _flat(value)


def _holds_objects(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return any(isinstance(item, dict) for item in items)


def _flat(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
