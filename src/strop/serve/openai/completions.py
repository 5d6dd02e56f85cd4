"""/v1/completions."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta, Struct

from strop.core.errors import StropError
from strop.core.request import Delta, SamplingParams, TokenLogprob
from strop.serve.openai.choices import ChoicesReply, finish_reason_of
from strop.serve.openai.errors import ApiError
from strop.serve.openai.exchange import Asked, Served, Usage, check_context, encode, error_frame
from strop.serve.openai.fields import Caps, decode, honoured, refused
from strop.serve.openai.logprobs import CompletionLogprobs, CompletionSpeller, reported
from strop.serve.openai.sampling import (
    Sampling,
    TokenId,
    TopLogprobs,
    sampling_params,
    shape_of_extension,
)

if TYPE_CHECKING:
    from strop.engine.text import Prompt

_DEFAULT_MAX_TOKENS = 16
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
# msgspec takes one kind of list in a union; a schema can say that items are alike.
Texts = Annotated[list[str | TokenId | TokenIds], Meta(min_length=1)]


class CompletionRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """Prompts to go on with."""

    prompt: Annotated[str | Texts, honoured("a text, its token ids, or a list of either")]
    max_tokens: Annotated[
        Annotated[int, Meta(ge=0, lt=2**31)] | None,
        honoured("tokens of an answer at most, 16 by default; 0, with echo, gives the prompt alone"),
    ] = None
    echo: Annotated[bool | None, honoured("the prompt first, with logprobs those of its tokens too")] = None
    logprobs: Annotated[TopLogprobs | None, honoured("for so many tokens and the chosen one", cap="logprobs")] = None
    suffix: Annotated[None, refused("answers are generated from the left")] = None


class CompletionChoice(Struct):
    """One answer; those to a list of prompts are in its order, n to each."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(Struct, kw_only=True):
    """All answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[CompletionChoice]
    usage: Usage


def parse(body: bytes, served: Served, *, request_id: str, created_s: int) -> "CompletionExchange":
    """The exchange for a request's body. ApiError or RequestError for one that is refused."""
    request = decode(body, CompletionRequest, served.caps)
    served.check_name(request.model)
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise ApiError("max_tokens=0 writes nothing: give 1 or more, or echo=true", param="max_tokens")
    shape = shape_of_extension(request.structured_outputs)
    params = sampling_params(request, max_tokens=max(max_tokens, 1), logprobs=request.logprobs, shape=shape)
    if request.echo:
        params = replace(params, prompt_logprobs=request.logprobs)
    prompts = texts_of(request.prompt, "prompt", served.caps.prompts)
    _check_choices(len(prompts), params.n, served.caps)
    asked = tuple(Asked(prompt, {}, params) for prompt in prompts)
    return CompletionExchange(request, asked, served, f"cmpl-{request_id}", created_s)


def texts_of(given: str | list[Any], param: str, limit: int) -> "list[str | tuple[int, ...]]":
    """The texts, or their token ids, in a field that takes one or several. ApiError if they are not alike or more than
    `limit`."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise ApiError(f"{param} mixes texts, token ids and lists of them: give one kind", param=param)
    if kinds == {int}:
        return [tuple(given)]
    if len(given) > limit:
        raise ApiError(f"{param} has {len(given)} entries: this server's limit is {limit}", param=param)
    return [item if isinstance(item, str) else tuple(item) for item in given]


def _check_choices(num_prompts: int, n: int, caps: Caps) -> None:
    if num_prompts * n > caps.choices:
        raise ApiError(
            f"n={n} answers to {num_prompts} prompts are {num_prompts * n}: this server's limit is {caps.choices};"
            " send several requests",
            param="n",
        )


@dataclass(slots=True)
class _Prompt:
    """What is said again before each of its answers."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class _Choice:
    """One answer on its way; texts and log probabilities are kept for a reply in one piece only."""

    speller: CompletionSpeller
    texts: list[str] = field(default_factory=list)
    logprobs: CompletionLogprobs = field(default_factory=CompletionLogprobs)
    finish_reason: Any = None
    is_begun: bool = False


class CompletionExchange:
    """See exchange.Exchange."""

    def __init__(
        self, request: CompletionRequest, asked: tuple[Asked, ...], served: Served, reply_id: str, created_s: int
    ) -> None:
        self.asked = asked
        self.stream = request.stream is True
        self._params = asked[0].params
        self._echoed = [_Prompt() for _ in asked] if request.echo else []
        self._echoes_only = request.max_tokens == 0  # the engine writes one token all the same
        self._served = served
        self._reply = ChoicesReply(request, served, reply_id, created_s, "text_completion", len(asked))
        num_choices = len(asked) * self._params.n
        self._choices = [_Choice(CompletionSpeller(served.vocabulary)) for _ in range(num_choices)]

    def begin(self, which: int, prompt_token_ids: tuple[int, ...]) -> SamplingParams:
        """See Exchange."""
        check_context(len(prompt_token_ids), self._params, self._served.context_len, "prompt")
        self._reply.tally.prompt_tokens += len(prompt_token_ids)
        if self._echoed:
            self._echoed[which] = _Prompt(self._text(self.asked[which].prompt), prompt_token_ids)
        return self._params

    def push(self, which: int, delta: Delta) -> bytes:
        """See Exchange."""
        if self._echoes_only:
            delta = replace(delta, text="", token_ids=(), logprobs=(), finish_reason=delta.finish_reason and "length")
        self._reply.tally.add(which, delta)
        index = which * self._params.n + delta.index
        choice = self._choices[index]
        choice.finish_reason = finish_reason_of(delta)
        text, logprobs = self._news(which, choice, delta)
        if not self.stream:
            choice.texts.append(text)
            choice.logprobs.extend(logprobs)
            return b""
        if not text and not logprobs.tokens and delta.finish_reason is None:
            return b""
        told = encode(logprobs) if logprobs.tokens else b"null"
        reason = b"null" if choice.finish_reason is None else encode(choice.finish_reason)
        return self._reply.chunk(
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (index, encode(text), told, reason)
        )

    def end(self) -> bytes:
        """See Exchange."""
        if self.stream:
            return self._reply.closing()
        return self._reply.whole(Completion, [self._answer(i, choice) for i, choice in enumerate(self._choices)])

    def fail(self, error: StropError) -> bytes:
        """See Exchange."""
        return error_frame(error)

    def _news(self, which: int, choice: _Choice, delta: Delta) -> tuple[str, CompletionLogprobs]:
        """The text that a delta adds, and its log probabilities; before a choice's first, those of the prompt."""
        text, logprobs = delta.text, CompletionLogprobs()
        reports = self._params.logprobs is not None
        if self._echoed and not choice.is_begun:
            prompt = self._echoed[which]
            prompt.logprobs = delta.prompt_logprobs or prompt.logprobs  # the first choice's delta brings them, for all
            text = prompt.text + text
            if reports:
                logprobs = choice.speller.spell_prompt(prompt.text, prompt.token_ids, prompt.logprobs)
        choice.is_begun = True
        if reports:
            logprobs.extend(choice.speller.spell(reported(delta)))
        return text, logprobs

    def _answer(self, index: int, choice: _Choice) -> CompletionChoice:
        logprobs = choice.logprobs if self._params.logprobs is not None else None
        return CompletionChoice(index, "".join(choice.texts), logprobs, choice.finish_reason)

    def _text(self, prompt: "Prompt") -> str:
        if isinstance(prompt, str):
            return prompt
        ids = [token_id for token_id in prompt if isinstance(token_id, int)]
        return b"".join(map(self._served.vocabulary.token_bytes, ids)).decode("utf-8", "replace")
