"""/tokenize and /detokenize, as in vLLM."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from strop.serve.openai.errors import ApiError
from strop.serve.openai.exchange import Served, encode
from strop.serve.openai.fields import decode, honoured
from strop.serve.openai.messages import Message, template_messages, template_variables
from strop.serve.openai.sampling import TokenId
from strop.serve.openai.tools import ChatTool, chosen_tools, told

if TYPE_CHECKING:
    from strop.engine.text import Prompt


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text or a conversation."""

    model: Annotated[str | None, honoured("a name of the served model; others get 404")] = None
    prompt: Annotated[str | None, honoured("a text; this or messages")] = None
    messages: Annotated[
        Annotated[list[Message], Meta(min_length=1)] | None, honoured("a conversation", cap="messages")
    ] = None
    add_special_tokens: Annotated[bool | None, honoured("frame a text as the model expects; the default")] = None
    add_generation_prompt: Annotated[bool | None, honoured("open the assistant's turn; the default")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, honoured("variables of the chat template", cap="template_bytes")
    ] = None
    tools: Annotated[list[ChatTool] | None, honoured("functions", cap="tools")] = None
    return_token_strs: Annotated[bool | None, honoured("the tokens as text, too")] = None


class TokenizeReply(Struct):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Token ids to read."""

    model: Annotated[str | None, honoured("a name of the served model; others get 404")] = None
    tokens: Annotated[list[TokenId], honoured("")]


class DetokenizeReply(Struct):
    """Their text."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Tokenize:
    """What to tokenise, and the reply."""

    prompt: "Prompt"
    template: dict[str, Any]
    add_special: bool
    """Whether a text is to be framed."""
    served: Served
    with_texts: bool

    def reply(self, token_ids: tuple[int, ...]) -> bytes:
        """The body, from the ids of `prompt`."""
        texts = None
        if self.with_texts:
            texts = [self.served.vocabulary.token_bytes(i).decode("utf-8", "replace") for i in token_ids]
        return encode(TokenizeReply(len(token_ids), self.served.context_len, list(token_ids), texts))


def parse_tokenize(body: bytes, served: Served) -> Tokenize:
    """What a body of /tokenize asks for. ApiError for one that is refused."""
    request = decode(body, TokenizeRequest, served.caps)
    if request.model is not None:
        served.check_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("give prompt or messages, one of them", param="prompt")
    with_texts = request.return_token_strs is True
    if request.prompt is not None:
        return Tokenize(request.prompt, {}, request.add_special_tokens is not False, served, with_texts)
    template = template_variables(request.chat_template_kwargs)
    template["add_generation_prompt"] = request.add_generation_prompt is not False
    tools = chosen_tools([tool.function for tool in request.tools or ()])
    messages, variables = told(template_messages(request.messages or [], served.chat_template), tools, served.tools)
    return Tokenize(messages, template | variables, False, served, with_texts)


def parse_detokenize(body: bytes, served: Served) -> tuple[int, ...]:
    """The ids in a body of /detokenize. ApiError for one that is refused."""
    request = decode(body, DetokenizeRequest, served.caps)
    if request.model is not None:
        served.check_name(request.model)
    return tuple(request.tokens)


def detokenize_body(text: str) -> bytes:
    """The reply of /detokenize."""
    return encode(DetokenizeReply(text))
