"""The OpenAPI 3.1 document, from the Structs that requests are decoded with and replies are made of."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
from msgspec import Struct

from strop.serve.openai.chat import ChatCompletion, ChatRequest
from strop.serve.openai.completions import Completion, CompletionRequest
from strop.serve.openai.embeddings import Embeddings, EmbeddingsRequest
from strop.serve.openai.errors import ErrorBody
from strop.serve.openai.exchange import Served
from strop.serve.openai.fields import Caps, fields_of
from strop.serve.openai.models import ModelCard, ModelList
from strop.serve.openai.response_items import MessageItem
from strop.serve.openai.responses import ResponseObject, ResponsesRequest
from strop.serve.openai.sampling import StructuredOutputs
from strop.serve.openai.tokenize import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest

_COMPONENTS = "#/components/schemas/"

Schema = dict[str, Any]

# Before OpenAPI 3.2 the schema of a stream is that of each event.
_EVENT: Schema = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"}},
    "required": ["data"],
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A route that takes a body."""

    path: str
    about: str
    request: type[Struct]
    reply: type[Struct]
    streams: bool = False


ENDPOINTS = (
    Endpoint("/v1/chat/completions", "answer a conversation", ChatRequest, ChatCompletion, True),
    Endpoint("/v1/completions", "go on with prompts", CompletionRequest, Completion, True),
    Endpoint("/v1/responses", "answer items; nothing is stored", ResponsesRequest, ResponseObject, True),
    Endpoint("/v1/embeddings", "vectors of texts", EmbeddingsRequest, Embeddings),
    Endpoint("/tokenize", "token ids of a text or a conversation", TokenizeRequest, TokenizeReply),
    Endpoint("/detokenize", "text of token ids", DetokenizeRequest, DetokenizeReply),
)


def openapi_document(served: Served, version: str, more_paths: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The document of a server with these names and caps; `more_paths` are path items of its other routes."""
    kinds = [kind for endpoint in ENDPOINTS for kind in (endpoint.request, endpoint.reply)]
    references, schemas = msgspec.json.schema_components(
        [*kinds, ModelList, ModelCard, ErrorBody], ref_template=_COMPONENTS + "{name}"
    )
    for endpoint in ENDPOINTS:
        schema = schemas[endpoint.request.__name__]
        _apply_caps(schema["properties"], endpoint.request, served.caps)
        _narrow(schema["properties"]["model"], "string", {"enum": list(served.names)})
    schemas[MessageItem.__name__]["required"].remove("type")
    for branch in _branches(schemas[ResponsesRequest.__name__]["properties"]["input"]):
        branch.get("items", {}).pop("discriminator", None)
    _exactly_one(schemas[TokenizeRequest.__name__], ["prompt", "messages"])
    _exactly_one(schemas[StructuredOutputs.__name__], list(schemas[StructuredOutputs.__name__]["properties"]))
    _say_alike(schemas[CompletionRequest.__name__]["properties"]["prompt"], served.caps.prompts)
    _say_alike(schemas[EmbeddingsRequest.__name__]["properties"]["input"], served.caps.inputs)
    if served.embedding_len is not None:
        limit = "maximum" if served.embeddings_may_be_cut else "const"
        _narrow(
            schemas[EmbeddingsRequest.__name__]["properties"]["dimensions"], "integer", {limit: served.embedding_len}
        )
    *pairs, model_list, model_card, error = references
    paths: dict[str, Any] = {
        endpoint.path: {"post": _operation(endpoint, pairs[2 * i], pairs[2 * i + 1])}
        for i, endpoint in enumerate(ENDPOINTS)
    }
    names = {"name": "model", "in": "path", "required": True, "schema": {"enum": list(served.names)}}
    paths["/v1/models"] = {"get": {"summary": "the names of the model", "responses": _responses(model_list)}}
    paths["/v1/models/{model}"] = {
        "get": {"summary": "one of them", "parameters": [names], "responses": _responses(model_card)}
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Strop", "version": version},
        "paths": paths | dict(more_paths or {}),
        "components": {
            "schemas": schemas,
            "responses": {"Error": {"description": "what is wrong", "content": _json(error)}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Endpoint, request: Schema, reply: Schema) -> dict[str, Any]:
    return {
        "summary": endpoint.about,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": _responses(reply, endpoint.streams),
    }


def _responses(reply: Schema, streams: bool = False) -> dict[str, Any]:
    content = _json(reply)
    if streams:
        content["text/event-stream"] = {"schema": _EVENT}
    error = {"$ref": "#/components/responses/Error"}
    return {"200": {"description": "done", "content": content}, "4XX": error, "5XX": error}


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _apply_caps(properties: Schema, kind: type[Struct], caps: Caps) -> None:
    """Say the limits that numbers and lengths have beside those of their types."""
    limits = asdict(caps)
    for name, rule in fields_of(kind).rules.items():
        if name in properties and rule.cap is not None and not rule.cap.endswith("_bytes"):
            for type_name, keyword in (("integer", "maximum"), ("array", "maxItems"), ("object", "maxProperties")):
                _narrow(properties[name], type_name, {keyword: limits[rule.cap]})


def _narrow(schema: Schema, kind: str, keywords: Schema) -> None:
    """Put `keywords` on those alternatives of `schema` that are of type `kind`."""
    for branch in _branches(schema):
        if branch.get("type") == kind:
            branch |= keywords


def _branches(schema: Schema) -> Iterator[Schema]:
    """The alternatives of a schema, or itself."""
    if "anyOf" not in schema:
        yield schema
    for branch in schema.get("anyOf", ()):
        yield from _branches(branch)


def _exactly_one(schema: Schema, names: list[str]) -> None:
    """One of these properties is given."""
    schema["oneOf"] = [{"required": [name], "properties": {name: {"not": {"enum": [None, False]}}}} for name in names]


def _say_alike(schema: Schema, limit: int) -> None:
    """A list is of texts, of ids or of lists of ids, never mixed; one of ids is a single prompt."""
    branches = []
    for branch in _branches(schema):
        if branch.get("type") != "array":
            branches.append(branch)
            continue
        for item in _branches(branch["items"]):
            length = {} if item.get("type") == "integer" else {"maxItems": limit}
            branches.append({**branch, "items": item, **length})
    schema["anyOf"] = branches
