"""What `strop chat` keeps between two lines: the conversation, the sampling parameters, the last answer."""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from strop.cli.answer import Answer
from strop.cli.conversation import Conversation, Message
from strop.cli.options import sampling_params
from strop.core.errors import RequestError

if TYPE_CHECKING:  # loads jax, which a start waits for
    from strop.engine.engine import Engine


class ChatSession:
    """One conversation with one model."""

    def __init__(
        self,
        engine: "Engine",
        model_name: str,
        *,
        system: str | None,
        chat_template: str | None,
        settings: Mapping[str, Any],
        options: Mapping[str, click.Option],
    ) -> None:
        """`settings` are the values of the sampling `options`. Raises what the template says to a first message."""
        self.model_name = model_name
        self.conversation = Conversation(system)
        self._engine = engine
        self._chat_template = chat_template
        self._settings = self._first_settings = {name: settings[name] for name in options}
        self._options = options
        self._last: Answer | None = None
        self._prompt([*self.conversation.messages, _from_user("Hello")])

    @property
    def max_tokens(self) -> int:
        """What the conversation and the next answer may take together."""
        return self._engine.scheduler.max_request_tokens

    def ask(self, text: str, on_text: Callable[[str], None], is_stopped: Callable[[], bool]) -> str | None:
        """Answers; what has come so far of a stopped answer is kept. Returns why the answer is not whole, if so.

        RequestError, and the conversation as before, where it cannot be answered.
        """
        messages = [*self.conversation.messages, _from_user(text)]
        token_ids = self._prompt(messages)
        room = self.max_tokens - len(token_ids)
        if room < 1:
            raise RequestError(
                f"the chat would be {len(token_ids)} tokens with this message, and there is room for "
                f"{self.max_tokens}, the answer included: {self._cure([messages[-1]])}"
            )
        params = sampling_params(self._settings)
        max_tokens = min(params.max_tokens or room, room)
        answer = Answer(self._engine)
        try:
            answer.stream(token_ids, replace(params, max_tokens=max_tokens), on_text, is_stopped)
        except KeyboardInterrupt:
            if not is_stopped():
                raise
            answer.finish_reason = "abort"
        stopped = answer.finish_reason == "abort"
        if stopped and not answer.text:
            return "[stopped before the answer began; the message is not kept]"
        self._last = answer
        self.conversation.messages = [*messages, {"role": "assistant", "content": answer.text}]
        if stopped:
            return "[stopped]"
        if answer.finish_reason != "length":
            return None
        if max_tokens < room:
            return f"[cut off: max_tokens={max_tokens}; /params max_tokens=0 takes the limit away]"
        return f"[cut off: the {self.max_tokens} tokens there is room for are full; {self._cure([])}]"

    def set_param(self, name: str, text: str) -> None:
        """Sets a sampling parameter as its flag would; an empty text sets it as at the start. RequestError if wrong."""
        option = self._options.get(name)
        if option is None:
            raise RequestError(f"there is no parameter {name!r}: choose from {', '.join(self._options)}")
        try:
            value = (text,) if option.multiple else option.type.convert(text, option, None) if text else None
        except click.BadParameter as error:
            raise RequestError(f"{name}={text} is not accepted: {error.message}") from None
        changed = self._settings | {name: value if text else self._first_settings[name]}
        sampling_params(changed)  # refuses what is out of range
        self._settings = changed

    def params(self) -> str:
        """The sampling parameters, one a line."""
        return "\n".join(f"{name}={_shown(value)}" for name, value in self._settings.items())

    def stats(self) -> str:
        """The last answer's figures, and how full the context is."""
        num_tokens = len(self._prompt(self.conversation.messages)) if self.conversation.num_turns else 0
        chat = f"chat: {self.conversation.num_turns} turns, {num_tokens} of {self.max_tokens} tokens"
        if self._last is None:
            return chat
        last = self._last
        return (
            f"last answer: {last.speed()}; first token after {last.ttft_s * 1e3:.0f} ms\n"
            f"its prompt: {last.num_prompt_tokens} tokens, {last.num_cached_tokens} of them reused\n{chat}"
        )

    def _prompt(self, messages: list[Message]) -> tuple[int, ...]:
        from strop.engine.text import prepare_prompt

        engine = self._engine
        return prepare_prompt(
            engine.tokenizer, messages, vocab_size=engine.spec.vocab_size, chat_template=self._chat_template
        )

    def _cure(self, added: list[Message]) -> str:
        """How to make room for `added` and an answer of a quarter of the context."""
        num_turns = self.conversation.num_turns

        def fits(num_forgotten: int) -> bool:
            if num_forgotten == num_turns and not added:
                return True  # a template may refuse to render no turn at all
            kept = self.conversation.after_forgetting(num_forgotten) + added
            return len(self._prompt(kept)) <= self.max_tokens * 3 // 4

        num_forgotten = bisect_left(range(num_turns), True, key=lambda n: fits(n + 1)) + 1
        if num_forgotten <= num_turns:
            return f"/forget {num_forgotten} drops enough of the oldest turns ({num_turns} in all), /reset drops all"
        if self.max_tokens == self._engine.spec.max_context_len:
            return "shorten it: the model itself has no room for more"
        return "shorten it, or start again with a larger --context or --memory"


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}


def _shown(value: Any) -> str:
    return "" if value in (None, ()) else " ".join(value) if isinstance(value, tuple) else str(value)
