"""One streamed answer and its timings."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from strop.core.errors import StropError
from strop.core.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:  # loads jax, which a start waits for
    from strop.engine.engine import Engine

_REQUEST_ID = "answer"


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C makes the function it gives true; pressed again, it raises KeyboardInterrupt.

    An exception in the midst of a step would cost the prefix cache, or be lost in a callback that Python ignores.
    """
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


class Answer:
    """What `stream` has received so far; moments are those of time.perf_counter."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        """Prompt tokens that were not computed again: they came from the prefix cache."""
        self.ready_s = self.first_s = self.end_s = 0.0

    def stream(
        self,
        token_ids: tuple[int, ...],
        params: SamplingParams,
        on_text: Callable[[str], None],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generates the answer to a prompt. Stopped between two steps, it ends with `finish_reason="abort"`.

        The engine is idle afterwards, whatever is raised. StropError where the engine gave up, RequestError where it
        refused.
        """
        from strop.engine.text import StreamDetokenizer, must_abort

        engine, texts = self._engine, StreamDetokenizer(self._engine.tokenizer, params)
        self.num_prompt_tokens = len(token_ids)
        self.ready_s = time.perf_counter()
        engine.add(Request(_REQUEST_ID, token_ids, params))
        try:
            while engine.has_unfinished:
                if is_stopped():
                    self.finish_reason = "abort"
                    break
                for event in engine.step():
                    self.first_s = self.first_s or time.perf_counter()
                    delta = texts.push(event)
                    if delta is None:
                        continue
                    if must_abort(event, delta):
                        engine.abort(_REQUEST_ID)
                    self.text += delta.text
                    self.token_ids += delta.token_ids
                    self.finish_reason = delta.finish_reason
                    self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
                    if delta.finish_reason == "abort":
                        raise StropError(str(delta.stop_reason))
                    on_text(delta.text)
        finally:
            engine.abort(_REQUEST_ID)
            self.end_s = time.perf_counter()

    @property
    def ttft_s(self) -> float:
        """From the prompt's tokens to the first token of the answer."""
        return self.first_s - self.ready_s

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens after the first, over the time they took."""
        return (len(self.token_ids) - 1) / max(self.end_s - self.first_s, 1e-9)

    def speed(self) -> str:
        """Tokens, tokens/s and, for more than a few, the share of this machine's limit."""
        share = f", {self._share_of_limit():.0%} of this machine's limit" if len(self.token_ids) > 8 else ""
        return f"{len(self.token_ids)} tokens, {self.tokens_per_s:.1f} tokens/s{share}"

    def _share_of_limit(self) -> float:
        """Measured tokens/s over what reading the weights and the cache once per token allows here."""
        from strop.machine.probe import read_bandwidth_bytes_per_s

        memory = self._engine.memory
        context_len = self.num_prompt_tokens + len(self.token_ids) // 2
        step_bytes = memory.weight_bytes + memory.visible_bytes(context_len)
        return self.tokens_per_s * step_bytes / read_bandwidth_bytes_per_s(step_bytes)
