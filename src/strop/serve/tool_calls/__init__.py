"""Tools that a model may call: how it is told of them, made to call them, and understood. Pure."""

from strop.serve.tool_calls.format import ToolFormat, tool_format
from strop.serve.tool_calls.parser import ToolCallParser, ToolDelta
from strop.serve.tool_calls.support import ToolSupport
from strop.serve.tool_calls.tools import Function, Tools

__all__ = ["Function", "ToolCallParser", "ToolDelta", "ToolFormat", "ToolSupport", "Tools", "tool_format"]
