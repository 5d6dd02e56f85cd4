"""What a model thinks before it answers, between `<think>` and `</think>`, told apart from the answer. Pure."""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace

from strop.core.request import SamplingParams, StructuredOutputsParams
from strop.engine.ecma_regex import rust_regex
from strop.engine.json_schema import parse_schema

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ThinkTags:
    """That a model may think."""

    special_tokens: frozenset[str] = frozenset()
    """Which of the tags are control tokens: an answer's text must keep them (skip_special_tokens=False)."""

    def params(self, params: SamplingParams, prompt_end: str) -> SamplingParams:
        """`params` for an answer that may begin with thoughts: if it is to have a shape, then after them."""
        shape = params.structured_outputs
        if shape is not None and not prompt_end.rstrip().endswith(CLOSING):
            shape = self.grammar(shape, opens_thoughts(prompt_end))
        keeps = params.skip_special_tokens and not self.special_tokens
        return replace(params, structured_outputs=shape, skip_special_tokens=keeps)

    def grammar(self, shape: StructuredOutputsParams, is_open: bool) -> StructuredOutputsParams:
        """For an answer of `shape` after thoughts, in the Lark notation of llguidance.

        `is_open`: the prompt has opened them, and so they must be closed; else the model may open them or not.
        """
        # A tag that is a control token can also be spelled in letters, and ends the thoughts just as well.
        ends = ["spelled", f"TEXT {CLOSING}"] if CLOSING in self.special_tokens else ["spelled"]
        opening = OPENING if OPENING in self.special_tokens else f'"{OPENING}"'
        rules = [
            f"start: {'thoughts' if is_open else f'({opening} thoughts)?'} answer",
            f"thoughts: ({' | '.join(ends)}) SPACE?",
            f'spelled[lazy]: TEXT "{CLOSING}"',
            r"TEXT: /(.|\n)*/",
            r"SPACE: /[ \n]{1,4}/",
            _answer(shape),
        ]
        return StructuredOutputsParams(grammar="\n".join(rules) + "\n")


def think_tags(chat_template: str, special_tokens: Collection[str]) -> ThinkTags | None:
    """Those of a model whose template or control tokens show them; None for others."""
    markers = frozenset(special_tokens) & {OPENING, CLOSING}
    return ThinkTags(markers) if markers or CLOSING in chat_template else None


def opens_thoughts(prompt_end: str) -> bool:
    """Whether the answer to a prompt that ends so begins inside thoughts."""
    return prompt_end.rstrip().endswith(OPENING)


class ThoughtSplitter:
    """Splits one choice's text into thoughts and the answer. However it is cut, the pieces add up to the same.

    Thoughts are what the tags enclose at the beginning of the text; those that never end are all there is. White space
    between tags and text belongs to neither side.
    """

    def __init__(self, is_open: bool) -> None:
        """`is_open`: the prompt ends with the opening tag."""
        self.is_thinking = is_open
        """Whether what comes next is a thought, as far as is known."""
        self._is_open = is_open
        self._held = ""
        """What may belong to a tag, or to the white space beside one."""
        self._is_at_start = True
        self._said = False

    def push(self, text: str, ended: bool = False) -> tuple[str, str]:
        """(thoughts, answer) that `text` makes certain. `ended` with the last text, for what was held back."""
        text = self._held + text
        self._held = ""
        if self._is_at_start:
            begun = text.lstrip()
            if OPENING.startswith(begun[: len(OPENING)]) and len(begun) < len(OPENING) and not ended:
                self._held = text
                return "", ""
            self._is_at_start = False
            self.is_thinking = self._is_open or begun.startswith(OPENING)
            if not self.is_thinking:
                self._said = True
                return "", text
            text = begun.removeprefix(OPENING)
        return self._split(text, ended) if self.is_thinking else ("", self._answer(text))

    def _split(self, text: str, ended: bool) -> tuple[str, str]:
        if not self._said:
            text = text.lstrip()
        thoughts, tag, answer = text.partition(CLOSING)
        if tag:
            self.is_thinking = self._said = False
            return thoughts.rstrip(), self._answer(answer)
        certain = text[: len(text) - _num_tag_characters(text)].rstrip()
        if ended:
            return text.rstrip(), ""
        self._held = text[len(certain) :]
        self._said = self._said or bool(certain)
        return certain, ""

    def _answer(self, text: str) -> str:
        if not self._said:
            text = text.lstrip()
            self._said = bool(text)
        return text


def _num_tag_characters(text: str) -> int:
    """At the end of `text`, that may be the beginning of the closing tag."""
    return next((size for size in range(len(CLOSING) - 1, 0, -1) if text.endswith(CLOSING[:size])), 0)


def _answer(shape: StructuredOutputsParams) -> str:
    if shape.regex is not None:  # the lexer would take thoughts for what matches
        return f"answer: REGEX\nREGEX: /{rust_regex(shape.regex)}/ & ~/(?s:{OPENING}.*)/"
    if shape.choice is not None:
        return f"answer: {' | '.join(map(json.dumps, dict.fromkeys(shape.choice)))}"
    if shape.grammar is not None:
        return f"answer: %lark {{\n{shape.grammar}\n}}"
    parse_schema(shape.schema or "")  # what is one value of JSON cannot end the rule
    return f"answer: %json {shape.schema}"
