"""Grammars that make a model write its calls as they must be. Pure."""

import json
import re
from typing import Any

from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.json_schema import parse_schema
from strop.serve.tool_calls.format import CLOSING, OPENING, ToolFormat
from strop.serve.tool_calls.tools import Tools


def tool_grammar(tools: Tools, form: ToolFormat) -> StructuredOutputsParams | None:
    """What the answer must look like, in the Lark notation of llguidance; None where the model is free.

    It is free where it may answer in text of any shape, its chat template teaches it to call, and no function is
    strict. Else it calls with arguments that fit the schemas, once at most unless `tools.parallel`, and with "auto"
    gives an answer of `tools.shape` instead, or text: in hermes' form also before and between calls. In llama3's form
    text has no line that begins with a brace or a bracket: it could be a call.

    RequestError for a shape that calls could not be told from.
    """
    functions, shape = tools.functions, tools.shape
    is_strict = any(function.strict for function in functions)
    if tools.choice == "auto" and shape is None and form.taught and not is_strict:
        return None
    rules = _calls(tools.parallel, form)
    if tools.choice == "required":
        rules.append("start: calls")
    elif shape is not None:
        rules += ["start: calls | answer", f"answer: %json {_answer_schema(shape, form, is_strict)}"]
    else:
        rules += _text_and_calls(tools.parallel, form)
    key = "arguments" if form.form == "hermes" else "parameters"
    rules.append("object: " + " | ".join(f"object_{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        arguments = f"arguments_{i}_of_{re.sub('[^a-z0-9]', '_', function.name.lower())}"  # errors name the rule
        # Piece by piece as the lexemes of an answer in JSON, which may begin alike: the lexer takes the longest.
        begin = " ".join(map(json.dumps, ("{", '"name"', ": ", f'"{function.name}"', ", ", f'"{key}"', ": ")))
        rules += [f'object_{i}: {begin} {arguments} "}}"', f"{arguments}: %json {json.dumps(function.parameters)}"]
    return StructuredOutputsParams(grammar="\n".join(rules) + "\n")


def _calls(parallel: bool, form: ToolFormat) -> list[str]:
    if form.form == "llama3":
        return ['calls: object ("; " object)*' if parallel else "calls: object"]
    opening, closing = _marker(OPENING, form), _marker(CLOSING, form)
    rest = f'rest: "\\n" object "\\n" {closing}'
    return ['calls: call ("\\n" call)*' if parallel else "calls: call", f"call: {opening} rest", rest]


def _marker(marker: str, form: ToolFormat) -> str:
    """Control tokens are no text: a grammar names them without quotes."""
    return marker if marker in form.special_tokens else f'"{marker}"'


def _text_and_calls(parallel: bool, form: ToolFormat) -> list[str]:
    if form.form == "llama3":
        text = r"TEXT: /(?s:.*)/ & ~/(?s:(.*\n)?[ \t\r]*[{\[].*)/ & ~/(?s:.*<\|python_tag\|>.*)/"
        return ["start: calls | TEXT", text]
    begun = f"begun: spelled | TEXT {OPENING}" if OPENING in form.special_tokens else "begun: spelled"
    spelled = f'spelled[lazy]: TEXT "{OPENING}"'
    start = "start: (begun rest)* TEXT" if parallel else "start: begun rest | TEXT"
    return [start, begun, spelled, r"TEXT: /(.|\n)*/"]


def _answer_schema(shape: StructuredOutputsParams, form: ToolFormat, is_strict: bool) -> str:
    """Of an answer in JSON, as text. In hermes' form it cannot be taken for a call, which begins with a marker."""
    if shape.schema is None:
        raise RequestError(
            "only answers in JSON can be told from calls where the model may choose: give a JSON schema, or set"
            " tool_choice to none or required"
        )
    schema = parse_schema(shape.schema)  # what is one value of JSON cannot end the rule
    if is_strict and form.form == "llama3" and _may_look_like_call(schema):
        raise RequestError(
            "an answer of the shape asked for could be taken for a call of a strict function: give it a JSON schema of"
            " type object with additionalProperties false and no property `name`, or leave strict out"
        )
    return shape.schema


def _may_look_like_call(schema: Any) -> bool:
    """Whether it lets an object with a name through, or a list, as far as it takes no search to see."""
    if not isinstance(schema, dict) or schema.keys() & {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}:
        return True
    is_closed_object = schema.get("type") == "object" and schema.get("additionalProperties") is False
    properties = schema.get("properties", {})
    return not is_closed_object or not isinstance(properties, dict) or "name" in properties
