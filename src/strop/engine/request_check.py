"""Whether a request can ever be served as asked, before anything is kept of it."""

from strop.core.errors import RequestError
from strop.core.request import Request


def answer_room(request: Request, max_context_len: int, max_cached_tokens: int, block_len: int) -> int:
    """Tokens that this request may generate; RequestError if prompt and answer cannot fit.

    Args:
        request: what is asked.
        max_context_len: of prompt and answer together.
        max_cached_tokens: of one sequence, that the whole cache holds.
        block_len: tokens of a cache block.
    """
    params, prompt_len = request.params, len(request.prompt_token_ids)
    max_request_tokens = min(max_context_len, max_cached_tokens + 1)  # the last token is never computed
    if prompt_len == 0:
        raise RequestError("the prompt is empty: give at least one token")
    if prompt_len >= max_context_len:
        raise RequestError(
            f"the prompt has {prompt_len} tokens, but the context is {max_context_len} tokens, of which the "
            "answer needs at least one: shorten the prompt or raise max_context_len"
        )
    max_tokens = params.max_tokens
    if max_tokens is None:
        max_tokens = max(1, max_request_tokens - prompt_len, params.min_tokens)
    wish = f"prompt ({prompt_len} tokens) + answer ({max_tokens} tokens) = {prompt_len + max_tokens} tokens"
    if prompt_len + max_tokens > max_context_len:
        raise RequestError(
            f"{wish}, but the context is {max_context_len} tokens: lower max_tokens or min_tokens, shorten "
            "the prompt, or raise max_context_len"
        )
    if prompt_len + max_tokens > max_cached_tokens + 1:
        raise RequestError(
            f"{wish}, but the whole cache holds {max_cached_tokens + 1} tokens ({max_cached_tokens // block_len} "
            f"blocks of {block_len}): lower max_tokens or min_tokens, shorten the prompt, or give the cache more memory"
        )
    return max_tokens


def check_spans(prompt_len: int, atomic_spans: tuple[tuple[int, int], ...], max_step_tokens: int) -> None:
    """RequestError unless the spans lie in the prompt in order, and each fits a step."""
    previous_end = 0
    for lo, hi in atomic_spans:
        if not previous_end <= lo < hi <= prompt_len:
            raise RequestError(
                f"atomic span [{lo}, {hi}) must be non-empty, inside the prompt of {prompt_len} tokens, and start "
                f"at {previous_end} or later (after the span before it)"
            )
        if hi - lo > max_step_tokens:
            raise RequestError(
                f"tokens [{lo}, {hi}) must be computed in one step: {hi - lo} tokens, but a step takes at most "
                f"{max_step_tokens}: raise max_step_tokens or shorten the prompt"
            )
        previous_end = hi
