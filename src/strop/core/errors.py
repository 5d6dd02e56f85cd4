"""Errors a user can act on: each message names the cause, the value, what is accepted, and the cure."""


class StropError(Exception):
    """Root of every error that Strop raises on purpose."""


class FormatError(StropError):
    """A file is damaged, truncated, hostile, or not what its name says."""


class UnsupportedError(StropError):
    """A well-formed model asks for something Strop does not do (a config key, a tensor type, a family)."""


class CapacityError(StropError):
    """What was asked does not fit the memory, the context or the disk."""


class RequestError(StropError):
    """One request is impossible or malformed; the engine goes on."""


class EngineDownError(StropError):
    """The engine's process is not there, or was lost with the request: the same request may succeed later."""


class OverloadError(StropError):
    """The queue is full."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerError(StropError):
    """Another server cannot be reached, refused a request, or broke its answer off."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        """A few words to count failures by: `connection`, `HTTP 429`, `time-out`."""
        self.message = message
