"""Text to token ids and back, over the `tokenizers` library; from a Hugging Face folder or (gguf_tokenizer) a GGUF."""

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import tokenizers

from strop.core.config import MIB
from strop.core.errors import FormatError, RequestError, StropError, UnsupportedError
from strop.formats.chat_templates import DEFAULT, template_for, templates_of_folder
from strop.formats.sentencepiece_file import from_model_file
from strop.formats.template import TemplateRenderer, replace_surrogates
from strop.formats.wordpiece import from_vocab_file

T = TypeVar("T")

ByteCoding = Literal["byte_level", "metaspace", "wordpiece"]
"""How a vocabulary spells bytes: as GPT-2's 256 printable characters, as text with `▁` for space and `<0xNN>`, or (an
encoder's, which loses case and spaces) as words and, after `##`, their continuations."""

MAX_CONFIG_BYTES = 64 * MIB

# Control tokens that end a turn or a document, whichever of them a file names as its end of sequence.
END_TOKENS = frozenset(
    {"<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>"}
    | {"<end_of_turn>", "<end_of_utterance>", "</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>"}  # noqa: RUF001
)


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where Latin-1 prints, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = {ord(character): byte for byte, character in _byte_level_alphabet().items()}
_ADDED_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Which ids frame a text and which end an answer."""

    bos_id: int | None = None
    eos_ids: frozenset[int] = frozenset()
    prefix_ids: tuple[int, ...] = ()
    """Put before a text when `add_special`."""
    suffix_ids: tuple[int, ...] = ()
    """Put after a text when `add_special`."""
    template_names: tuple[tuple[str, str], ...] = ()
    """Names a chat template may use, such as ("bos_token", "<s>")."""


class Tokenizer:
    """One vocabulary with its special tokens and chat template. Safe to use from several threads.

    Ids of `backend` from `vocab_size` on are stand-ins that never leave this class: `stand_ins` says which ids take
    their place, none where it says nothing.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        byte_coding: ByteCoding,
        special: SpecialTokens,
        *,
        vocab_size: int | None = None,
        stand_ins: Mapping[int, tuple[int, ...]] | None = None,
        strips_leading_space: bool = False,
        chat_templates: Mapping[str, str] | None = None,
        renderer: TemplateRenderer | None = None,
    ) -> None:
        self._backend = backend
        self._byte_coding = byte_coding
        self._strips_leading_space = strips_leading_space
        self._special = special
        self._added = backend.get_added_tokens_decoder()
        self._token_bytes: dict[int, bytes] = {}
        self._renderer = renderer or TemplateRenderer()
        self.chat_templates = dict(chat_templates or {})
        num_backend_ids = _num_ids(backend)
        self.vocab_size = num_backend_ids if vocab_size is None else vocab_size
        self._stand_ins = dict(stand_ins or {})
        self._has_stand_ins = self.vocab_size < num_backend_ids
        self.special_ids = frozenset(token_id for token_id, token in self._added.items() if token.special)
        self.bos_id = special.bos_id
        self.eos_ids = special.eos_ids

    def encode(self, text: str, add_special: bool = True, *, allow_special: bool = True) -> list[int]:
        """Token ids of `text`; lone surrogates count as U+FFFD. Bytes that the vocabulary cannot spell are dropped, as
        in llama.cpp (SmolLM2 lacks some control characters).

        `add_special` frames it as the model expects (bos, eos). Without `allow_special` the names of control tokens in
        `text` are plain text (for input that must not steer the model); user-defined tokens are always recognised.
        """
        backend = self._backend if allow_special else self._literal_backend
        # As one of a batch, since that lets other threads run meanwhile; `encode` holds the interpreter's lock.
        (encoding,) = backend.encode_batch_fast([replace_surrogates(text)], add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._has_stand_ins:
            ids = self._without_stand_ins(ids)
        return self.frame(ids) if add_special else ids

    def frame(self, ids: Sequence[int]) -> list[int]:
        """`ids` between the special tokens that the model expects around a text."""
        return [*self._special.prefix_ids, *ids, *self._special.suffix_ids]

    def decode(self, ids: Iterable[int], skip_special: bool = False, *, continuation: bool = False) -> str:
        """Text of `ids`, incomplete UTF-8 as U+FFFD. RequestError for an id out of range.

        A vocabulary that puts a space before every text has it taken off again, unless `continuation`: then `ids`
        follow other tokens, and the space is part of the text.
        """
        if self._byte_coding == "wordpiece":
            return self._decode_words(list(ids), skip_special)
        skipped = self.special_ids if skip_special else frozenset[int]()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        text = data.decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_leading_space and not continuation else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes `token_id` adds to a text, b"" for an unused id. RequestError out of range."""
        known = self._token_bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(f"token id {token_id} is out of range: 0 to {self.vocab_size - 1}")
            known = self._token_bytes[token_id] = self._spell(token_id)
        return known

    @property
    def chat_template(self) -> str | None:
        """The default one, if the model brings it."""
        return self.chat_templates.get(DEFAULT)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt text for `messages`, special tokens included: encode it with `add_special=False`.

        Args:
            tools: what the model may call, each as a JSON schema: {"type": "function", "function": {...}}.
            documents: what it may look at, each as {"title": ..., "text": ...}.
            chat_template: instead of the model's own.
            continue_final_message: the text ends where the last message's content does, for the model to go on with.
                Give add_generation_prompt=False with it.
            variables: what else the template knows, such as enable_thinking=False.

        What is None in a message, `content` aside, is left out: clients send `"tool_calls": null`, templates look for
        the name.

        RequestError if there is no chat template, it has no place for tools or documents, or it refuses; see
        TemplateRenderer.render.
        """
        for name, listed in (("tools", tools), ("documents", documents)):
            if listed is not None and not _are_maps(listed):
                raise RequestError(f"{name} must be a list of maps, such as JSON schemas, not {listed!r:.80}")
        given = {**dict(self._special.template_names), "tools": tools, "documents": documents, **variables}
        template = template_for(self.chat_templates if chat_template is None else {DEFAULT: chat_template}, given)
        shown = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]
        mark = _mark_end(shown) if continue_final_message else ""
        text = self._renderer.render(
            template, {**given, "messages": shown, "add_generation_prompt": add_generation_prompt}
        )
        if not mark:
            return text
        continued, found, _ = text.rpartition(mark)
        if not found:
            raise RequestError("this model's chat template does not show the message that is to be continued")
        return continued

    def fit_embedding(self, num_rows: int) -> None:
        """Checks that the model has a row for every token; more rows (padding) are fine. FormatError if not.

        Added tokens past the end that nothing uses become plain text: Gemma 3's text models share the tokenizer of
        those that see, and have no row for its image token. Call it before the tokenizer is used.
        """
        beyond = range(num_rows, self.vocab_size)
        used = self.eos_ids.union(self._special.prefix_ids, self._special.suffix_ids)
        templates = "".join(self.chat_templates.values())
        for token_id in beyond:
            added = self._added.get(token_id)
            if added is None or token_id in used or added.content in templates:
                name = added.content if added is not None else self._backend.id_to_token(token_id)
                raise FormatError(
                    f"the tokenizer has {self.vocab_size} tokens, the model's embedding {num_rows} rows: none for token"
                    f" {token_id} ({name!r}); use the tokenizer that belongs to the model, or resize its embedding"
                )
        # Cut in two, a name is not recognised.
        for token_id in beyond:
            name = self._added[token_id].content
            self._stand_ins[token_id] = tuple(i for part in (name[:1], name[1:]) for i in self.encode(part, False))
        if beyond:
            self.special_ids -= set(beyond)
            self.vocab_size = num_rows
            self._has_stand_ins = True

    def start_renderer(self) -> None:
        """Begin starting the process that renders chat templates, so that the first one need not wait for it."""
        if self.chat_templates:
            self._renderer.start()

    def close(self) -> None:
        """Stop the process that renders chat templates."""
        self._renderer.close()

    def _without_stand_ins(self, ids: list[int]) -> list[int]:
        size, spelled = self.vocab_size, self._stand_ins
        return [real for i in ids for real in ((i,) if i < size else spelled.get(i, ()))]

    def _decode_words(self, ids: list[int], skip_special: bool) -> str:
        """The library's own decoding: spaces between words, tidied around punctuation."""
        for token_id in ids:
            self.token_bytes(token_id)  # refuses an id out of range
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special)
        return text

    @functools.cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        # The switch is a state of the object, so a shared one would race between threads.
        content = self._backend.to_str()
        if type(self._backend.model).__name__ == "Unigram":
            content = _without_special_pieces(content, self.special_ids)
        backend = tokenizers.Tokenizer.from_str(content)
        backend.encode_special_tokens = True
        return backend

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._added:
            content: str = self._added[token_id].content
            return (content.replace("▁", " ") if self._byte_coding == "metaspace" else content).encode()
        text = self._backend.id_to_token(token_id)
        if text is None:
            return b""
        if self._byte_coding == "wordpiece":
            return text.removeprefix("##").encode() if text.startswith("##") else f" {text}".encode()
        if self._byte_coding == "byte_level":
            try:
                return bytes(BYTE_OF_CHARACTER[ord(character)] for character in text)
            except KeyError:
                return bytes(text.encode())
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return bytes(text.replace("▁", " ").encode())


def tokenizer_from_folder(folder: str | Path, renderer: TemplateRenderer | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, else tokenizer.model or BERT's vocab.txt, and if there
    tokenizer_config.json, generation_config.json and chat templates. FormatError for damaged files, UnsupportedError
    for a decoder that is not byte-exact."""
    folder = Path(folder)
    config = _read_json(folder / "tokenizer_config.json")
    whole, model_file, vocab_file = (folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"))
    if whole.exists() or not model_file.is_file():
        if vocab_file.is_file() and not whole.exists():
            backend = build("vocab.txt", lambda: from_vocab_file(vocab_file, config))
        else:
            backend = build("tokenizer.json", lambda: tokenizers.Tokenizer.from_file(str(whole)))
        backend.no_truncation()
        backend.no_padding()
        _add_missing_tokens(backend, config)
        byte_coding, strips_leading_space = _byte_coding(backend)
        vocab_size, stand_ins = None, {}
    else:
        found = build("tokenizer.model", lambda: from_model_file(model_file, config))
        backend, config, vocab_size, stand_ins = found.backend, found.config, found.vocab_size, found.stand_ins
        byte_coding, strips_leading_space = "metaspace", found.adds_space_prefix
    return Tokenizer(
        backend,
        byte_coding,
        _special_tokens(backend, config, _read_json(folder / "generation_config.json")),
        vocab_size=vocab_size,
        stand_ins=stand_ins,
        strips_leading_space=strips_leading_space,
        chat_templates=templates_of_folder(folder, config),
        renderer=renderer,
    )


def build(name: str, make: Callable[[], T]) -> T:
    """`make()`, with whatever the library raises (also a panic, which is no Exception) as FormatError."""
    try:
        return make()
    except StropError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FormatError(f"{name} does not hold a usable tokenizer: {error}; fetch the model again") from None
        raise


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Puts a text that nobody can guess after the last message's content; templates trim what stands at its end."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, str):
        raise RequestError("continue_final_message goes on with a text: the last message's content must be one")
    mark = secrets.token_hex(16)
    messages[-1] = {**messages[-1], "content": content + mark}
    return mark


def _without_special_pieces(content: str, special_ids: frozenset[int]) -> str:
    """tokenizer.json whose unigram model does not know the names of special tokens, where it would find them as words.

    Their ids stay taken, by texts that nobody can guess.
    """
    tokenizer = msgspec.json.decode(content)
    pieces = tokenizer["model"]["vocab"]
    for token_id in special_ids:
        if token_id < len(pieces):
            pieces[token_id][0] = secrets.token_hex(16)
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if not token["special"]]
    tokenizer["post_processor"] = None
    return msgspec.json.encode(tokenizer).decode()


def end_token_ids(backend: tokenizers.Tokenizer, known_ids: Iterable[int]) -> frozenset[int]:
    """`known_ids` and the control tokens whose names say that they end a turn or a document."""
    ids = set(known_ids)
    ids |= {
        i for i, token in backend.get_added_tokens_decoder().items() if token.special and token.content in END_TOKENS
    }
    names = {backend.id_to_token(token_id): token_id for token_id in ids}
    if {"<|return|>", "<|call|>"} <= names.keys():
        ids.discard(names.get("<|end|>", -1))  # in this chat format it closes a message, and the turn goes on
    return frozenset(ids)


def _are_maps(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, Mapping) for value in values)


def _num_ids(backend: tokenizers.Tokenizer) -> int:
    """Largest id + 1: added tokens may leave gaps."""
    size: int = backend.get_vocab_size(with_added_tokens=True)
    if size and backend.id_to_token(size - 1) is None:
        return max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return size


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} if there is no such file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FormatError(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes; fetch the model again")
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path.name} is not JSON: {error}; fetch the model again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} holds a {type(value).__name__}, not an object; fetch the model again")
    return value


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json lists, at the ids it gives them."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        by_id = sorted((int(token_id), dict(spec)) for token_id, spec in listed.items())
        for token_id, spec in by_id:
            if backend.token_to_id(spec["content"]) is None:
                flags = {flag: bool(spec.get(flag)) for flag in _ADDED_TOKEN_FLAGS}
                backend.add_tokens([tokenizers.AddedToken(spec["content"], **flags)])
            if backend.token_to_id(spec["content"]) != token_id:
                raise FormatError(
                    f"tokenizer_config.json gives {spec['content']!r} id {token_id}, tokenizer.json gives it "
                    f"{backend.token_to_id(spec['content'])}; fetch the model again"
                )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"tokenizer_config.json: added_tokens_decoder is malformed ({error}); fetch it again"
        ) from None


def _byte_coding(backend: tokenizers.Tokenizer) -> tuple[ByteCoding, bool]:
    """How tokens spell bytes, and whether decoding takes off one leading space; from the decoder in tokenizer.json."""
    decoder: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if kinds == {"ByteLevel"}:
        return "byte_level", False
    if kinds == {"WordPiece"} and decoder["prefix"] == "##":
        return "wordpiece", False
    replaces = [step for step in steps if step["type"] == "Replace"]
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"} and all(
        (step["pattern"], step["content"]) == ({"String": "▁"}, " ") for step in replaces
    ):
        strips = [step for step in steps if step["type"] == "Strip"]
        if all((step["content"], step["start"], step["stop"]) == (" ", 1, 0) for step in strips) and len(strips) <= 1:
            return "metaspace", bool(strips)
    if kinds <= {"Metaspace", "ByteFallback", "Fuse"} and "Metaspace" in kinds:
        spaces = [step for step in steps if step["type"] == "Metaspace"]
        if all(step["replacement"] == "▁" for step in spaces):
            return "metaspace", any(step.get("prepend_scheme") != "never" for step in spaces)
    raise UnsupportedError(
        f"tokenizer.json has decoder {decoder!r}; Strop takes ByteLevel, or the SentencePiece kinds (Metaspace, or "
        "Replace of '▁' with ByteFallback, Fuse, Strip), whose text is exact to the byte, or WordPiece with prefix '##'"
    )


def _special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> SpecialTokens:
    names = {
        name: text
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        if (text := _token_text(name, config.get(name))) is not None
    }
    bos_id, eos_id = (
        _token_id(backend, name, names[name]) if name in names else None for name in ("bos_token", "eos_token")
    )
    ids = [] if eos_id is None else [eos_id]
    listed = generation.get("eos_token_id")
    for token_id in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise FormatError(f"generation_config.json: eos_token_id={listed!r} must be one token id or a list of them")
        ids.append(token_id)
    prefix_ids, suffix_ids = _frame(backend)
    if config.get("add_bos_token") is not None and bos_id is not None:
        prefix_ids = (bos_id,) if config["add_bos_token"] else tuple(i for i in prefix_ids if i != bos_id)
    if config.get("add_eos_token") is not None and eos_id is not None:
        suffix_ids = (eos_id,) if config["add_eos_token"] else tuple(i for i in suffix_ids if i != eos_id)
    return SpecialTokens(bos_id, end_token_ids(backend, ids), prefix_ids, suffix_ids, tuple(names.items()))


def _frame(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor of tokenizer.json puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(bare) + 1):
        if bare and framed[start : start + len(bare)] == bare:
            return tuple(framed[:start]), tuple(framed[start + len(bare) :])
    raise UnsupportedError("tokenizer.json has a post_processor that does more than frame a text with special tokens")


def _token_text(name: str, value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise FormatError(f"tokenizer_config.json: {name}={value!r} must be a string or an object with `content`")
    return text


def _token_id(backend: tokenizers.Tokenizer, name: str, text: str) -> int:
    token_id: int | None = backend.token_to_id(text)
    if token_id is None:
        raise FormatError(f"tokenizer_config.json: {name}={text!r} is not in the vocabulary; fetch the model again")
    return token_id
