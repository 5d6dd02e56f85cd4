"""All that a server does for one model's tool calls. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strop.core.request import StructuredOutputsParams
from strop.serve.tool_calls.format import ToolFormat
from strop.serve.tool_calls.grammar import tool_grammar
from strop.serve.tool_calls.messages import Message, template_tools, tool_template_messages
from strop.serve.tool_calls.parser import ToolCallParser
from strop.serve.tool_calls.tools import Tools


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """Calls in the form that the model writes. Where a request has no tools, or none may be called, `tools` is None."""

    form: ToolFormat

    def template_tools(self, tools: Tools | None) -> list[dict[str, Any]] | None:
        """What the chat template gets as `tools`."""
        return template_tools(tools, self.form)

    def messages(self, messages: Sequence[Message], tools: Tools | None) -> list[dict[str, Any]]:
        """What the chat template gets as `messages`; needed for past calls even without tools."""
        return tool_template_messages(messages, tools, self.form)

    def grammar(self, tools: Tools) -> StructuredOutputsParams | None:
        """What the answer must look like; None where it is free. RequestError for what cannot be enforced."""
        return tool_grammar(tools, self.form)

    def parser(self, tools: Tools) -> ToolCallParser:
        """For one choice's text."""
        return ToolCallParser(
            self.form,
            [function.name for function in tools.functions],
            tools.parallel,
            only_calls=tools.choice == "required",
            calls_or_text=tools.shape is not None,
        )
