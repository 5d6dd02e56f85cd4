"""The fields that say how to sample, and what shape an answer must have."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from strop.core.request import SamplingParams, StructuredOutputsParams
from strop.serve.openai.errors import ApiError
from strop.serve.openai.fields import honoured, ignored, only, refused

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]
StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]],
    Meta(extra_json_schema={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}),
]
Temperature = Annotated[float, Meta(ge=0, le=100)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Metadata = dict[str, str]

_ONE_ANSWER = "every answer is generated once: use n"
_OLD_GUIDED = "this is the former name: use structured_outputs"


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream brings besides the answer."""

    include_usage: Annotated[bool | None, honoured("a last chunk with the usage")] = None
    include_obfuscation: Annotated[bool | None, only(False, about="frames are not padded")] = None


class StructuredOutputs(Struct, forbid_unknown_fields=True):
    """The shape of an answer; exactly one of these."""

    json: Annotated[
        dict[str, Any] | str | None, honoured("a JSON schema, as a value or as JSON text", cap="schema_bytes")
    ] = None
    json_object: Annotated[bool | None, honoured("any JSON object")] = None
    regex: Annotated[str | None, honoured("", cap="schema_bytes")] = None
    choice: Annotated[
        Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)] | None,
        honoured("one of these texts", cap="schema_bytes"),
    ] = None
    grammar: Annotated[str | None, honoured("in llguidance's Lark notation", cap="schema_bytes")] = None


SchemaName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]


class JsonSchemaSpec(Struct, forbid_unknown_fields=True):
    """A JSON schema by name."""

    name: SchemaName
    schema: Annotated[dict[str, Any], honoured("every keyword is enforced or refused", cap="schema_bytes")]
    description: Annotated[str | None, ignored("the model is not told")] = None
    strict: Annotated[bool | None, ignored("answers follow the schema in any case")] = None


class TextFormat(Struct, tag="text", tag_field="type", forbid_unknown_fields=True):
    """Any text."""


class JsonObjectFormat(Struct, tag="json_object", tag_field="type", forbid_unknown_fields=True):
    """Any JSON object."""


class JsonSchemaFormat(Struct, tag="json_schema", tag_field="type", forbid_unknown_fields=True):
    """JSON that a schema describes."""

    json_schema: JsonSchemaSpec


class Sampling(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and text completions have in common."""

    model: Annotated[str, honoured("a name of the served model; others get 404")]
    stream: Annotated[bool | None, honoured("the answer in server-sent events")] = None
    stream_options: Annotated[StreamOptions | None, honoured("only with stream")] = None
    max_tokens: Annotated[Count | None, honoured("tokens of an answer at most")] = None
    n: Annotated[Annotated[int, Meta(ge=1)] | None, honoured("answers to a prompt", cap="n")] = None
    temperature: Annotated[Temperature | None, honoured("0 is greedy, 1 the default")] = None
    top_p: Annotated[TopP | None, honoured("")] = None
    stop: Annotated[
        StopString | list[StopString] | None, honoured("texts that end an answer, not part of it", cap="stop")
    ] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None,
        honoured("the same seed gives the same answer, under any load"),
    ] = None
    logit_bias: Annotated[LogitBias | None, honoured("token ids to -100..100", cap="logit_bias")] = None
    presence_penalty: Annotated[Penalty | None, honoured("")] = None
    frequency_penalty: Annotated[Penalty | None, honoured("")] = None
    user: Annotated[str | None, ignored("")] = None

    top_k: Annotated[
        Annotated[int, Meta(ge=-1, lt=2**31)] | None, honoured("keep the k most probable tokens; 0 and -1 keep all")
    ] = None
    min_p: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None,
        honoured("keep tokens at least this times as probable as the likeliest"),
    ] = None
    repetition_penalty: Annotated[Annotated[float, Meta(gt=0, le=100)] | None, honoured("1 is none")] = None
    min_tokens: Annotated[
        Annotated[int, Meta(ge=0, lt=2**31)] | None, honoured("tokens before which an answer cannot end")
    ] = None
    ignore_eos: Annotated[bool | None, honoured("go on to max_tokens")] = None
    stop_token_ids: Annotated[list[TokenId] | None, honoured("tokens that end an answer", cap="stop")] = None
    include_stop_str_in_output: Annotated[bool | None, honoured("")] = None
    skip_special_tokens: Annotated[bool | None, honoured("leave control tokens out of the text; the default")] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, honoured("the shape of an answer; exactly one field of it")
    ] = None

    cache_salt: Annotated[None, refused("the server salts its prefix cache by key")] = None
    truncate_prompt_tokens: Annotated[None, refused("prompts are never cut")] = None
    prompt_logprobs: Annotated[None, refused("in /v1/completions, echo with logprobs gives them")] = None
    use_beam_search: Annotated[None, refused("there is no beam search")] = None
    best_of: Annotated[None, refused(_ONE_ANSWER)] = None
    guided_json: Annotated[None, refused(_OLD_GUIDED)] = None
    guided_regex: Annotated[None, refused(_OLD_GUIDED)] = None
    guided_choice: Annotated[None, refused(_OLD_GUIDED)] = None
    guided_grammar: Annotated[None, refused(_OLD_GUIDED)] = None


def sampling_params(
    request: Sampling, *, max_tokens: int | None, logprobs: int | None, shape: StructuredOutputsParams | None
) -> SamplingParams:
    """The engine's parameters. What is null in `request` has its default. RequestError for a combination that cannot
    be."""
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options is for streams: give it with stream=true", param="stream_options")
    stop = request.stop or ()
    return SamplingParams(
        n=_or(request.n, 1),
        max_tokens=max_tokens,
        min_tokens=_or(request.min_tokens, 0),
        temperature=_or(request.temperature, 1.0),
        top_k=max(_or(request.top_k, 0), 0),
        top_p=_or(request.top_p, 1.0),
        min_p=_or(request.min_p, 0.0),
        seed=request.seed,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=request.logit_bias or None,
        logprobs=logprobs,
        ignore_eos=bool(request.ignore_eos),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        structured_outputs=shape,
    )


def shape_of_format(
    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None,
) -> StructuredOutputsParams | None:
    """What response_format asks for."""
    if isinstance(format, JsonObjectFormat):
        return StructuredOutputsParams(json_object=True)
    if isinstance(format, JsonSchemaFormat):
        return schema_shape(format.json_schema.schema)
    return None


def schema_shape(schema: dict[str, Any]) -> StructuredOutputsParams:
    """JSON that `schema` describes."""
    return StructuredOutputsParams(json=msgspec.json.encode(schema).decode())


def shape_of_extension(given: StructuredOutputs | None) -> StructuredOutputsParams | None:
    """What structured_outputs asks for. RequestError unless it is exactly one shape."""
    if given is None:
        return None
    schema = given.json if isinstance(given.json, str | None) else msgspec.json.encode(given.json).decode()
    return StructuredOutputsParams(
        json=schema,
        json_object=bool(given.json_object),
        regex=given.regex,
        choice=None if given.choice is None else tuple(given.choice),
        grammar=given.grammar,
    )


def only_shape(**shapes: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
    """The one shape that was given, by the name of its field. ApiError for two."""
    given = [name for name, shape in shapes.items() if shape is not None]
    if len(given) > 1:
        raise ApiError(f"{' and '.join(given)} each give the answer a shape: give one of them", param=given[1])
    return shapes[given[0]] if given else None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


ReasoningEffort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None,
    honoured("where the chat template has such a variable, and none where it has enable_thinking; else refused"),
]
