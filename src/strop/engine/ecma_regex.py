"""Regular expressions as JSON Schema has them (ECMA-262 with the u flag), in the notation of Rust's `regex-syntax`.

The two differ in what `.`, `\\s`, `$`, `&&` or `(?i)` mean, so everything is read here and written anew, in words that
have one meaning; what is not regular (lookaround, backreferences) is refused.
"""

import re

from strop.core.errors import RequestError

MAX_NESTING = 40
MAX_REPEATS = 65_535

_SPACE = r"\x{9}-\x{D}\x{20}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000}\x{FEFF}"
_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACE}
_ANY_BUT_LINE_ENDS = r"[^\x{A}\x{D}\x{2028}\x{2029}]"
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
_SPELLED = r"\x{8}-\x{A}\x{C}\x{D}\x{20}-\x{7E}\x{80}-\x{10FFFF}"
"""What a JSON string can hold without \\u escapes, which structured output does not use."""

_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d+)(,(\d*))?\})\??")
_HEX = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|u\{([0-9A-Fa-f]{1,6})\}")
_LOW_SURROGATE = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})")
_PROPERTY = re.compile(r"[pP]\{[A-Za-z0-9_]+(?:=[A-Za-z0-9_]+)?\}")
_GROUP = re.compile(r"\((?:\?:|\?<[A-Za-z_$][\w$]*>|(?!\?))")


def is_spelled(text: str) -> bool:
    """Whether a JSON string can hold `text` without \\u escapes."""
    return all((" " <= c != "\x7f") or c in "\b\t\n\f\r" for c in text)


def rust_regex(pattern: str, *, in_json_string: bool = False) -> str:
    """`pattern` for regex-syntax. `in_json_string` leaves out characters that only \\u escapes can spell.

    Raises RequestError that names what is not supported, and where.
    """
    translator = _Translator(pattern, in_json_string)
    text = translator.alternatives(0)
    if translator.at < len(pattern):
        raise translator.error("a ')' without '('")
    return text


class _Translator:
    """A recursive descent from left to right; `at` is the next character's index."""

    def __init__(self, pattern: str, in_json_string: bool) -> None:
        self.pattern = pattern
        self.at = 0
        self._in_json_string = in_json_string

    def error(self, what: str) -> RequestError:
        return RequestError(
            f"the regular expression {self.pattern!r:.100} has {what} at position {self.at}; accepted is ECMA-262 "
            "without lookaround, backreferences, word boundaries and flags"
        )

    def alternatives(self, depth: int) -> str:
        if depth > MAX_NESTING:
            raise self.error(f"groups nested more than {MAX_NESTING} deep")
        options = [self._sequence(depth)]
        while self._takes("|"):
            options.append(self._sequence(depth))
        return "|".join(options)

    def _takes(self, text: str) -> bool:
        taken = self.pattern.startswith(text, self.at)
        self.at += len(text) * taken
        return taken

    def _sequence(self, depth: int) -> str:
        pieces = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            atom = self._atom(depth)
            pieces.append(atom + self._quantifier(can_repeat=atom not in "^$"))
        return "".join(pieces)

    def _atom(self, depth: int) -> str:
        pattern, c = self.pattern, self.pattern[self.at]
        if c == "(":
            group = _GROUP.match(pattern, self.at)
            if group is None:
                raise self.error(f"{pattern[self.at : self.at + 4]!r} (lookaround, or a flag)")
            self.at = group.end()
            inner = self.alternatives(depth + 1)
            if not self._takes(")"):
                raise self.error("'(' without ')'")
            return f"(?:{inner})"
        if c == "[":
            return self._class()
        if c in "*+?" or _QUANTIFIER.match(pattern, self.at):
            raise self.error("a quantifier with nothing to repeat")
        self.at += 1
        if c in "^$":
            return c
        if c == ".":
            return self._spelled(_ANY_BUT_LINE_ENDS)
        if c != "\\":
            return self._literal(c)
        members, literal = self._escape()
        return self._spelled(members) if literal is None else self._literal(literal)

    def _quantifier(self, *, can_repeat: bool) -> str:
        found = _QUANTIFIER.match(self.pattern, self.at)
        if found is None:
            return ""
        if not can_repeat:
            raise self.error("a quantifier after an anchor")
        least, most = found[1], found[3] or None
        counts = [int(number[:10]) for number in (least, most) if number]
        if any(count > MAX_REPEATS for count in counts):
            raise self.error(f"more than {MAX_REPEATS} repeats")
        if counts != sorted(counts):
            raise self.error("a quantifier whose bounds are out of order")
        self.at = found.end()
        return found[0].removesuffix("?") if len(found[0]) > 1 else found[0]  # lazy or greedy: the same texts match

    def _class(self) -> str:
        begin = self.at
        self.at += 1
        negated = self._takes("^")
        members: list[str] = []
        while not self._takes("]"):
            if self.at >= len(self.pattern):
                self.at = begin
                raise self.error("'[' without ']'")
            whole, first = self._member()
            dash_at = self.at
            if first is None or not self._takes("-") or self.pattern.startswith("]", self.at):
                self.at = dash_at
                members.append(whole)
                continue
            if self.at >= len(self.pattern):
                continue
            whole, last = self._member()
            if last is None or last < first:
                raise self.error("a range that ends in a class or before its begin")
            members.append(f"{_code(first)}-{_code(last)}")
        if not members:
            if not negated:
                raise self.error("the empty class [], which matches nothing,")
            return self._spelled(r"[\x{0}-\x{10FFFF}]")
        return self._spelled(f"[{'^' * negated}{''.join(members)}]")

    def _member(self) -> tuple[str, str | None]:
        """A class's next member as text, and its character if it is one."""
        c = self.pattern[self.at]
        self.at += 1
        if c != "\\":
            return _code(c), c
        if self._takes("b"):
            return _code("\b"), "\b"
        if self._takes("-"):
            return _code("-"), "-"
        members, literal = self._escape()
        return (members, None) if literal is None else (_code(literal), literal)

    def _escape(self) -> tuple[str, str | None]:
        """What follows a backslash: a class's text, or a character."""
        pattern, begin = self.pattern, self.at
        c = pattern[begin : begin + 1]
        self.at += 1
        if c.lower() in _CLASSES and c:
            return f"[{'^' * c.isupper()}{_CLASSES[c.lower()]}]", None
        if c in _CONTROLS and c:
            return "", _CONTROLS[c]
        if found := _PROPERTY.match(pattern, begin):
            self.at = found.end()
            return f"[\\{found[0]}]", None
        if found := _HEX.match(pattern, begin):
            self.at = found.end()
            return "", self._code_point(int(found[found.lastindex or 1], 16))
        if c == "0" and not pattern[begin + 1 : begin + 2].isdigit():
            return "", "\0"
        if c == "c" and (letter := pattern[begin + 1 : begin + 2]).isascii() and letter.isalpha():
            self.at += 1
            return "", chr(ord(letter) % 32)
        if not c or c.isalnum() or c == "_":
            self.at = begin - 1
            raise self.error(f"the escape \\{c}")
        return "", c

    def _code_point(self, number: int) -> str:
        if 0xD800 <= number < 0xDC00 and (low := _LOW_SURROGATE.match(self.pattern, self.at)):
            self.at = low.end()
            number = 0x10000 + ((number - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        if 0xD800 <= number < 0xE000 or number > 0x10FFFF:
            raise self.error(f"U+{number:04X}, which is no character,")
        return chr(number)

    def _literal(self, c: str) -> str:
        if 0xD800 <= ord(c) < 0xE000:
            raise self.error("a lone surrogate")
        if self._in_json_string and not is_spelled(c):
            raise self.error(f"the control character U+{ord(c):04X}, which is not written in JSON strings here,")
        return c if c.isascii() and c.isalnum() else _code(c)

    def _spelled(self, members: str) -> str:
        return f"[{members}&&[{_SPELLED}]]" if self._in_json_string else members


def _code(c: str) -> str:
    return f"\\x{{{ord(c):X}}}"
