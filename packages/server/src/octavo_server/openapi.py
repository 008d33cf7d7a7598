"""The OpenAPI document of an app: its own routes, each with the schemas of what it takes and answers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from octavo_server.operations import OPERATIONS, Operation

_SCHEMAS = "#/components/schemas/{model}"

_EVENTS = "text/event-stream"
_EVENT = {
    "description": "One server-sent event. Its data is JSON, or [DONE] at the end of a stream of OpenAI's form.",
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}

References = dict[type[BaseModel], dict[str, Any]]


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of an app.

    The framework knows the routes and what their paths hold; what they take and answer is in `OPERATIONS`.

    Raises:
        KeyError: if a route is not there.
    """
    references, definitions = _schemas()
    paths: dict[str, dict[str, Any]] = {
        path: {
            method: _described(OPERATIONS[method.upper(), path], known, references) for method, known in methods.items()
        }
        for path, methods in app.openapi()["paths"].items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Octavo", "version": version("octavo-server")},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _schemas() -> tuple[References, dict[str, Any]]:
    models = {
        model for own in OPERATIONS.values() for model in (own.body, own.answer, own.error) if isinstance(model, type)
    }
    ordered = sorted(models, key=lambda model: model.__name__)
    references, schema = models_json_schema([(model, "validation") for model in ordered], ref_template=_SCHEMAS)
    return {model: references[model, "validation"] for model in ordered}, schema["$defs"]


def _described(operation: Operation, known: dict[str, Any], references: References) -> dict[str, Any]:
    error = _content("application/json", references[operation.error])
    described: dict[str, Any] = {
        "summary": known["description"].partition("\n")[0],
        "operationId": known["operationId"],
        "responses": {
            "200": {"description": "The answer.", "content": _answers(operation, references)},
            "4XX": {"description": "The caller's mistake, or a limit.", "content": error},
            "5XX": {"description": "The server cannot answer, now or at all.", "content": error},
        },
    }
    of_query = [{"name": name, "in": "query", "schema": schema} for name, schema in operation.query.items()]
    if parameters := known.get("parameters", []) + of_query:
        described["parameters"] = parameters
    if operation.body is not None:
        form = isinstance(operation.body, dict)
        schema = operation.body if isinstance(operation.body, dict) else references[operation.body]
        content = _content("multipart/form-data" if form else "application/json", schema)
        described["requestBody"] = {"required": True, "content": content}
    return described


def _answers(operation: Operation, references: References) -> dict[str, Any]:
    if operation.answer == _EVENTS:
        return _content(_EVENTS, _EVENT)
    if isinstance(operation.answer, str):
        return _content(operation.answer, {"type": "string"})
    content = _content("application/json", references[operation.answer])
    return content | _content(_EVENTS, _EVENT) if operation.streams else content


def _content(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {media_type: {"schema": schema}}
