"""Regular expressions of JSON Schema, rewritten for llguidance: the same texts match, and the rest is refused."""

import json
import random
import re

import pytest
from grammar_helpers import accepts, compiled

from strop.core.errors import RequestError
from strop.engine.ecma_regex import rust_regex


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("a|b+?", "a|b+"),
        ("^(?:ab){2,3}$", "^(?:ab){2,3}$"),
        ("(?<name>a)", "(?:a)"),
        (r"\d[^\w-]", r"[0-9][^[0-9A-Za-z_]\x{2D}]"),
        (r"\u00e9\x41\u{1F600}\uD83D\uDE00", r"\x{E9}A\x{1F600}\x{1F600}"),
        (r"[a&&b]", r"[\x{61}\x{26}\x{26}\x{62}]"),
        (r"\/\.\t\cA\0", r"\x{2F}\x{2E}\x{9}\x{1}\x{0}"),
        ("{a}]", r"\x{7B}a\x{7D}\x{5D}"),
        (r"[\b\-z-]", r"[\x{8}\x{2D}\x{7A}\x{2D}]"),
        (r"\p{L}\P{Lu}", r"[\p{L}][\P{Lu}]"),
        ("[^]", r"[\x{0}-\x{10FFFF}]"),
    ],
)
def test_the_notation(pattern: str, written: str) -> None:
    assert rust_regex(pattern) == written


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("(?=a)", "lookaround"),
        ("(?<!a)", "lookaround"),
        ("(?i)a", "flag"),
        (r"\bword", r"the escape \b at position 0"),
        (r"(a)\1", r"the escape \1 at position 3"),
        (r"\Aa", r"the escape \A"),
        (r"\u00", r"the escape \u"),
        (r"\ud800", "no character"),
        ("a**", "nothing to repeat at position 2"),
        ("^*", "after an anchor"),
        ("(a", "without ')'"),
        ("a)", "without '('"),
        ("[a", "without ']'"),
        ("[]", "empty class"),
        ("[b-a]", "before its begin"),
        (r"[a-\d]", "ends in a class"),
        ("a{3,2}", "out of order"),
        ("a{99999999999999}", "more than 65535"),
        ("(" * 1000, "nested"),
    ],
)
def test_what_is_refused(pattern: str, cause: str) -> None:
    with pytest.raises(RequestError, match=re.escape(cause)):
        rust_regex(pattern)


def test_control_characters_are_left_out_of_json_strings() -> None:
    with pytest.raises(RequestError, match="control character U\\+0001"):
        rust_regex(r"\cA", in_json_string=True)
    assert rust_regex(r"\n", in_json_string=True) == r"\x{A}"
    grammar = compiled(json={"type": "string", "pattern": "^[^a]b$"})
    assert accepts(grammar, '"\\nb"')
    assert not any(accepts(grammar, text) for text in ('"ab"', '"b"', '"\x01b"', '"\x7fb"'))


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\d+$", r"[^\w]", "a.b", "^(?:a|b){2,3}$", "(^a|b)c", "^a|b$", "[a-]", "x|y|", "^$", "a{2}b{1,}c{1,2}?d*?e??",
        r"[\d_-]+$", "^[^ab]*$", r"\s", r"\S\s\S", r"^\W$", "^.$", r"^[\t\n]$", "[1-9]é?$",
    ],
)  # fmt: skip
def test_the_same_texts_match(pattern: str) -> None:
    grammar = compiled(json={"type": "string", "pattern": pattern})
    # Python's own notation for the same: no flags, Unicode spaces, four ends of lines, `$` at the very end.
    same = pattern.replace("$", r"\Z").replace(".", r"[^\n\r\u2028\u2029]")
    python = re.compile(same, 0 if r"\s" in pattern.lower() else re.ASCII)
    rng = random.Random(pattern)
    for _ in range(60):
        text = "".join(rng.choice('ab c1_-\n\té"\\xyd\r\u2028e') for _ in range(rng.randint(0, 4)))
        assert accepts(grammar, json.dumps(text, ensure_ascii=False)) == bool(python.search(text)), text
