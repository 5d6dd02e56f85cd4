"""How a server is to run: small, frozen, plain data."""

from dataclasses import dataclass
from pathlib import Path

from strop.core.config import MIB
from strop.engine.loading import Runner


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """Everything about serving but the engine's own settings. The defaults are safe on a machine that others use."""

    model_names: tuple[str, ...]
    """What requests may call the model; the first is what answers call it."""
    runner: Runner = "auto"
    """Whether to write or to make vectors."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    api_keys: Path | None = None
    """File with hashed keys (strop.serve.keys); None: whoever reaches the port may ask."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server."""
    splits_thoughts: bool = True
    """Whether what a model thinks between <think> tags is given as reasoning_content, and not in its answers' text."""
    max_body_bytes: int = 4 * MIB
    max_queued_requests: int = 0
    """Requests that wait for their first token; one more is answered with 429. 0: a minute's work, by the machine's
    plan."""
    max_queued_tokens: int = 0
    """Prompt tokens that these may have in all. 0: likewise."""
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    """For a request's body to arrive."""
    drain_s: float = 30.0
    """On SIGTERM, for the requests at hand to end."""
    step_deadline_s: float = 60.0
    """A step that takes longer makes the server unready."""
    price_per_hour: float | None = None
    """Of the machine, in any currency."""
