"""/v1/chat/completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from strop.core.errors import StropError
from strop.core.request import Delta, SamplingParams, StructuredOutputsParams, TokenLogprob
from strop.serve.openai.answer_reader import AnswerReader, Piece, Thought, answer_start
from strop.serve.openai.choices import ChoicesReply, finish_reason_of
from strop.serve.openai.errors import ApiError
from strop.serve.openai.exchange import Asked, Served, Usage, check_context, encode, error_frame
from strop.serve.openai.fields import decode, honoured, ignored, only, refused
from strop.serve.openai.logprobs import ChoiceLogprobs, content_logprobs, reported
from strop.serve.openai.messages import (
    AssistantMessage,
    Message,
    effort_variable,
    template_messages,
    template_variables,
)
from strop.serve.openai.sampling import (
    Count,
    JsonObjectFormat,
    JsonSchemaFormat,
    Metadata,
    ReasoningEffort,
    Sampling,
    TextFormat,
    TopLogprobs,
    only_shape,
    sampling_params,
    shape_of_extension,
    shape_of_format,
)
from strop.serve.openai.tools import (
    ChatAllowedToolChoice,
    ChatNamedTool,
    ChatTool,
    ChoiceMode,
    asked_with_tools,
    chosen_tools,
)
from strop.serve.tool_calls import ToolDelta, Tools

_TEXT_ONLY = "this server reads and writes text only"
_OLD_TOOLS = "this is the deprecated form: give tools and tool_choice"


class ChatRequest(Sampling, kw_only=True, forbid_unknown_fields=True):
    """A conversation to answer."""

    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)], honoured("roles as the template knows them", cap="messages")
    ]
    max_completion_tokens: Annotated[
        Count | None, honoured("tokens of an answer at most; without it, to the context's end")
    ] = None
    logprobs: Annotated[bool | None, honoured("")] = None
    top_logprobs: Annotated[TopLogprobs | None, honoured("only with logprobs", cap="logprobs")] = None
    response_format: Annotated[
        TextFormat | JsonObjectFormat | JsonSchemaFormat | None, honoured("enforced while the answer is generated")
    ] = None
    tools: Annotated[list[ChatTool] | None, honoured("functions", cap="tools")] = None
    tool_choice: Annotated[
        ChoiceMode | ChatNamedTool | ChatAllowedToolChoice | None, honoured("required and named calls are forced")
    ] = None
    parallel_tool_calls: Annotated[bool | None, honoured("false allows one call")] = None
    reasoning_effort: ReasoningEffort = None
    include_reasoning: Annotated[bool | None, honoured("false leaves out what the model thought")] = None
    add_generation_prompt: Annotated[bool | None, honoured("open the assistant's turn; the default")] = None
    continue_final_message: Annotated[
        bool | None, honoured("go on with the last message, an assistant's, instead of answering it")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, honoured("variables of the chat template", cap="template_bytes")
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, honoured("for templates that have a place for them", cap="template_bytes")
    ] = None

    store: Annotated[bool | None, only(False, about="nothing is stored")] = None
    service_tier: Annotated[str | None, only("auto", "default", about="all requests are alike")] = None
    verbosity: Annotated[str | None, only("medium", about="no model here knows it")] = None
    modalities: Annotated[list[Literal["text"]] | None, honoured(_TEXT_ONLY)] = None
    metadata: Annotated[Metadata | None, ignored("nothing is stored")] = None
    safety_identifier: Annotated[str | None, ignored("")] = None
    prompt_cache_key: Annotated[str | None, ignored("prefixes are cached wherever requests share them")] = None
    prompt_cache_retention: Annotated[str | None, ignored("")] = None
    audio: Annotated[None, refused(_TEXT_ONLY)] = None
    prediction: Annotated[None, refused("predicted outputs are not used")] = None
    web_search_options: Annotated[None, refused("this server searches nothing")] = None
    moderation: Annotated[None, refused("there is no moderation model")] = None
    prompt_cache_options: Annotated[None, refused("the prefix cache has no options")] = None
    functions: Annotated[None, refused(_OLD_TOOLS)] = None
    function_call: Annotated[None, refused(_OLD_TOOLS)] = None
    chat_template: Annotated[None, refused("the server's template is used")] = None


class AnsweredFunction(Struct):
    """A call's function."""

    name: str
    arguments: Annotated[str, Meta(description="JSON text")]


class AnsweredCall(Struct):
    """A call that the model made."""

    id: str
    function: AnsweredFunction
    type: Literal["function"] = "function"


class AnswerMessage(Struct, kw_only=True):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: Annotated[str, Meta(description="what the model thought before it")] | UnsetType = UNSET
    reasoning: Annotated[str, Meta(description="the same, by vLLM's name")] | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(Struct):
    """One of the n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Struct, kw_only=True):
    """All answers to a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChatChoice]
    usage: Usage


def parse(body: bytes, served: Served, *, request_id: str, created_s: int) -> "ChatExchange":
    """The exchange for a request's body. ApiError or RequestError for one that is refused."""
    request = decode(body, ChatRequest, served.caps)
    served.check_name(request.model)
    shape = only_shape(
        response_format=shape_of_format(request.response_format),
        structured_outputs=shape_of_extension(request.structured_outputs),
    )
    tools = _tools(request, shape)
    params = sampling_params(request, max_tokens=_max_tokens(request), logprobs=_logprobs(request), shape=shape)
    messages = template_messages(request.messages, served.chat_template)
    asked = asked_with_tools(messages, _template(request, served), params, tools, served.tools)
    return ChatExchange(request, asked, served, f"chatcmpl-{request_id}", created_s, tools)


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    """One answer on its way; texts, calls and log probabilities are kept for a reply in one piece only."""

    reader: AnswerReader
    thoughts: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Any = None


class ChatExchange:
    """See exchange.Exchange."""

    def __init__(
        self, request: ChatRequest, asked: Asked, served: Served, reply_id: str, created_s: int, tools: Tools | None
    ) -> None:
        self.asked = (asked,)
        self.stream = request.stream is True
        self._with_thoughts = request.include_reasoning is not False
        self._params = asked.params
        self._served = served
        self._tools = tools
        self._reply = ChoicesReply(request, served, reply_id, created_s, "chat.completion.chunk")
        self._choices: list[_Choice] = []
        self._is_open = False

    def begin(self, which: int, prompt_token_ids: tuple[int, ...]) -> SamplingParams:
        """See Exchange."""
        served = self._served
        check_context(len(prompt_token_ids), self._params, served.context_len, "messages")
        self._reply.tally.prompt_tokens += len(prompt_token_ids)
        params, is_thinking = answer_start(served, self._params, prompt_token_ids)
        self._choices = [_Choice(AnswerReader(served, self._tools, is_thinking)) for _ in range(params.n)]
        return params

    def push(self, which: int, delta: Delta) -> bytes:
        """See Exchange."""
        choice = self._choices[delta.index]
        pieces = choice.reader.read(delta)
        if not self._with_thoughts:
            pieces = [piece for piece in pieces if not isinstance(piece, Thought)]
        self._reply.tally.add(which, delta, choice.reader.has_thought)
        ended = delta.finish_reason is not None
        if ended:
            reason = finish_reason_of(delta)
            choice.finish_reason = "tool_calls" if choice.reader.has_calls and reason == "stop" else reason
        logprobs: Sequence[TokenLogprob] = ()
        if delta.logprobs and not choice.reader.has_thought:
            logprobs = reported(delta)
        if not self.stream:
            self._keep(choice, pieces, logprobs)
            return b""
        return self._frames(delta.index, choice, pieces, logprobs, ended)

    def end(self) -> bytes:
        """See Exchange."""
        if self.stream:
            return self._reply.closing()
        return self._reply.whole(ChatCompletion, [self._answer(i, choice) for i, choice in enumerate(self._choices)])

    def fail(self, error: StropError) -> bytes:
        """See Exchange."""
        return error_frame(error)

    def _frames(
        self, index: int, choice: _Choice, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob], ended: bool
    ) -> bytes:
        frames = []
        if not self._is_open:
            # The Python client takes the first chunks of choices in the order of their indexes only.
            self._is_open = True
            first = b'{"role":"assistant","content":%b,"refusal":null}' % (b'""' if self._tools is None else b"null")
            frames += [self._chunk(i, first, b"null", b"null") for i in range(len(self._choices))]
        told = encode(self._spelled(logprobs)) if logprobs else b"null"
        deltas = [self._delta(piece) for piece in pieces]
        if told != b"null" and not deltas:
            deltas.append(b'{"content":""}')
        for delta in deltas:
            frames.append(self._chunk(index, delta, told, b"null"))
            told = b"null"
        if ended:
            frames.append(self._chunk(index, b"{}", b"null", encode(choice.finish_reason)))
        return b"".join(frames)

    def _delta(self, piece: Piece) -> bytes:
        if isinstance(piece, str):
            return b'{"content":%b}' % encode(piece)
        if isinstance(piece, ToolDelta):
            return b'{"tool_calls":[%b]}' % _fragment(piece)
        return b'{"reasoning_content":%b,"reasoning":%b}' % ((encode(piece.text),) * 2)

    def _chunk(self, index: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        return self._reply.chunk(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, reason)
        )

    def _spelled(self, logprobs: Sequence[TokenLogprob]) -> ChoiceLogprobs:
        return ChoiceLogprobs(content_logprobs(logprobs, self._served.vocabulary))

    def _keep(self, choice: _Choice, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                choice.texts.append(piece)
            elif isinstance(piece, Thought):
                choice.thoughts.append(piece.text)
            else:
                if piece.index == len(choice.calls):
                    choice.calls.append(_Call(piece.id or "", piece.name or ""))
                choice.calls[piece.index].arguments.append(piece.arguments)
        choice.logprobs += logprobs

    def _answer(self, index: int, choice: _Choice) -> ChatChoice:
        text, thoughts = "".join(choice.texts), "".join(choice.thoughts)
        message = AnswerMessage(content=text if text or not choice.calls else None)
        if thoughts:
            message.reasoning_content = message.reasoning = thoughts
        if choice.calls:
            message.tool_calls = [
                AnsweredCall(call.id, AnsweredFunction(call.name, "".join(call.arguments))) for call in choice.calls
            ]
        logprobs = self._spelled(choice.logprobs) if self._params.logprobs is not None else None
        return ChatChoice(index, message, logprobs, choice.finish_reason)


def _fragment(piece: ToolDelta) -> bytes:
    """Clients put the strings of a call's fragments together: what is said once must not come again."""
    if piece.id is None:
        return b'{"index":%d,"function":{"arguments":%b}}' % (piece.index, encode(piece.arguments))
    function = {"name": piece.name, "arguments": piece.arguments}
    return encode({"index": piece.index, "id": piece.id, "type": "function", "function": function})


def _tools(request: ChatRequest, shape: StructuredOutputsParams | None) -> Tools | None:
    choice = request.tool_choice
    mode: ChoiceMode | None = None
    named, allowed = None, None
    if isinstance(choice, ChatNamedTool):
        named = choice.function.name
    elif isinstance(choice, ChatAllowedToolChoice):
        mode = choice.allowed_tools.mode
        allowed = [reference.function.name for reference in choice.allowed_tools.tools]
    else:
        mode = choice
    functions = [tool.function for tool in request.tools or ()]
    parallel = request.parallel_tool_calls
    return chosen_tools(functions, mode=mode, named=named, allowed=allowed, parallel=parallel, shape=shape)


def _max_tokens(request: ChatRequest) -> int | None:
    old, new = request.max_tokens, request.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            f"max_tokens={old} is the former name of max_completion_tokens={new}: give one", param="max_tokens"
        )
    return new if new is not None else old


def _logprobs(request: ChatRequest) -> int | None:
    if not request.logprobs:
        if request.top_logprobs is not None:
            raise ApiError("top_logprobs is for answers with logprobs=true", param="top_logprobs")
        return None
    return request.top_logprobs or 0


def _template(request: ChatRequest, served: Served) -> dict[str, Any]:
    """Keyword arguments of Tokenizer.apply_chat_template."""
    template = template_variables(request.chat_template_kwargs)
    template |= effort_variable(request.reasoning_effort, served.chat_template, "reasoning_effort")
    goes_on = request.continue_final_message is True
    if goes_on and not isinstance(request.messages[-1], AssistantMessage):
        raise ApiError(
            "continue_final_message goes on with an assistant's message: end messages with one",
            param="continue_final_message",
        )
    if goes_on and request.add_generation_prompt:
        raise ApiError(
            "add_generation_prompt opens a new turn, continue_final_message goes on with the last: give one",
            param="add_generation_prompt",
        )
    if goes_on:
        template["continue_final_message"] = True
    template["add_generation_prompt"] = not goes_on and request.add_generation_prompt is not False
    if request.documents is not None:
        template["documents"] = request.documents
    return template
