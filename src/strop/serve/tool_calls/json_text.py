"""JSON that arrives character by character: what of it is certain, and where it ends. Pure.

A reader is a generator that is sent the characters of a value, first to last, and ends with the value. Text goes to
`out` as soon as it is certain to be JSON: single characters of strings and structure, whole numbers and escapes. A
character that cannot follow raises NotJsonError. Control characters that stand bare in a string, as models write them,
come out escaped; everything else comes out as it went in.
"""

import json
import re
from collections.abc import Generator

from strop.formats.template import replace_surrogates

Reader = Generator[None, str, None]

SPACE = frozenset(" \t\n\r")
SCALAR_CHARACTERS = frozenset("+-.0123456789Eabcdefghijklmnopqrstuvwxyz")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
MAX_DEPTH = 256

_CLOSERS = {"{": "}", "[": "]"}
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_BARE_CONTROLS = {chr(code): json.dumps(chr(code))[1:-1] for code in range(0x20)}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


class NotJsonError(Exception):
    """The text cannot go on as it was expected to."""


def value_text(out: list[str]) -> Reader:
    """Reads an object, an array or a string."""
    closers: list[str] = []
    character = yield
    while True:
        following = ""  # a character that was read already, to find where the value ends
        if character == '"':
            yield from _string(out)
        elif character in _CLOSERS:
            out.append(character)
            closers.append(_CLOSERS[character])
            if len(closers) > MAX_DEPTH:
                raise NotJsonError
            following = yield from _after_space(out)
            if following != closers[-1]:
                character = (yield from _key(following, out)) if closers[-1] == "}" else following
                continue
        elif closers:
            following = yield from _scalar(character, out)
        else:
            raise NotJsonError
        while closers:
            character = following or (yield)
            following = ""
            if character in SPACE:
                out.append(character)
                character = yield from _after_space(out)
            if character == closers[-1]:
                out.append(character)
                closers.pop()
                continue
            if character != ",":
                raise NotJsonError
            out.append(character)
            character = yield from _after_space(out)
            if closers[-1] == "}":
                character = yield from _key(character, out)
            break
        else:
            return


def encoded_object_text(out: list[str]) -> Reader:
    """Reads a JSON string that holds an object as text, and gives that text; of an empty string it makes `{}`."""
    reader = value_text(out)
    next(reader)
    begun = ended = False

    def read(character: str) -> None:
        nonlocal begun, ended
        if (ended or not begun) and character in SPACE:
            return
        if ended or not (begun or character == "{"):
            raise NotJsonError
        begun = True
        try:
            reader.send(character)
        except StopIteration:
            ended = True

    if (yield) != '"':
        raise NotJsonError
    half = ""
    while (character := (yield)) != '"':
        decoded = (yield from _unescaped()) if character == "\\" else character
        if not half and "\ud800" <= decoded < "\udc00":
            half = decoded
            continue
        for whole in replace_surrogates(half + decoded):
            read(whole)
        half = ""
    if half:
        read("\ufffd")
    if not begun:
        out.append("{}")
    elif not ended:
        raise NotJsonError


def _after_space(out: list[str]) -> Generator[None, str, str]:
    while (character := (yield)) in SPACE:
        out.append(character)
    return character


def _key(character: str, out: list[str]) -> Generator[None, str, str]:
    """Reads a member's key, whose first character is given, and the colon; returns the first of its value."""
    if character != '"':
        raise NotJsonError
    yield from _string(out)
    if (yield from _after_space(out)) != ":":
        raise NotJsonError
    out.append(":")
    return (yield from _after_space(out))


def _string(out: list[str]) -> Reader:
    """Reads what follows an opening quote."""
    out.append('"')
    while (character := (yield)) != '"':
        if character != "\\":
            out.append(_BARE_CONTROLS.get(character, character))
            continue
        escape = yield
        if escape == "u":
            escape += yield from _hex_digits()
        elif escape not in _ESCAPES:
            raise NotJsonError
        out.append("\\" + escape)
    out.append('"')


def _scalar(character: str, out: list[str]) -> Generator[None, str, str]:
    """Reads a number, true, false or null from its first character on; returns the one after it."""
    characters = []
    while character in SCALAR_CHARACTERS:
        characters.append(character)
        character = yield
    text = "".join(characters)
    if not SCALAR.fullmatch(text):
        raise NotJsonError
    out.append(text)
    return character


def _unescaped() -> Generator[None, str, str]:
    """Reads what follows a backslash; returns the character, or half a surrogate pair, that it stands for."""
    escape = yield
    if escape != "u":
        if escape not in _ESCAPES:
            raise NotJsonError
        return _ESCAPES[escape]
    return chr(int((yield from _hex_digits()), 16))


def _hex_digits() -> Generator[None, str, str]:
    digits = ""
    for _ in range(4):
        digit = yield
        if digit not in _HEX_DIGITS:
            raise NotJsonError
        digits += digit
    return digits
