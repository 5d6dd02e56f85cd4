"""How many requests may wait: a queue with an end, and an honest word on when to come back."""

import math
import time
from collections import deque

from strop.core.errors import OverloadError
from strop.engine.messages import Expected

QUEUE_S = 60.0
"""What may wait takes the engine so long, where that is known."""
UNPLANNED_REQUESTS, UNPLANNED_TOKENS = 128, 131_072

_RATE_WINDOW_S = 60.0
_LONGEST_WAIT_S = 120.0  # official clients do not obey a longer one


class Admission:
    """Counts what waits for its first token, in requests and in prompt tokens."""

    def __init__(self, max_requests: int = 0, max_tokens: int = 0) -> None:
        """0: as many as `expect` says, or the UNPLANNED."""
        self.num_requests = 0
        self.num_tokens = 0
        self.num_rejected = 0
        self._given = max_requests, max_tokens
        self.expect(None)
        self._starts: deque[tuple[float, int]] = deque(maxlen=4096)
        """When requests got their first tokens, and how many tokens their prompts had."""

    def expect(self, expected: Expected | None) -> None:
        """What is not given is a minute's work by this."""
        requests, tokens = UNPLANNED_REQUESTS, UNPLANNED_TOKENS
        if expected is not None:
            requests = math.ceil(QUEUE_S * expected.requests_per_s)
            tokens = math.ceil(QUEUE_S * expected.prompt_tokens_per_s)
        self._max_requests = self._given[0] or requests
        self._max_tokens = self._given[1] or tokens

    def enter(self) -> "Ticket":
        """A place in the queue; OverloadError if there is none."""
        if self.num_requests >= self._max_requests:
            self._reject(f"{self.num_requests} requests are waiting", self._wait_s(1, 0))
        self.num_requests += 1
        return Ticket(self)

    def weigh(self, num_tokens: int) -> None:
        """Whether so many prompt tokens may wait too; OverloadError if not. A queue that is empty takes any."""
        if self.num_tokens and self.num_tokens + num_tokens > self._max_tokens:
            self._reject(f"prompts of {self.num_tokens} tokens are waiting", self._wait_s(0, num_tokens))

    def started(self, num_tokens: int) -> None:
        """One has got its first token."""
        self._starts.append((time.monotonic(), num_tokens))

    def _reject(self, why: str, wait_s: int) -> None:
        self.num_rejected += 1
        raise OverloadError(f"the server is busy: {why}; try again in {wait_s} s", wait_s)

    def _wait_s(self, num_requests: int, num_tokens: int) -> int:
        """Until there is room for these, at the rate of the last minute."""
        now_s = time.monotonic()
        recent = [start for start in self._starts if now_s - start[0] < _RATE_WINDOW_S]
        if len(recent) < 2:
            return 5
        span_s = now_s - recent[0][0]
        excess_tokens = self.num_tokens + num_tokens - self._max_tokens
        waits = (num_requests * span_s / len(recent), excess_tokens * span_s / max(1, sum(n for _, n in recent)))
        return math.ceil(min(max(*waits, 1.0), _LONGEST_WAIT_S))


class Ticket:
    """One request's place in the queue."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._num_tokens = 0
        self._is_waiting = True

    def weigh(self, num_tokens: int) -> None:
        """Its prompts have so many tokens. OverloadError if the queue cannot take them."""
        self._admission.weigh(num_tokens)
        self._num_tokens = num_tokens
        self._admission.num_tokens += num_tokens

    def start(self) -> None:
        """The first token is there."""
        if self._is_waiting:
            self._admission.started(self._num_tokens)
            self.leave()

    def leave(self) -> None:
        """It waits no more."""
        if self._is_waiting:
            self._is_waiting = False
            self._admission.num_requests -= 1
            self._admission.num_tokens -= self._num_tokens
