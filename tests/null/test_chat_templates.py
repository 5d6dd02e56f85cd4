"""Where chat templates come from, which one is rendered, and what a model without one says."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizer import tiny_metadata

from strop.core.errors import FormatError, RequestError
from strop.formats.chat_templates import template_for, templates_of_folder, templates_of_gguf
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.template import TemplateRenderer
from strop.formats.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b> & 'é'"}}]
NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T tools"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=60)
    yield renderer
    renderer.close()


def tokenizer(renderer: TemplateRenderer, **templates: str) -> Tokenizer:
    metadata = {key: item for key, item in tiny_metadata().items() if not key.startswith("tokenizer.chat_template")}
    return tokenizer_from_gguf(metadata | {f"tokenizer.{name}": text for name, text in templates.items()}, renderer)


@pytest.mark.parametrize(
    ("config", "files", "templates"),
    [
        ({}, {}, {}),
        ({"chat_template": None}, {}, {}),
        ({"chat_template": "C"}, {}, {"default": "C"}),
        ({"chat_template": NAMED}, {}, {"default": "D", "tool_use": "T tools"}),
        ({"chat_template": NAMED}, {"chat_template.jinja": "J"}, {"default": "J", "tool_use": "T tools"}),
        (
            {"chat_template": "C"},
            {"additional_chat_templates/tool_use.jinja": "A", "additional_chat_templates/rag.jinja": "R"},
            {"default": "C", "tool_use": "A", "rag": "R"},
        ),
        ({}, {"chat_template.json": '{"chat_template": "P"}'}, {"default": "P"}),
        ({"chat_template": "C"}, {"chat_template.json": '{"chat_template": "P"}'}, {"default": "C"}),
        ({}, {"chat_template.json": json.dumps({"chat_template": NAMED})}, {"default": "D", "tool_use": "T tools"}),
    ],
)
def test_templates_of_a_folder(
    tmp_path: Path, config: Mapping[str, Any], files: Mapping[str, str], templates: Mapping[str, str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert templates_of_folder(tmp_path, config) == templates


@pytest.mark.parametrize(
    ("config", "file", "content", "message"),
    [
        ({"chat_template": 5}, "", b"", "must be a text or a list"),
        ({"chat_template": [5]}, "", b"", "must be a text or a list"),
        ({"chat_template": [{"name": "default"}]}, "", b"", "must be a text or a list"),
        ({"chat_template": [{"template": "x"}]}, "", b"", "must be a text or a list"),
        ({}, "chat_template.jinja", b"\xff", "not UTF-8"),
        ({}, "chat_template.jinja", b"x" * (4 * 2**20 + 1), "larger than"),
        ({}, "chat_template.json", b"[", "must hold"),
        ({}, "chat_template.json", b"[]", "must hold"),
        ({}, "chat_template.json", b"{}", "must hold"),
    ],
)
def test_damaged_templates_are_named(
    tmp_path: Path, config: Mapping[str, Any], file: str, content: bytes, message: str
) -> None:
    if file:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        templates_of_folder(tmp_path, config)


def test_templates_of_a_gguf() -> None:
    key = "tokenizer.chat_template"
    metadata = {key: "D", f"{key}.tool_use": "T", f"{key}s": ["tool_use"], "tokenizer.other": 1}
    assert templates_of_gguf(metadata) == {"default": "D", "tool_use": "T"}
    assert templates_of_gguf({}) == {}
    with pytest.raises(FormatError, match=r"tokenizer\.chat_template\.rag must be of type str, not int"):
        templates_of_gguf({f"{key}.rag": 5})


def test_tools_choose_their_template(renderer: TemplateRenderer) -> None:
    both = tokenizer(renderer, **{"chat_template": "plain", "chat_template.tool_use": "{{ tools | tojson }}"})
    assert both.apply_chat_template(MESSAGES) == "plain"
    assert both.apply_chat_template(MESSAGES, tools=TOOLS) == json.dumps(TOOLS, ensure_ascii=False)
    assert both.apply_chat_template(MESSAGES, tools=[]) == "[]"  # as in transformers
    assert both.apply_chat_template(MESSAGES, tools=TOOLS, chat_template="{{ tools | length }}") == "1"


def test_documents_and_other_names_reach_the_template(renderer: TemplateRenderer) -> None:
    template = "{{ documents[0].text }} {{ enable_thinking }} {{ add_generation_prompt }} {{ tools is none }}"
    text = tokenizer(renderer, chat_template=template).apply_chat_template(
        MESSAGES, documents=[{"title": "t", "text": "<x>"}], enable_thinking=False
    )
    assert text == "<x> False True True"


def test_what_a_message_leaves_empty_is_not_there(renderer: TemplateRenderer) -> None:
    template = "{{ 'tool_calls' in messages[0] }} {{ 'content' in messages[0] }}"
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert tokenizer(renderer, chat_template=template).apply_chat_template([message]) == "False True"


@pytest.mark.parametrize(
    ("templates", "given", "message"),
    [
        ({}, {}, "no chat template: give one .*--template FILE"),
        ({"rag": "x"}, {}, "no chat template by default, only 'rag'"),
        ({"default": "x"}, {"tools": TOOLS}, "no place for tools"),
        ({"default": "tools"}, {"documents": [{}]}, "no place for documents"),
    ],
)
def test_what_cannot_be_rendered_as_asked_names_the_cure(
    templates: Mapping[str, str], given: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        template_for(templates, given)


@pytest.mark.parametrize("given", [{"tools": "f"}, {"tools": {"type": "function"}}, {"documents": ["text"]}])
def test_tools_and_documents_are_lists_of_maps(renderer: TemplateRenderer, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must be a list of maps"):
        tokenizer(renderer, chat_template="tools documents").apply_chat_template(MESSAGES, **given)


def test_a_last_message_is_continued_where_its_content_ends(renderer: TemplateRenderer) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>{% endfor %}"
    prefilled = [*MESSAGES, {"role": "assistant", "content": " I am "}]
    plain = tokenizer(renderer, chat_template=template)

    def continued(messages: list[dict[str, Any]]) -> str:
        return plain.apply_chat_template(messages, False, continue_final_message=True)

    assert continued(prefilled) == "<user>Hi</user><assistant>I am "
    assert continued([*MESSAGES, {"role": "assistant", "content": ""}]) == "<user>Hi</user><assistant>"
    assert prefilled[-1]["content"] == " I am "
    with pytest.raises(RequestError, match="must be one"):
        continued([*MESSAGES, {"role": "assistant", "content": None}])
    with pytest.raises(RequestError, match="does not show"):
        tokenizer(renderer, chat_template="x").apply_chat_template(MESSAGES, False, continue_final_message=True)
