"""What a model writes, as chat replies and responses give it: thoughts, text and calls."""

from collections.abc import Sequence
from dataclasses import dataclass

from strop.core.request import Delta, SamplingParams
from strop.serve.openai.exchange import Served
from strop.serve.openai.reasoning import ThoughtSplitter, opens_thoughts
from strop.serve.tool_calls import ToolDelta, Tools


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what the model thinks before it answers."""

    text: str


Piece = Thought | ToolDelta | str
"""None is empty."""


def answer_start(
    served: Served, params: SamplingParams, prompt_token_ids: Sequence[int]
) -> tuple[SamplingParams, bool]:
    """The parameters of an answer to this prompt, and whether it begins inside thoughts."""
    if served.thinking is None:
        return params, False
    prompt_end = served.text_end(prompt_token_ids)
    return served.thinking.params(params, prompt_end), opens_thoughts(prompt_end)


class AnswerReader:
    """Reads one choice. However its text is cut into deltas, the pieces add up to the same."""

    def __init__(self, served: Served, tools: Tools | None, is_thinking: bool) -> None:
        """`tools` may be called. `is_thinking`: the prompt has begun the thoughts."""
        self.has_calls = False
        self.has_thought = False
        """Whether the last delta belonged to the thoughts, at least in part."""
        self._splitter = ThoughtSplitter(is_thinking) if served.thinking is not None else None
        self._parser = served.tools.parser(tools) if tools is not None else None

    def read(self, delta: Delta) -> list[Piece]:
        """What `delta` makes certain, in order."""
        text, ended = delta.text, delta.finish_reason is not None
        pieces: list[Piece] = []
        if self._splitter is not None:
            was_thinking = self._splitter.is_thinking
            thought, text = self._splitter.push(text, ended)
            self.has_thought = was_thinking or self._splitter.is_thinking or bool(thought)
            pieces += [Thought(thought)] if thought else []
        if self._parser is None:
            return [*pieces, text] if text else pieces
        is_cut = delta.finish_reason in ("length", "abort") or isinstance(delta.stop_reason, str)
        calls = [piece for piece in self._parser.push(text, ended, cut=is_cut) if piece]
        self.has_calls = self.has_calls or any(isinstance(piece, ToolDelta) for piece in calls)
        return [*pieces, *calls]
