"""Every field of a request is honoured or refused by name, and no bytes make a server fail."""

import functools
import json
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_exchanges import CHAT, USER, WEATHER, ScriptedTools, body, served

from strop.core.errors import CapacityError, RequestError, StropError
from strop.serve.openai import chat, completions, embeddings, responses, tokenize
from strop.serve.openai.errors import ApiError, as_api_error, error_body
from strop.serve.openai.fields import Caps, fields_of
from strop.serve.openai.openapi import ENDPOINTS, openapi_document

COMPLETION = {"model": "tiny", "prompt": "Hello"}
RESPONSE = {"model": "tiny", "input": "Hello"}
SERVED = served(tools=ScriptedTools(), embedding_len=8, chat_template="{{ reasoning_effort }}")


def parse_chat(*parts: dict[str, Any], **more: Any) -> chat.ChatExchange:
    return chat.parse(body(CHAT, *parts, more), SERVED, request_id="x", created_s=5)


def refusal(*parts: dict[str, Any], **more: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(*parts, **more)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


@pytest.mark.parametrize(
    ("field", "value", "param", "said"),
    [
        ("max_token", 5, "max_token", 'unknown field: "max_token": did you mean max_tokens?'),
        ("best_of", 2, "best_of", "best_of is not supported: every answer is generated once: use n; leave it out"),
        ("audio", {"voice": "a"}, "audio", "text only"),
        ("store", True, "store", "store=true is not supported (nothing is stored): accepted are false"),
        ("service_tier", "flex", "service_tier", 'accepted are "auto", "default"'),
        ("modalities", ["text", "audio"], "modalities[1]", 'modalities[1]: expected "text", got "audio"'),
        ("temperature", -1, "temperature", "temperature: expected `float` >= 0.0, got -1"),
        ("temperature", "hot", "temperature", "expected `float | null`, got"),
        ("n", 33, "n", "n is 33: this server's limit is 32"),
        ("n", 0, "n", ">= 1"),
        ("n", 1.5, "n", "float"),
        ("n", True, "n", "bool"),
        ("stop", ["a"] * 17, "stop", "stop has 17 entries: this server's limit is 16"),
        ("stop", "", "stop", "length >= 1"),
        ("stop", ["a", ""], "stop[1]", "length >= 1"),
        ("logit_bias", {"a": 1}, "logit_bias", "a key of logit_bias"),
        ("logit_bias", {"5": 101}, "logit_bias[...]", "<= 100.0"),
        ("seed", 2**63, "seed", "seed"),
        ("top_logprobs", 5, "top_logprobs", "logprobs=true"),
        ("top_logprobs", 21, "top_logprobs", "<= 20"),
        ("reasoning_effort", "huge", "reasoning_effort", 'expected "none", "minimal"'),
        ("stream_options", {"include_usage": True}, "stream_options", "stream=true"),
        ("stream_options", {"include_usage": True, "x": 1}, "stream_options.x", "unknown field in stream_options"),
        ("response_format", {"type": "yaml"}, "response_format.type", '"text", "json_object", "json_schema"'),
        ("response_format", {"type": "json_schema"}, "response_format.json_schema", "is missing"),
        ("messages", [], "messages", "length >= 1"),
        ("messages", "Hello", "messages", "array"),
        ("messages", [{"role": "bot", "content": "a"}], "messages[0].role", '"developer", "user"'),
        ("messages", [{"role": "function", "content": "a"}], "messages[0].role", "send role tool"),
        ("messages", [USER, {**USER, "mood": 1}], "messages[1].mood", 'in messages[1]: "mood"'),
        ("messages", [{"role": "assistant", "audio": {}}], "messages[0].audio", "text only"),
        ("tools", [{"type": "custom", "custom": {}}], "tools[0].type", "not JSON"),
        ("tools", [{"custom": {}, "type": "custom"}], "tools[0].type", "not JSON"),
        ("tools", [{"function": WEATHER}], "tools[0].type", "is missing"),
        ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name", "regex"),
        ("tools", [{"type": "function", "function": WEATHER}] * 2, "tools", "same name"),
        ("tool_choice", "sometimes", "tool_choice", '"none", "auto", "required"'),
        ("tool_choice", "required", "tool_choice", "there are no tools"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice", '"f"'),
        ("structured_outputs", {"regex": "a", "x": 1}, "structured_outputs.x", "unknown"),
        ("chat_template_kwargs", {"prompt": 1}, "chat_template_kwargs", "chat_template_kwargs.prompt"),
        ("chat_template_kwargs", {"vocab_size": 1}, "chat_template_kwargs", "chat_template_kwargs.vocab_size"),
        ("continue_final_message", True, "continue_final_message", "an assistant's message"),
        ("max_completion_tokens", 0, "max_completion_tokens", ">= 1"),
    ],
)
def test_a_refused_field_is_named_with_the_reason(field: str, value: Any, param: str, said: str) -> None:
    error = refusal({field: value})
    assert error.param == param
    assert said in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_parts_that_are_no_text_are_refused_by_name(kind: str) -> None:
    error = refusal(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]}])
    assert error.param == "messages[0].content[1].type"
    assert kind in error.message and "text only" in error.message


def test_all_unknown_fields_are_named() -> None:
    assert 'unknown fields: "one", "two"' in refusal(one=1, two=None).message


def test_null_is_as_if_left_out() -> None:
    fields = {name: None for name in fields_of(chat.ChatRequest).rules if "." not in name and "[" not in name}
    given = parse_chat({**fields, **CHAT})
    assert given.asked == parse_chat().asked


def test_an_unknown_model_is_404_and_names_those_there_are() -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(model="gpt-4")
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert "tiny, org/tiny" in caught.value.message
    assert parse_chat(model="org/tiny").asked


@pytest.mark.parametrize("value", [{"a": 1}, "x", [1], 5])
@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.path)
def test_every_refused_field_is_refused(endpoint: Any, value: Any) -> None:
    start = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/v1/responses": RESPONSE}.get(endpoint.path)
    if start is None:
        return
    for name, rule in fields_of(endpoint.request).rules.items():
        if rule.kind == "refused" and "[" not in name and "." not in name:
            with pytest.raises(ApiError) as caught:
                PARSERS[endpoint.path](body(start, {name: value}))
            assert caught.value.param == name
            assert rule.about in caught.value.message


def test_free_form_json_is_bounded() -> None:
    def format_of(schema: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}

    deep: dict[str, Any] = {}
    for _ in range(70):
        deep = {"a": [deep]}
    error = refusal(response_format=format_of(deep))
    assert error.param == "response_format.json_schema.schema" and "64 levels" in error.message
    error = refusal(response_format=format_of({"a": "x" * 70_000}))
    assert "70008 bytes: this server's limit is 65536" in error.message
    function = {"name": "f", "parameters": deep}
    assert refusal(tools=[{"type": "function", "function": function}]).param == "tools[0].function.parameters"
    assert refusal(chat_template_kwargs=deep).param == "chat_template_kwargs"
    assert refusal(documents=[deep]).param == "documents"
    assert "bytes" in refusal(structured_outputs={"regex": "a" * 70_000}).message


def test_caps_are_the_servers() -> None:
    small = served(caps=Caps(n=2, prompts=2, choices=3, messages=1))
    with pytest.raises(ApiError, match="n is 3"):
        chat.parse(body(CHAT, n=3), small, request_id="x", created_s=5)
    with pytest.raises(ApiError, match="messages has 2 entries"):
        chat.parse(body(CHAT, messages=[USER, USER]), small, request_id="x", created_s=5)
    with pytest.raises(ApiError, match="prompt has 3 entries"):
        completions.parse(body(COMPLETION, prompt=["a", "b", "c"]), small, request_id="x", created_s=5)
    with pytest.raises(ApiError, match="4: this server's limit is 3"):
        completions.parse(body(COMPLETION, prompt=["a", "b"], n=2), small, request_id="x", created_s=5)
    assert completions.parse(body(COMPLETION, prompt=[1, 2, 3]), small, request_id="x", created_s=5).asked


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"NaN",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"messages":' + b"[" * 100_000,
        b'{"model":5,"x":NaN}',
        b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"\xff"}]}',
        b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":NaN}',
        b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"temperature":1e999}',
        b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"seed":' + b"1" * 5000 + b"}",
        b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"documents":[1e999]}',
        b'{"zzz":"\\ud800"}',
        b"{'model': 'tiny'}",
    ],
)
def test_bodies_that_are_no_json_object_are_400(data: bytes) -> None:
    for parse in PARSERS.values():
        with pytest.raises(ApiError) as caught:
            parse(data)
        assert caught.value.status == 400
        json.loads(error_body(caught.value))


def test_what_clients_see_of_errors() -> None:
    assert as_api_error(RequestError("a")).status == 400
    assert as_api_error(CapacityError("a")).status == 503
    assert as_api_error(StropError("a")).status == 500
    told = json.loads(error_body(ValueError("/secret/path")))["error"]
    assert told == {
        "message": "the server failed; its log says why",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert (
        "\ufffd" in error_body(RequestError("x\ud800")).decode() or "?" in error_body(RequestError("x\ud800")).decode()
    )


def test_every_field_that_the_official_client_can_send_is_known_by_name() -> None:
    pytest.importorskip("openai")
    from openai.types import completion_create_params as completion
    from openai.types import embedding_create_params as embedding
    from openai.types.chat import completion_create_params as chat_completion
    from openai.types.responses import response_create_params as response

    for params, kind in [
        (chat_completion.CompletionCreateParamsStreaming, chat.ChatRequest),
        (completion.CompletionCreateParamsStreaming, completions.CompletionRequest),
        (response.ResponseCreateParamsStreaming, responses.ResponsesRequest),
        (embedding.EmbeddingCreateParams, embeddings.EmbeddingsRequest),
    ]:
        names = {name for base in (params, *params.__orig_bases__) for name in getattr(base, "__annotations__", {})}
        assert "model" in names
        assert names <= set(fields_of(kind).rules), typing.cast(Any, kind).__name__


PARSERS: dict[str, Any] = {
    "/v1/chat/completions": lambda data: chat.parse(data, SERVED, request_id="x", created_s=5),
    "/v1/completions": lambda data: completions.parse(data, SERVED, request_id="x", created_s=5),
    "/v1/responses": lambda data: responses.parse(data, SERVED, request_id="x", created_s=5),
    "/v1/embeddings": lambda data: embeddings.parse(data, SERVED),
    "/tokenize": lambda data: tokenize.parse_tokenize(data, SERVED),
    "/detokenize": lambda data: tokenize.parse_detokenize(data, SERVED),
}
RICH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **CHAT,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            USER,
            {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "weather", "arguments": "{}"}}]},
            {"role": "tool", "content": "b", "tool_call_id": "c"},
        ],
        "n": 2,
        "stop": ["a"],
        "logit_bias": {"5": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "structured_outputs": None,
        "min_tokens": 1,
        "max_tokens": 5,
        "chat_template_kwargs": {"a": [1]},
    },
    "/v1/completions": {**COMPLETION, "prompt": [[1, 2], [3]], "structured_outputs": {"choice": ["a"]}, "logprobs": 1},
    "/v1/responses": {
        **RESPONSE,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "r", "summary": []},
        ],
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
    },
    "/v1/embeddings": {"model": "tiny", "input": ["a", "b"], "dimensions": 8, "encoding_format": "base64"},
    "/tokenize": {"messages": [USER], "tools": [{"type": "function", "function": WEATHER}]},
    "/detokenize": {"tokens": [1, 2]},
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def is_parsed(path: str, data: bytes) -> bool:
    """Whether a body is taken; if not, it is the client's fault."""
    try:
        PARSERS[path](data)
        return True
    except (ApiError, RequestError) as caught:
        error = as_api_error(caught)
    assert error.status in (400, 404)
    json.loads(error_body(error))
    return False


@functools.cache
def schema_of(path: str) -> Any:
    """A validator of what the OpenAPI document says of bodies; None without the library."""
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return None
    (kind,) = (endpoint.request for endpoint in ENDPOINTS if endpoint.path == path)
    components = openapi_document(SERVED, "1")["components"]
    return Draft202012Validator({"$ref": f"#/components/schemas/{kind.__name__}", "components": components})


@pytest.mark.parametrize("path", PARSERS)
def test_rich_bodies_are_parsed(path: str) -> None:
    assert PARSERS[path](json.dumps(RICH[path]).encode())
    assert schema_of(path) is None or schema_of(path).is_valid(RICH[path])


@settings(deadline=None)
@given(
    st.sampled_from(sorted(PARSERS)),
    st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()),
)
def test_any_bytes_are_refused_or_parsed(path: str, data: bytes) -> None:
    is_parsed(path, data)


@settings(deadline=None)
@given(st.data())
def test_changed_bodies_are_refused_where_the_document_says_so(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(PARSERS)))
    request = json.loads(json.dumps(RICH[path]))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = request
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and data.draw(st.booleans()):
                place = place[key]
                continue
            place[key] = data.draw(json_values)
            break
    for name in data.draw(st.lists(st.sampled_from(sorted(fields_of(chat.ChatRequest).rules)), max_size=2)):
        request[name] = data.draw(json_values)
    taken, schema = is_parsed(path, json.dumps(request).encode()), schema_of(path)
    assert not taken or schema is None or schema.is_valid(request)


@settings(deadline=None)
@given(st.sampled_from(sorted(PARSERS)), st.data())
def test_damaged_bytes_are_refused_or_parsed(path: str, data: st.DataObject) -> None:
    whole = bytearray(json.dumps(RICH[path]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    is_parsed(path, bytes(whole))
