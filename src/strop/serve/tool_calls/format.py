"""Which form of tool call a model is taught, by its chat template or else by us. Pure."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes a call, and who tells it so."""

    form: Literal["hermes", "llama3"]
    """hermes: `<tool_call>`, an object with `name` and `arguments`, `</tool_call>`, once for each call, text before.
    llama3: an object with `name` and `parameters` on a line of its own, several separated by `;`."""
    taught: bool
    """By the chat template, which is given the tools; else tool_template_messages teaches it, and a grammar helps."""
    special_tokens: frozenset[str] = frozenset()
    """Which of the form's markers are control tokens: an answer's text must keep them (skip_special_tokens=False)."""


def tool_format(chat_template: str | None, special_tokens: Collection[str] = ()) -> ToolFormat:
    """The form that `chat_template` teaches, read off its text; hermes, not taught, where it teaches neither.

    `chat_template` is the one that is rendered with tools; `special_tokens` are the texts of the tokenizer's.
    """
    markers = frozenset(special_tokens) & {OPENING, CLOSING}
    source = (chat_template or "").replace('\\"', '"').replace("\\n", "\n")
    if _TOOLS.search(source):
        if _HERMES.search(source):
            return ToolFormat("hermes", True, markers)
        if _LLAMA3.search(source):
            return ToolFormat("llama3", True)
    return ToolFormat("hermes", False, markers)


# What a template says of the form, or writes for a call of the past. Between its parts there may be the template's own
# punctuation; models of other forms put something else between the markers, or the schema of a function between braces.
_TOOLS = re.compile(r"\btools\b")
_HERMES = re.compile(OPENING + r"""[\s'"{}~+-]{0,80}\{\s*"name":(?s:.{0,160}?)"arguments":""")
_LLAMA3 = re.compile(r'\{"name": [^"{}]{0,80}"parameters":')
