"""/v1/responses, without a store: everything a reply needs is in its request."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from strop.core.errors import StropError
from strop.core.request import Delta, SamplingParams, StructuredOutputsParams
from strop.serve.openai.answer_reader import AnswerReader, answer_start
from strop.serve.openai.errors import as_api_error, error_fields
from strop.serve.openai.exchange import Asked, Served, Tally, check_context, encode
from strop.serve.openai.fields import Json, decode, honoured, ignored, only, refused
from strop.serve.openai.logprobs import ContentLogprob, content_logprobs, reported
from strop.serve.openai.messages import effort_variable
from strop.serve.openai.response_items import InputItem, OutputItem, item_messages
from strop.serve.openai.response_writer import ResponseWriter
from strop.serve.openai.sampling import (
    Count,
    JsonObjectFormat,
    Metadata,
    ReasoningEffort,
    SchemaName,
    Temperature,
    TextFormat,
    TopLogprobs,
    TopP,
    schema_shape,
)
from strop.serve.openai.tools import (
    ChoiceMode,
    FunctionSpec,
    Strict,
    ToolName,
    asked_with_tools,
    chosen_tools,
)
from strop.serve.tool_calls import Tools

_NOTHING_STORED = "nothing is stored"
_NOT_SUMMARISED = "thoughts are given whole, not summarised"
_CACHED = "prefixes are cached wherever requests share them"


class FlatJsonSchemaFormat(Struct, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """JSON that a schema describes."""

    name: SchemaName
    schema: Annotated[dict[str, Any], honoured("every keyword is enforced or refused", cap="schema_bytes")]
    description: Annotated[str | None, ignored("the model is not told")] = None
    strict: Annotated[bool | None, ignored("answers follow the schema in any case")] = None


class TextConfig(Struct, forbid_unknown_fields=True):
    """What the answer's text is like."""

    format: Annotated[
        TextFormat | JsonObjectFormat | FlatJsonSchemaFormat | None, honoured("enforced while it is generated")
    ] = None
    verbosity: Annotated[str | None, only("medium", about="no model here knows it")] = None


class Reasoning(Struct, forbid_unknown_fields=True):
    """How to reason."""

    effort: ReasoningEffort = None
    summary: Annotated[str | None, only("auto", about=_NOT_SUMMARISED)] = None
    generate_summary: Annotated[None, refused("this is the former name: use summary")] = None


class FlatTool(Struct, forbid_unknown_fields=True):
    """A function that the client can run."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, honoured("JSON schema of its arguments", cap="schema_bytes")] = None
    strict: Strict = None


class FlatNamedTool(Struct, tag="function", tag_field="type", forbid_unknown_fields=True):
    """The function that must be called."""

    name: ToolName


class FlatToolReference(Struct, forbid_unknown_fields=True):
    """One of the tools of the request."""

    name: ToolName
    type: Literal["function"] = "function"


class FlatAllowedTools(Struct, tag="allowed_tools", tag_field="type", forbid_unknown_fields=True):
    """Only some of the tools may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[FlatToolReference], Meta(min_length=1)]


class ResponsesStreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream brings besides the answer."""

    include_obfuscation: Annotated[bool | None, only(False, about="frames are not padded")] = None


class ResponsesRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Items to answer."""

    model: Annotated[str, honoured("a name of the served model; others get 404")]
    input: Annotated[
        str | Annotated[list[InputItem], Meta(min_length=1)],
        honoured("a text, or messages, function calls and their outputs", cap="messages"),
    ]
    instructions: Annotated[str | None, honoured("a system message before the input")] = None
    stream: Annotated[bool | None, honoured("the answer in server-sent events")] = None
    stream_options: Annotated[ResponsesStreamOptions | None, honoured("")] = None
    max_output_tokens: Annotated[Count | None, honoured("without it, to the context's end")] = None
    temperature: Annotated[Temperature | None, honoured("0 is greedy, 1 the default")] = None
    top_p: Annotated[TopP | None, honoured("")] = None
    top_logprobs: Annotated[TopLogprobs | None, honoured("", cap="logprobs")] = None
    include: Annotated[
        list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None,
        honoured("log probabilities; there is no encrypted reasoning to include"),
    ] = None
    text: Annotated[TextConfig | None, honoured("")] = None
    tools: Annotated[list[FlatTool] | None, honoured("functions", cap="tools")] = None
    tool_choice: Annotated[
        ChoiceMode | FlatNamedTool | FlatAllowedTools | None, honoured("required and named calls are forced")
    ] = None
    parallel_tool_calls: Annotated[bool | None, honoured("false allows one call")] = None
    reasoning: Annotated[Reasoning | None, honoured("")] = None

    store: Annotated[bool | None, only(False, about=_NOTHING_STORED)] = None
    background: Annotated[bool | None, only(False, about=_NOTHING_STORED)] = None
    truncation: Annotated[str | None, only("disabled", about="nothing is ever cut off")] = None
    service_tier: Annotated[str | None, only("auto", "default", about="all requests are alike")] = None
    metadata: Annotated[Metadata | None, ignored("the reply repeats it")] = None
    user: Annotated[str | None, ignored("the reply repeats it")] = None
    safety_identifier: Annotated[str | None, ignored("the reply repeats it")] = None
    prompt_cache_key: Annotated[str | None, ignored(_CACHED)] = None
    prompt_cache_retention: Annotated[str | None, ignored("")] = None
    max_tool_calls: Annotated[int | None, ignored("it counts tools that a server runs")] = None
    previous_response_id: Annotated[None, refused(_NOTHING_STORED + ": send the items themselves")] = None
    conversation: Annotated[None, refused(_NOTHING_STORED + ": send the items themselves")] = None
    prompt: Annotated[None, refused(_NOTHING_STORED + ", templates of prompts neither")] = None
    background_options: Annotated[None, refused(_NOTHING_STORED)] = None
    context_management: Annotated[None, refused("nothing is ever cut off")] = None
    moderation: Annotated[None, refused("there is no moderation model")] = None
    image: Annotated[None, refused("this server reads and writes text only")] = None
    access_programs: Annotated[None, refused("there are none")] = None
    prompt_cache_options: Annotated[None, refused("the prefix cache has no options")] = None


class InputTokensDetails(Struct):
    """Where the input's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct):
    """What the output's tokens were."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    """The tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Struct):
    """Why an answer was cut short."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseFailure(Struct):
    """Why there is no answer."""

    code: str
    message: str


class ReasoningEcho(Struct):
    """What was asked of the reasoning."""

    effort: str | None
    summary: str | None


class ResponseObject(Struct, kw_only=True):
    """The reply, and what it was asked for."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFailure | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    model: str
    instructions: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    text: TextConfig
    tools: list[FlatTool]
    tool_choice: ChoiceMode | FlatNamedTool | FlatAllowedTools
    parallel_tool_calls: bool
    reasoning: ReasoningEcho
    metadata: Metadata
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    previous_response_id: None = None
    background: Literal[False] = False
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    service_tier: Literal["default"] = "default"


def parse(body: bytes, served: Served, *, request_id: str, created_s: int) -> "ResponsesExchange":
    """The exchange for a request's body. ApiError or RequestError for one that is refused."""
    request = decode(body, ResponsesRequest, served.caps, _say_message)
    served.check_name(request.model)
    shape = _shape(request.text)
    tools = _tools(request, shape)
    params = SamplingParams(
        max_tokens=request.max_output_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        logprobs=_logprobs(request),
        structured_outputs=shape,
    )
    effort = request.reasoning.effort if request.reasoning is not None else None
    template = effort_variable(effort, served.chat_template, "reasoning.effort")
    messages = item_messages(request.input, request.instructions, served.chat_template)
    asked = asked_with_tools(messages, template, params, tools, served.tools)
    return ResponsesExchange(request, asked, served, request_id, created_s, tools)


def _say_message(body: Json) -> None:
    """Items without a type are messages."""
    if isinstance(body, dict) and isinstance(body.get("input"), list):
        for item in body["input"]:
            if isinstance(item, dict):
                item.setdefault("type", "message")


class ResponsesExchange:
    """See exchange.Exchange. The events come in the order, and with the ids, that OpenAI's clients insist on."""

    def __init__(
        self,
        request: ResponsesRequest,
        asked: Asked,
        served: Served,
        request_id: str,
        created_s: int,
        tools: Tools | None,
    ) -> None:
        self.asked = (asked,)
        self.stream = request.stream is True
        self._served = served
        self._tools = tools
        self._reader = AnswerReader(served, tools, is_thinking=False)
        self._tally = Tally(1)
        self._reply = _reply(request, asked.params, f"resp_{request_id}", created_s)
        self._writer = ResponseWriter(request_id, self.stream)
        self._is_cut = False

    def begin(self, which: int, prompt_token_ids: tuple[int, ...]) -> SamplingParams:
        """See Exchange."""
        asked, served = self.asked[0], self._served
        check_context(len(prompt_token_ids), asked.params, served.context_len, "input")
        self._tally.prompt_tokens += len(prompt_token_ids)
        params, is_thinking = answer_start(served, asked.params, prompt_token_ids)
        self._reader = AnswerReader(served, self._tools, is_thinking)
        return params

    def push(self, which: int, delta: Delta) -> bytes:
        """See Exchange."""
        self._writer.start(self._reply)
        pieces = self._reader.read(delta)
        self._tally.add(which, delta, self._reader.has_thought)
        logprobs: list[ContentLogprob] = []
        if delta.logprobs and not self._reader.has_thought:
            logprobs = content_logprobs(reported(delta, self.asked[0].params), self._served.vocabulary)
            if self._tools is None and not pieces:
                pieces = [""]  # of a token without text, too
        for piece in pieces:
            self._writer.write(piece, logprobs)
            if isinstance(piece, str):
                logprobs = []
        if delta.finish_reason is not None:
            self._is_cut = delta.finish_reason != "stop"
            self._writer.close("incomplete" if self._is_cut else "completed")
        return self._writer.sent()

    def end(self) -> bytes:
        """See Exchange. OpenAI ends these streams with the last event, and so do we."""
        status: Literal["incomplete", "completed"] = "incomplete" if self._is_cut else "completed"
        reply = msgspec.structs.replace(
            self._reply,
            status=status,
            output=self._writer.output,
            incomplete_details=IncompleteDetails() if self._is_cut else None,
            usage=self._usage(),
        )
        if not self.stream:
            return encode(reply)
        self._writer.event(f"response.{status}", response=reply)
        return self._writer.sent()

    def fail(self, error: StropError) -> bytes:
        """See Exchange."""
        writer = self._writer
        writer.start(self._reply)
        fields = error_fields(error)
        code = "server_error" if as_api_error(error).status >= 500 else "invalid_prompt"
        failure = ResponseFailure(code, fields.message)
        reply = msgspec.structs.replace(self._reply, status="failed", output=writer.output, error=failure)
        writer.event("response.failed", response=reply)
        # The key `error` makes clients raise.
        writer.event("error", code=fields.code or code, message=fields.message, param=fields.param, error=fields)
        return writer.sent()

    def _usage(self) -> ResponseUsage:
        tally = self._tally
        return ResponseUsage(
            tally.prompt_tokens,
            InputTokensDetails(tally.cached_tokens),
            tally.completion_tokens,
            OutputTokensDetails(tally.reasoning_tokens),
            tally.prompt_tokens + tally.completion_tokens,
        )


def _reply(request: ResponsesRequest, params: SamplingParams, reply_id: str, created_s: int) -> ResponseObject:
    """What a reply says before there is an answer."""
    text, reasoning = request.text or TextConfig(), request.reasoning or Reasoning()
    return ResponseObject(
        id=reply_id,
        created_at=created_s,
        status="in_progress",
        output=[],
        model=request.model,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_logprobs=params.logprobs or 0,
        text=TextConfig(text.format or TextFormat(), text.verbosity or "medium"),
        tools=request.tools or [],
        tool_choice=request.tool_choice or "auto",
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning=ReasoningEcho(reasoning.effort, reasoning.summary),
        metadata=request.metadata or {},
        user=request.user,
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )


def _tools(request: ResponsesRequest, shape: StructuredOutputsParams | None) -> Tools | None:
    choice = request.tool_choice
    mode: ChoiceMode | None = None
    named, allowed = None, None
    if isinstance(choice, FlatNamedTool):
        named = choice.name
    elif isinstance(choice, FlatAllowedTools):
        mode = choice.mode
        allowed = [reference.name for reference in choice.tools]
    else:
        mode = choice
    functions = [
        FunctionSpec(tool.name, tool.description, tool.parameters, tool.strict) for tool in request.tools or ()
    ]
    parallel = request.parallel_tool_calls
    return chosen_tools(functions, mode=mode, named=named, allowed=allowed, parallel=parallel, shape=shape)


def _shape(text: TextConfig | None) -> StructuredOutputsParams | None:
    format = text.format if text is not None else None
    if isinstance(format, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True)
    if isinstance(format, FlatJsonSchemaFormat):
        return schema_shape(format.schema)
    return None


def _logprobs(request: ResponsesRequest) -> int | None:
    is_included = "message.output_text.logprobs" in (request.include or ())
    return request.top_logprobs or 0 if is_included or request.top_logprobs else None
