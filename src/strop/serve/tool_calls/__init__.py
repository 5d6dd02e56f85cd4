"""Tools that a model may call: what a request offers, how a model writes a call, and its text into calls. Pure."""

from strop.serve.tool_calls.format import ToolFormat, tool_format
from strop.serve.tool_calls.parser import ToolCallParser, ToolDelta
