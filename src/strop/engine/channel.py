"""Messages between the processes of a group, over TCP. A peer that ends, or falls silent, is noticed. No jax."""

import socket
import struct

import msgspec

from strop.core.config import EngineConfig
from strop.engine.pack import StepShape


class HostArray(msgspec.Struct, array_like=True):
    """A numpy array."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Hello(msgspec.Struct, tag=True, array_like=True):
    """The first word of a process that wants to follow."""

    version: str
    num_processes: int
    process_id: int


class Refused(msgspec.Struct, tag=True, array_like=True):
    """Why it may not."""

    reason: str


class Welcome(msgspec.Struct, tag=True, array_like=True):
    """Everybody has come: what to run, and where jax's own coordinator is."""

    config: EngineConfig
    jax_address: str


class Ready(msgspec.Struct, tag=True, array_like=True):
    """The model is loaded."""

    platform: str
    model_hash: str
    num_blocks: int
    """Of the cache: as many as there is room for here."""


class NewCaches(msgspec.Struct, tag=True, array_like=True):
    """Make empty caches, instead of those there are."""

    num_blocks: list[int]


class Step(msgspec.Struct, tag=True, array_like=True):
    """Make a step (CompiledModel.step)."""

    shape: StepShape
    ints: HostArray
    inputs: list[HostArray]
    """The fields of SampleInputs; empty when every row is plainly greedy."""
    num_top: int


class Score(msgspec.Struct, tag=True, array_like=True):
    """Compute logits (CompiledModel.logits)."""

    shape: StepShape
    ints: HostArray


class CopyBlock(msgspec.Struct, tag=True, array_like=True):
    """Copy a block of a cache over another."""

    group: int
    source: int
    destination: int


class End(msgspec.Struct, tag=True, array_like=True):
    """Nothing more comes."""


Call = NewCaches | Step | Score | CopyBlock | End
Message = Hello | Refused | Welcome | Ready | Call

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode
_HEAD = struct.Struct("<Q")
_MAX_MESSAGE_BYTES = 1 << 30
_SILENCE_S = 20
"""After which a host that does not even acknowledge counts as lost."""


class Channel:
    """One TCP connection. Whatever goes wrong is an OSError: the connection is then of no more use."""

    def __init__(self, connection: socket.socket, max_message_bytes: int = _MAX_MESSAGE_BYTES) -> None:
        self._socket, self._max_message_bytes = connection, max_message_bytes
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("KEEPIDLE", 5), ("KEEPINTVL", 5), ("KEEPCNT", 3), ("USER_TIMEOUT", 1000 * _SILENCE_S)):
            if hasattr(socket, f"TCP_{name}"):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)

    def fileno(self) -> int:
        """Readable when there is a message, or the peer is gone."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Returns when it is on its way. TimeoutError when the peer does not read."""
        data = _encode(message)
        self._socket.settimeout(_SILENCE_S)
        self._socket.sendall(_HEAD.pack(len(data)) + data)

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message. TimeoutError if it takes longer; ConnectionError if it is nonsense, or the peer is gone."""
        self._socket.settimeout(timeout_s)
        (length,) = _HEAD.unpack(self._read(_HEAD.size))
        if length > self._max_message_bytes:
            raise ConnectionError(f"a message of {length} bytes, where {self._max_message_bytes} are the most")
        try:
            return _decode(self._read(length))
        except msgspec.MsgspecError as error:
            raise ConnectionError(f"not a message of this Strop's ({error})") from None

    def close(self) -> None:
        """The peer sees the end."""
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        read, into = 0, bytearray(length)
        while read < length:
            count = self._socket.recv_into(memoryview(into)[read:])
            if not count:
                raise ConnectionError("the connection was closed")
            read += count
        return into
