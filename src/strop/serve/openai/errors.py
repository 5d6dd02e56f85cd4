"""What a client is told when something is wrong, in OpenAI's shape."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from strop.core.errors import CapacityError, EngineDownError, OverloadError, RequestError, StropError, UnsupportedError


class ApiError(StropError):
    """An error with the fields that OpenAI's clients read.

    They retry 408, 409, 429 and everything from 500 on: what would fail again must have another status.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = code


class ErrorFields(Struct):
    """What went wrong."""

    message: str
    type: str
    param: Annotated[str | None, Meta(description="the field that is wrong, such as messages[0].content")]
    code: Annotated[str | None, Meta(description="such as context_length_exceeded or model_not_found")]


class ErrorBody(Struct):
    """The body of every reply from 400 on; in a stream that breaks, its last frame."""

    error: ErrorFields


def as_api_error(error: Exception) -> ApiError:
    """`error` as a client may see it: requests that are at fault get a 400, an engine that is short of something a
    503, and what is neither a 500 that tells nothing of the server's insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | UnsupportedError):
        return ApiError(str(error))
    if isinstance(error, OverloadError):
        return ApiError(str(error), status=429, type="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, CapacityError | EngineDownError):
        return ApiError(str(error), status=503, type="server_error")
    message = str(error) if isinstance(error, StropError) else "the server failed; its log says why"
    return ApiError(message, status=500, type="server_error")


def error_fields(error: Exception) -> ErrorFields:
    """The value of `error` in a body or a frame."""
    known = as_api_error(error)
    return ErrorFields(known.message, known.type, known.param, known.code)


def error_body(error: Exception) -> bytes:
    """`{"error": {...}}`."""
    try:
        return msgspec.json.encode(ErrorBody(error_fields(error)))
    except UnicodeEncodeError:  # a message may quote what is no text
        message = str(error).encode("utf-8", "replace").decode()
        known = as_api_error(error)
        return msgspec.json.encode(ErrorBody(ErrorFields(message, known.type, known.param, known.code)))


def context_overflow(prompt_len: int, max_tokens: int | None, context_len: int, param: str) -> ApiError:
    """For a prompt that leaves no room for the answer that was asked for."""
    wish = f" and the answer may have {max_tokens}" if max_tokens is not None else ", and an answer needs one"
    return ApiError(
        f"the prompt has {prompt_len} tokens{wish}, but this model's context is {context_len} tokens: shorten the "
        "prompt or lower max_tokens; nothing is ever cut off",
        param=param,
        code="context_length_exceeded",
    )
