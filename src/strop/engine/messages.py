"""What a front end and the engine's process say to each other, as MessagePack. No jax."""

import msgspec

from strop.core.errors import StropError
from strop.core.request import EmbeddingRequestOutput, Request, TokenEvent


class Add(msgspec.Struct, tag=True, array_like=True):
    """Answer this."""

    request: Request


class Abort(msgspec.Struct, tag=True, array_like=True):
    """Drop one choice of a request, or all. Unknown or finished: nothing happens."""

    request_id: str
    index: int | None = None


class Embed(msgspec.Struct, tag=True, array_like=True):
    """Make a vector of each text; of an engine that was loaded to pool."""

    request_id: str
    texts: list[str | tuple[int, ...]]
    """Or token ids, special ones included."""


Command = Add | Abort | Embed


class Expected(msgspec.Struct, frozen=True):
    """What a machine should do with a model, where it was planned for."""

    requests_per_s: float
    """Of the usual lengths."""
    prompt_tokens_per_s: float
    words: str
    """The plan."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What a front end needs to know of the engine that was loaded."""

    vocab_size: int
    max_context_len: int
    max_request_tokens: int
    """Prompt and answer of one request, at most."""
    max_num_seqs: int
    num_blocks: int
    """Usable ones, of all groups of layers."""
    weight_bytes: int
    cache_bytes_per_token: int
    memory: str
    """The memory plan in words."""
    isa: str
    """Of the native kernels, or "xla"."""
    embedding_len: int | None = None
    """Numbers of a vector, of an engine that was loaded to pool; None: it was loaded to write."""
    expected: Expected | None = None


class EngineStats(msgspec.Struct, array_like=True):
    """The engine's state after a step."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0
    num_leaked_blocks: int = 0
    """Used by nobody, and not free: always 0 unless there is a bug. Counted whenever the engine becomes idle."""
    cache_use: float = 0.0
    """Of the fullest group of layers, 0 to 1."""
    num_preemptions: int = 0
    num_prefix_query_tokens: int = 0
    """Tokens that were looked for in the prefix cache,"""
    num_prefix_hit_tokens: int = 0
    """and those that were found."""
    num_step_tokens: int = 0
    step_s: float = 0.0
    limit_s: float = 0.0
    """The least that the step could have taken on this machine; 0 where that is not known."""


class Loaded(msgspec.Struct, tag=True, array_like=True):
    """The engine takes requests from now on."""

    facts: ModelFacts


class Failed(msgspec.Struct, tag=True, array_like=True):
    """A request was refused or lost; without an id, the engine itself could not be made."""

    request_id: str | None
    kind: str
    """The error's class, in strop.core.errors."""
    message: str


class Stepped(msgspec.Struct, tag=True, array_like=True):
    """All that one step brought; and, without events, the state of an engine that became idle."""

    events: list[TokenEvent]
    stats: EngineStats


class Embedded(msgspec.Struct, tag=True, array_like=True):
    """What an Embed asked for, in its order."""

    request_id: str
    outputs: list[EmbeddingRequestOutput]


class Alive(msgspec.Struct, tag=True, array_like=True):
    """Sent twice a second by a thread that does nothing else."""

    step_age_s: float | None
    """How long the present step has been running; None between steps."""


Message = Loaded | Failed | Stepped | Embedded | Alive

HEARTBEAT_S = 0.5

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_message = msgspec.msgpack.Decoder(Message).decode


def failed(error: Exception, request_id: str | None = None) -> Failed:
    """The message that tells of an error; one that is not Strop's own is told as StropError."""
    if isinstance(error, StropError):
        return Failed(request_id, type(error).__name__, str(error))
    return Failed(request_id, "StropError", f"{type(error).__name__}: {error}")
