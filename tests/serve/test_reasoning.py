"""A model that thinks before it answers, as OpenAI's own Python client sees it; the end of its thoughts is forced."""

from collections.abc import Iterator
from typing import Any

import pytest
from http_client import ask
from openai import OpenAI
from pydantic import BaseModel

ASKED: dict[str, Any] = {"model": "smollm2", "temperature": 0, "messages": [{"role": "user", "content": "A number?"}]}


class Number(BaseModel):
    number: int


@pytest.fixture
def thinker(thinking_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{thinking_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_thoughts_are_no_content(thinker: OpenAI) -> None:
    question = "Tell me about the sea, and then about mountains."
    how = {**ASKED, "messages": [{"role": "user", "content": question}], "max_completion_tokens": 12}
    whole = thinker.chat.completions.create(**how)
    message: Any = whole.choices[0].message
    assert message.content == "" and message.reasoning_content == message.reasoning != ""
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 12
    deltas: list[Any] = [chunk.choices[0].delta for chunk in thinker.chat.completions.create(**how, stream=True)]
    assert not any(delta.content for delta in deltas)
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == message.reasoning_content
    off = thinker.chat.completions.create(**how, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    effort = thinker.chat.completions.create(**how, reasoning_effort="none")
    assert off.choices[0].message.content == effort.choices[0].message.content != ""
    reply = thinker.responses.create(model="smollm2", input=question, temperature=0, max_output_tokens=12)
    (item,) = reply.output
    assert item.type == "reasoning" and item.content and item.content[0].text == message.reasoning_content


def test_a_shape_comes_after_the_thoughts(thinker: OpenAI, thinking_url: str) -> None:
    """The grammar leaves the thoughts free; these are made short by forbidding almost all that is not their end."""
    closed = {**ASKED, "max_completion_tokens": 40, "reasoning_effort": "none"}
    parsed = thinker.chat.completions.parse(**closed, response_format=Number).choices[0].message.parsed
    assert isinstance(parsed, Number)
    shape = {"structured_outputs": {"grammar": 'start: "Hm." | "So."'}}
    thought: Any = thinker.chat.completions.create(**ASKED, max_completion_tokens=8, extra_body=shape).choices[0]
    assert thought.message.content == "" and thought.message.reasoning_content and thought.finish_reason == "length"
    ids = ask(thinking_url, "/tokenize", {"prompt": "</think>", "add_special_tokens": False}).json["tokens"]
    bias = {str(token_id): 60 for token_id in ids}
    how: dict[str, Any] = {**ASKED, "max_completion_tokens": 40, "logit_bias": bias, "frequency_penalty": 2}
    open_: Any = thinker.chat.completions.parse(**how, response_format=Number).choices[0]
    assert isinstance(open_.message.parsed, Number), open_
