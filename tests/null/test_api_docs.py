"""docs/api.md is what scripts/api_docs.py writes, and the OpenAPI document says what the parsers do."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from openai_exchanges import served

from strop.serve.app import OTHER_PATHS, Routes
from strop.serve.openai.fields import Caps, rule_of
from strop.serve.openai.openapi import ENDPOINTS, openapi_document
from strop.serve.page import PATHS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "api_docs.py"


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("api_docs", SCRIPT)
    assert spec is not None and spec.loader is not None
    api_docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api_docs)
    assert "| `best_of` | **refused** |" in api_docs.render()
    assert api_docs.TARGET.read_text(encoding="utf-8") == api_docs.render(), "out of date: run `make docs`"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_every_field_says_what_becomes_of_it(endpoint: Any) -> None:
    for info in msgspec.structs.fields(endpoint.request):
        rule = rule_of(info.type)
        assert rule is not None, info.name
        assert (rule.kind == "refused") == (msgspec.inspect.type_info(info.type) == msgspec.inspect.NoneType()) or (
            rule.kind == "refused"
        )
        assert rule.cap is None or hasattr(Caps(), rule.cap)
    assert endpoint.request.__struct_config__.forbid_unknown_fields


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref":
                yield item
            else:
                yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def test_the_openapi_document() -> None:
    document = json.loads(json.dumps(openapi_document(served(caps=Caps(n=7, prompts=5)), "1.0", {"/livez": {}})))
    for reference in references(document):
        place = document
        for step in reference.removeprefix("#/").split("/"):
            place = place[step]
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/{model}", "/livez"} <= set(document["paths"])
    schemas = document["components"]["schemas"]
    chat = schemas["ChatRequest"]
    assert chat["required"] == ["model", "messages"] and chat["additionalProperties"] is False
    assert chat["properties"]["model"]["enum"] == ["tiny", "org/tiny"]
    assert chat["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 7}
    assert chat["properties"]["best_of"]["type"] == "null"
    assert set(chat["properties"]["store"]["enum"]) == {False, None}
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]
    assert [(form["type"], form.get("items", {}).get("type"), form.get("maxItems")) for form in prompt] == [
        ("string", None, None),
        ("array", "string", 5),
        ("array", "integer", None),
        ("array", "array", 5),
    ]
    post = document["paths"]["/v1/responses"]["post"]
    assert set(post["responses"]) == {"200", "4XX", "5XX"}
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}


def test_every_route_is_in_the_document() -> None:
    routes = {route.path_format for route in Routes(Mock()).table()}
    page_files = {path for path in PATHS if path.startswith("/web/")}
    assert set(openapi_document(served(), "1.0", OTHER_PATHS)["paths"]) == routes - page_files
