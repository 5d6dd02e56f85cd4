"""A byte-level vocabulary small enough to read: 256 bytes, a few words, two control tokens and a user-defined one."""

from typing import Any

from strop.formats.gguf_tokenizer import CONTROL, NORMAL, USER_DEFINED
from strop.formats.tokenizer import BYTE_OF_CHARACTER

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ã ©", "ð Ł"]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] + '\\n' + message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    """GGUF metadata; `changes` replace keys below `tokenizer.ggml.` (None removes one)."""
    alphabet = [chr(character) for character in BYTE_OF_CHARACTER]
    words = [merge.replace(" ", "") for merge in MERGES]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|start|>", "<|end|>", *alphabet, *words, "<note é>"],
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[NORMAL] * (len(alphabet) + len(words)), USER_DEFINED],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}
