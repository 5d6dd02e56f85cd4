"""Grammars that make a model write its calls as they must be. Pure."""

import json

from strop.core.request import StructuredOutputsParams
from strop.serve.tool_calls.format import CLOSING, OPENING, ToolFormat
from strop.serve.tool_calls.tools import Tools

# As json.dumps and the templates' tojson write, which is what models have seen; and without room for endless spaces.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_grammar(tools: Tools, form: ToolFormat) -> StructuredOutputsParams | None:
    """What the answer must look like, in the Lark notation of llguidance; None where the model is free.

    It is free where it may answer in text, its chat template teaches it to call, and no function is strict. Else it
    calls with arguments that fit the schemas, once at most unless `tools.parallel`, and writes text only with "auto".
    In llama3's form such text has no line that begins with a brace or a bracket: it could be a call.
    """
    functions = tools.functions
    if tools.choice == "auto" and form.taught and not any(function.strict for function in functions):
        return None
    rules = _hermes(tools, form.special_tokens) if form.form == "hermes" else _llama3(tools)
    key = "arguments" if form.form == "hermes" else "parameters"
    rules.append("object: " + " | ".join(f"object_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        start = json.dumps(f'{{"name": "{function.name}", "{key}": ')
        schema = json.dumps({**function.parameters, "x-guidance": _SPACING})
        rules += [f'object_{i}: {start} arguments_{i} "}}"', f"arguments_{i}: %json {schema}"]
    return StructuredOutputsParams(grammar="\n".join(rules) + "\n")


def _hermes(tools: Tools, special_tokens: frozenset[str]) -> list[str]:
    """Control tokens are no text: a grammar names them without quotes."""
    opening, closing = (marker if marker in special_tokens else f'"{marker}"' for marker in (OPENING, CLOSING))
    rest = f'rest: "\\n" object "\\n" {closing}'
    if tools.choice == "required":
        more = ' ("\\n" call)*' if tools.parallel else ""
        return [f"start: call{more}", f"call: {opening} rest", rest]
    begun = f"begun: spelled | TEXT {opening}" if OPENING in special_tokens else "begun: spelled"
    spelled = f'spelled[lazy]: TEXT "{OPENING}"'
    start = "start: (begun rest)* TEXT" if tools.parallel else "start: begun rest | TEXT"
    return [start, begun, spelled, r"TEXT: /(.|\n)*/", rest]


def _llama3(tools: Tools) -> list[str]:
    calls = 'calls: object ("; " object)*' if tools.parallel else "calls: object"
    if tools.choice == "required":
        return ["start: calls", calls]
    text = r"TEXT: /(?s:.*)/ & ~/(?s:(.*\n)?[ \t\r]*[{\[].*)/ & ~/(?s:.*<\|python_tag\|>.*)/"
    return ["start: calls | TEXT", calls, text]
