"""Our request fields in the server's OpenAPI schema, beside those of vLLM's own request models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from fsr_vllm.params import RequestFields
from fsr_vllm.server.fields import BUDGET_HEADER

# Ends of the paths whose bodies may hold images and whose images can be pruned.
_PATHS = (
    "/chat/completions",
    "/chat/completions/batch",
    "/responses",
    "/messages",
    "/count_tokens",
    "/render",
    "/tokenize",
)


def describe_fields(app: FastAPI) -> None:
    """Let `/openapi.json` show the fields: FastAPI lets an app's `openapi` be replaced."""
    stock = app.openapi

    def openapi() -> dict[str, Any]:
        known = app.openapi_schema is not None  # FastAPI makes the schema once
        schema = stock()
        if not known:
            _add(schema)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add(schema: dict[str, Any]) -> None:
    own = _inlined(RequestFields.model_json_schema())
    header = {
        "name": BUDGET_HEADER,
        "in": "header",
        "required": False,
        "schema": {"type": "string"},
        "description": "fsr_budget as text, for clients that can set headers alone.",
    }
    for path, operations in schema.get("paths", {}).items():
        post = operations.get("post")
        if post is None or not path.endswith(_PATHS):
            continue
        post.setdefault("parameters", []).append(header)
        content = post.get("requestBody", {}).get("content", {})
        for model in _models(schema, content.get("application/json", {}).get("schema", {})):
            model.setdefault("properties", {}).update(own)


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The properties of a schema, with what they refer to in place of the references."""
    known = schema.get("$defs", {})

    def put(value: Any) -> Any:  # noqa: ANN401 - any part of a JSON schema
        if isinstance(value, dict):
            name = value.get("$ref", "").rpartition("/")[2]
            return put(known[name]) if name else {key: put(part) for key, part in value.items()}
        return [put(part) for part in value] if isinstance(value, list) else value

    return {name: put(value) for name, value in schema["properties"].items()}


def _models(schema: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    """The models of a body: what it refers to, or several of which it is one."""
    if "$ref" in body:
        name = body["$ref"].rpartition("/")[2]
        return [schema["components"]["schemas"][name]]
    return [model for one in body.get("anyOf", ()) for model in _models(schema, one)]
