"""One server under load: what it serves and takes is found out by asking."""

import json
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from time import perf_counter
from typing import Any

from strop.bench.serve.events import Answer
from strop.bench.serve.http_client import HttpClient
from strop.bench.serve.load import Lengths
from strop.bench.serve.prompts import CountedText, CountedWords, Prompt, PromptMaker, TokenIds, text_words
from strop.bench.serve.records import Record
from strop.core.errors import ServerError

_IGNORE_EOS = {"ignore_eos": True}
_WITH_USAGE = {"stream_options": {"include_usage": True}}
_OPTIONS: tuple[dict[str, Any], ...] = (_IGNORE_EOS | _WITH_USAGE, _WITH_USAGE, _IGNORE_EOS, {})
"""What makes lengths exact, and not every server takes: the first that this one does."""
_PROBE_TOKENS = 2
_PROBE_WORDS = (40, 200)
_PROBE_IDS = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how to ask it."""

    client: HttpClient
    model: str
    is_chat: bool
    options: dict[str, Any]
    """One of _OPTIONS."""
    has_usage: bool = False
    prompts: PromptMaker = TokenIds()  # noqa: RUF009 (has no state)

    @property
    def path(self) -> str:
        """Where requests go."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def describe(self) -> dict[str, str]:
        """For the report."""
        return {
            "url": self.client.url,
            "model": self.model,
            "endpoint": self.path,
            "prompts": self.prompts.method,
            "ignore_eos": "sent" if "ignore_eos" in self.options else "refused: answers end where the model ends them",
            "output_tokens": "from the server's usage" if self.has_usage else "chunks with text (no usage is reported)",
        }

    def request(self, prompt: Prompt, output_tokens: int) -> bytes:
        """The bytes of a streaming request."""
        content = {"messages": [{"role": "user", "content": prompt}]} if self.is_chat else {"prompt": prompt}
        body = {"model": self.model, **content, "max_tokens": output_tokens, "temperature": 0, "stream": True}
        return self.client.request("POST", self.path, json.dumps(body | self.options).encode())

    async def send(self, request: bytes, record: Record, begin_s: float) -> None:
        """Sends a request and writes down what comes of it, failures too; `begin_s` is the record's time 0."""
        answer = Answer()
        record.sent_s = perf_counter() - begin_s
        try:
            await self.client.send(request, answer.push)
            answer.end()
        except ServerError as error:
            answer.failure = answer.failure or (error.kind, error.message)
        finally:
            record.chunk_s = [now_s - begin_s for now_s in answer.chunk_s]
        record.end_s = perf_counter() - begin_s
        record.finish_reason = answer.finish_reason
        if answer.usage is not None:
            record.prompt_tokens, record.output_tokens = answer.usage.prompt_tokens, answer.usage.completion_tokens
            record.cached_tokens = answer.usage.cached_tokens
        if answer.failure is not None:
            kind, message = answer.failure
            record.failure = (kind, self.client.presentable(message))


async def find_target(client: HttpClient, model: str | None, is_chat: bool) -> Target:
    """Asks a server what it serves and takes, with a few short requests.

    Raises:
        ServerError: it cannot be reached, names no model, or answers no request.
    """
    try:
        target = Target(client, model or await _first_model(client), is_chat, {})
        text = " ".join(islice(text_words("probe"), _PROBE_WORDS[0]))
        for options in _OPTIONS:
            target = replace(target, options=options)
            record = await _probe(target, text)
            if record.failure is None or record.failure[0] not in ("HTTP 400", "HTTP 422"):
                break
        _raise_failure(record)
        target = replace(target, has_usage=record.output_tokens is not None)
        return replace(target, prompts=await _prompt_maker(target, text, record.prompt_tokens))
    except ServerError as error:
        if error.kind == "connection":
            message = f"{client.url} cannot be reached ({error.message}): start the server, or correct the URL"
            raise ServerError("no server", message) from None
        raise ServerError(error.kind, f"{client.url}: {error.message}") from None


async def _first_model(client: HttpClient) -> str:
    try:
        return str((await client.json("GET", "/v1/models"))["data"][0]["id"])
    except (LookupError, TypeError):
        raise ServerError("no model", "/v1/models lists none: name one with --model") from None


async def _probe(target: Target, prompt: Prompt) -> Record:
    record = Record(Lengths(1, _PROBE_TOKENS))
    await target.send(target.request(prompt, _PROBE_TOKENS), record, perf_counter())
    return record


def _raise_failure(record: Record) -> None:
    """A model may end its answer before any text; every other failure would be every request's."""
    if record.failure is not None and record.failure[0] != "no text":
        raise ServerError(*record.failure)


async def _prompt_maker(target: Target, text: str, prompt_tokens: int | None) -> PromptMaker:
    """`prompt_tokens` is what `text` came to in a request, None if the server does not say."""
    for name in ("prompt", "content"):  # vLLM's, llama.cpp's
        count = partial(_count, target, name)
        try:
            counted = await count(text)
        except ServerError:
            continue
        if counted > 0:
            return CountedText(count, max(0, (prompt_tokens or counted) - counted))
    if not target.is_chat:
        record = await _probe(target, await TokenIds().make(_PROBE_IDS, 0, "probe"))
        if record.failure is None and record.prompt_tokens in (None, _PROBE_IDS, _PROBE_IDS + 1):
            return TokenIds()
    record = await _probe(target, " ".join(islice(text_words("longer probe"), _PROBE_WORDS[1])))
    _raise_failure(record)
    if prompt_tokens is None or record.prompt_tokens is None or record.prompt_tokens <= prompt_tokens:
        return CountedWords(None, 0)
    tokens_per_word = (record.prompt_tokens - prompt_tokens) / (_PROBE_WORDS[1] - _PROBE_WORDS[0])
    return CountedWords(tokens_per_word, max(0.0, prompt_tokens - tokens_per_word * _PROBE_WORDS[0]))


async def _count(target: Target, name: str, text: str) -> int:
    """Tokens of `text`; 0 if the server wants it under another name."""
    reply = await target.client.json("POST", "/tokenize", {"model": target.model, name: text})
    tokens = reply.get("tokens") if isinstance(reply, dict) else None
    if not isinstance(tokens, list):
        raise ServerError("malformed response", "/tokenize gave no list of tokens")
    return len(tokens)
