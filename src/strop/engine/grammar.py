"""Structured output: what a request wants, as a grammar of llguidance, and the tokens it allows at each step. No jax.

Every wish becomes a grammar in llguidance's Lark notation. Each answer gets a deep copy of the compiled grammar: lexers
grow while they run, and what one answer may do must not depend on what others did.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import llguidance
import numpy as np

from strop.core.config import MIB
from strop.core.errors import RequestError
from strop.core.request import StructuredOutputsParams
from strop.engine.ecma_regex import rust_regex
from strop.engine.ending import Ending, Endings, Tokens
from strop.engine.json_schema import Schema, enforceable, inner_pointers, parse_schema

MAX_TEXT_BYTES = MIB // 4
MAX_CACHED_GRAMMARS = 32

# Chosen for a step's time: a matcher that needs more at one token ends its answer with an error.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# A text may be cut into tokens as the model likes: forcing its usual tokens would need an encoder without surprises.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_CULPRIT_S = 0.2

_LARK_TOKEN = re.compile(
    r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/|(?:#|//)[^\n]*'
    r"|%(?P<block>json|llguidance|regex)\b|(?P<option>temperature|stop)\s*=|[A-Za-z_][\w-]*"
)


class TokenSpellings(Protocol):
    """What structured output needs of a tokenizer (strop.formats.tokenizer.Tokenizer)."""

    vocab_size: int
    special_ids: frozenset[int]
    eos_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to a text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer's tokens as bytes, with padding (b"") up to the model's number of tokens."""

    tokens: list[bytes]
    special_ids: list[int]
    eos_ids: list[int]

    @classmethod
    def of(cls, tokenizer: TokenSpellings, vocab_size: int | None = None) -> "Vocabulary":
        """`vocab_size`: the model's, where it exceeds the tokenizer's."""
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        tokens += [b""] * ((vocab_size or 0) - len(tokens))
        return cls(tokens, sorted(tokenizer.special_ids), sorted(tokenizer.eos_ids))

    def build(self) -> llguidance.LLTokenizer:
        """llguidance's own form, which takes a tenth of a second. Its first mask takes another; that is done here."""
        built = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Described(self)), eos_token=self.eos_ids or None)
        llguidance.LLMatcher(built, 'start: "a"', log_level=0).compute_bitmask()
        return built


class _Described:
    """A vocabulary with the attributes that llguidance looks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special_ids
        # None: an id of its own after all others, which no mask here has room for.
        self.eos_token_id = vocabulary.eos_ids[0] if vocabulary.eos_ids else None

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens to force for `text`: none."""
        return []


def grammar_text(wanted: StructuredOutputsParams) -> str:
    """The grammar for `wanted`. RequestError for what is too long, malformed, or would not be enforced."""
    check_sizes(wanted)
    try:
        return _OPTIONS + _lark(wanted)
    except RecursionError:
        raise RequestError("structured_outputs is nested too deep: simplify it") from None


def _lark(wanted: StructuredOutputsParams) -> str:
    if wanted.regex is not None:
        return f"start: /{rust_regex(wanted.regex)}/"
    if wanted.choice is not None:
        return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, dict.fromkeys(wanted.choice)))}"
    if wanted.grammar is not None:
        return checked_lark(wanted.grammar)
    return f"start: %json {json.dumps(enforceable(_document(wanted)))}"


def _document(wanted: StructuredOutputsParams) -> Schema:
    return parse_schema(wanted.json) if isinstance(wanted.json, str) else {"type": "object"}


def check_sizes(wanted: StructuredOutputsParams) -> None:
    """RequestError for what is too long to be looked at, or no text."""
    for name in ("json", "regex", "choice", "grammar"):
        given = getattr(wanted, name) or ""
        try:
            size = len((given if isinstance(given, str) else "".join(given)).encode())
        except UnicodeEncodeError:
            raise RequestError(f"structured_outputs.{name} holds a lone surrogate, which is no text") from None
        if size > MAX_TEXT_BYTES:
            raise RequestError(f"structured_outputs.{name} has {size} bytes: give at most {MAX_TEXT_BYTES}")


def checked_lark(grammar: str) -> str:
    """`grammar` with the JSON schemas in it rewritten to what is enforced.

    Raises RequestError for such a schema that cannot be enforced, and for options that the engine does not honour.
    """
    pieces, at = [], 0
    while (found := _LARK_TOKEN.search(grammar, at)) is not None:
        if found["option"]:
            raise RequestError(
                f"structured_outputs.grammar has the option {found['option']!r}, which is not supported: leave it out,"
                " and end a rule with suffix or lazy"
            )
        pieces.append(grammar[at : found.end()])
        at = found.end()
        if found["block"]:
            begin = at + len(grammar[at:]) - len(grammar[at:].lstrip())
            try:
                _, end = json.JSONDecoder().raw_decode(grammar, begin)
            except (ValueError, RecursionError):
                continue  # llguidance will say what is wrong
            block = grammar[begin:end]
            pieces.append(f" {_enforceable_block(block, grammar[:at])}" if found["block"] == "json" else block)
            at = end
    return "".join([*pieces, grammar[at:]])


def _enforceable_block(schema: str, before: str) -> str:
    """A JSON schema in a grammar, whose errors name the rule."""
    try:
        return json.dumps(enforceable(parse_schema(schema)))
    except RequestError as error:
        rules = re.findall(r"^\s*([a-z]\w*)[^:\n]*:", before, re.MULTILINE)
        raise RequestError(f"{error} (in rule {rules[-1]} of the grammar)" if rules else str(error)) from None


def compiled(tokenizer: llguidance.LLTokenizer, text: str) -> "Matcher":
    """A matcher at the beginning of an answer, or with an error."""
    inner = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=_LIMITS)
    if not inner.is_error():
        inner.compute_bitmask()  # a grammar that matches nothing shows here
    return Matcher(inner)


def compiled_or_refused(tokenizer: llguidance.LLTokenizer, wanted: StructuredOutputsParams, text: str) -> "Matcher":
    """The same for `wanted`, whose grammar is `text`. RequestError that says why there can be none."""
    matcher = compiled(tokenizer, text)
    if matcher.error is None:
        return matcher
    if wanted.json is not None:
        found = _culprit(tokenizer, _document(wanted), matcher.error)
        raise RequestError(f"the JSON schema cannot be enforced at {found}: {_explained(matcher.error)}")
    name = next(name for name in wanted.__slots__ if getattr(wanted, name) not in (None, False))
    raise RequestError(f"structured_outputs.{name} cannot be enforced: {_explained(matcher.error)}")


def _culprit(tokenizer: llguidance.LLTokenizer, document: Schema, error: str) -> str:
    """Pointer of an innermost schema that alone gives the same error, as far as there is time to look."""
    deadline_s = time.monotonic() + _CULPRIT_S

    def fails_alike(pointer: str) -> bool:
        try:
            text = f"{_OPTIONS}start: %json {json.dumps(enforceable(document, pointer))}"
        except RequestError:
            return False
        return time.monotonic() < deadline_s and compiled(tokenizer, text).error == error

    found = "#"
    while inner := next(filter(fails_alike, inner_pointers(document, found)), None):
        found = inner
    return found


_EXPLAINED = (
    (
        "oneOf constraints",
        "the schemas of oneOf must exclude each other by type, or by different constants of a required"
        " property: use anyOf",
    ),
    ("are not disjoint", "names may match several of patternProperties: make them exclude each other"),
    (
        "circular references",
        "a $ref with other keywords beside it leads back to itself: move them into what it points to",
    ),
    ("min/maxProperties only", "minProperties and maxProperties need all names in properties to be required"),
    ("Unsatisfiable schema", "nothing satisfies it"),
    ("NoExtension", "nothing matches it"),
    ("too large", "it is too large"),
)


def _explained(error: str) -> str:
    """llguidance's message for those who did not write llguidance."""
    ours = next((ours for theirs, ours in _EXPLAINED if theirs in error), "")
    return f"{ours} ({error})" if ours else error


class Matcher:
    """How far one answer has come in its grammar."""

    def __init__(self, inner: llguidance.LLMatcher, ending: Ending | None = None) -> None:
        """`ending` for an answer that has a given number of tokens."""
        self._inner, self._ending = inner, ending

    def copy(self, ending: Ending | None = None) -> "Matcher":
        """Another one, as far as this one."""
        return Matcher(self._inner.deep_copy(), ending)

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on, if it cannot."""
        if self._inner.is_error():
            return _first_line(self._inner.get_error())
        stop_reason = self._inner.stop_reason()
        return None if stop_reason in ("NotStopped", "NoExtension", "EndOfSentence") else stop_reason

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        return self._inner.is_stopped() and self.error is None

    @property
    def forced_id(self) -> int | None:
        """The only token that may come next if the answer is to end within its tokens."""
        return None if self._ending is None else self._ending.forced_id

    def advance(self, token_id: int, num_left: int | None = None) -> int:
        """Take note of the answer's next token, after which num_left may follow, if that is known.

        Returns the token: another one if with this one the answer could not end within num_left.
        """
        if num_left is not None and self._ending is not None:
            return self._ending.take(self._inner, token_id, num_left)
        self._inner.consume_token(token_id)
        return token_id

    def allowed_ids(self) -> np.ndarray:
        """The tokens that may come next, ascending; none if there is an error. For many answers at once: `masks`."""
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little")) if self.error is None else np.zeros(0, np.int64)


def _first_line(error: str) -> str:
    line = error.strip().split("\n", 1)[0]
    line = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |<state>.*", "", line)
    return line if len(line) <= 300 else f"{line[:297]}..."


@dataclass(frozen=True, slots=True)
class Grammar:
    """What one request's answers must match."""

    start: Matcher
    """At the beginning of an answer; only to be copied."""
    endings: Endings
    names: list[Tokens]
    """Of a schema's required properties, for `endings`."""

    def matcher(self) -> Matcher:
        """A new one, at the beginning of an answer."""
        return self.start.copy(Ending(self.endings, self.names))


class Grammars:
    """Compiles grammars for one vocabulary and computes masks. `compile` may be called from several threads."""

    def __init__(self, tokenizer: TokenSpellings, vocab_size: int, num_threads: int) -> None:
        """`vocab_size`: the model's number of tokens, V. `num_threads`: for the masks of a step."""
        self._spellings = tokenizer
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._compiled: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Builds now what the first grammar would have to wait for: 0.2 s for 50,000 tokens, 2 s for 260,000."""
        self.compile(StructuredOutputsParams(json_object=True))

    def compile(self, wanted: StructuredOutputsParams) -> Grammar:
        """The grammar, found or made. RequestError if it cannot be enforced."""
        with self._lock:
            grammar = self._compiled.get(wanted)
            if grammar is not None:
                self._compiled.move_to_end(wanted)
                return grammar
        start = compiled_or_refused(self._tokenizer, wanted, grammar_text(wanted))
        names = self._endings.names(_document(wanted)) if wanted.json is not None else []
        grammar = Grammar(start, self._endings, names)
        with self._lock:
            self._compiled[wanted] = grammar
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return grammar

    def masks(self, matchers: Sequence[Matcher | None], num_rows: int) -> np.ndarray:
        """Which tokens each answer may have next: u32 [num_rows, ceil(V / 32)], token t at bit t % 32 of word t // 32.

        A row whose matcher is None, or beyond them, allows all; one whose matcher has an error allows none.
        """
        num_words = -(-self._tokenizer.vocab_size // 32)
        masks = np.full((num_rows, num_words), 0xFFFFFFFF, np.uint32)
        rows = [(matcher._inner, i) for i, matcher in enumerate(matchers) if matcher is not None]
        if rows:
            self._executor.unsafe_compute_mask_ptr(rows, masks.ctypes.data, 4 * num_words, num_rows)
        for i, matcher in enumerate(matchers):
            if matcher is None:
                continue
            if matcher.error is not None or matcher.forced_id is not None:
                masks[i] = 0
            if matcher.error is None and matcher.forced_id is not None:
                masks[i, matcher.forced_id // 32] = 1 << matcher.forced_id % 32
        return np.ascontiguousarray(masks[:, : -(-self._vocab_size // 32)])

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._spellings, self._vocab_size)

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return self._vocabulary.build()

    @cached_property
    def _endings(self) -> Endings:
        return Endings(self._tokenizer, self._vocabulary.tokens, self._vocabulary.special_ids)

    @cached_property
    def _executor(self) -> llguidance.LLExecutor:
        return llguidance.LLExecutor(self._num_threads)
