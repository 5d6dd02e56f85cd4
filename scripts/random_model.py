"""Write a GGUF file of random weights in a published model's shapes: to measure speed and memory without the weights.

`python scripts/random_model.py NAME OUT.gguf [--type Q4_K]` takes seconds and little memory: codes are drawn as bytes
and scales so that every layer keeps its input's size; nothing is quantised. The tokenizer is a byte-level BPE of random
merges.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, TokenType

from strop.formats.tokenizer import BYTE_OF_CHARACTER

SEED = 1
CHUNK_BLOCKS = 1 << 17
MAX_TOKEN_LEN = 12
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

RMS_OF_CODES = {"Q4_0": 4.6, "Q4_1": 4.6, "Q5_0": 9.2, "Q8_0": 74.0, "Q4_K": 4.6 * 36.4, "Q6_K": 18.5 * 74.0}
"""Root mean square of the random weights of one block whose float16 scale is 1."""
WITHOUT_SUPER_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What llama.cpp takes instead for rows that no 256 divides."""


@dataclass(frozen=True)
class Shape:
    """A published model with tied embeddings."""

    architecture: str
    num_layers: int
    model_dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_len: int
    rope_base: float
    norm_epsilon: float


def _qwen2(num_layers: int, model_dim: int, ffn_dim: int, num_heads: int, head_dim: int) -> Shape:
    return Shape("qwen2", num_layers, model_dim, ffn_dim, num_heads, 2, head_dim, 151_936, 32_768, 1e6, 1e-6)


def _llama(num_layers: int, model_dim: int, num_heads: int, head_dim: int) -> Shape:
    return Shape("llama", num_layers, model_dim, 8192, num_heads, 8, head_dim, 128_256, 131_072, 5e5, 1e-5)


SHAPES = {
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 64),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 128),
    "qwen2.5-3b": _qwen2(36, 2048, 11_008, 16, 128),
    "llama-3.2-1b": _llama(16, 2048, 32, 64),
    "llama-3.2-3b": _llama(28, 3072, 24, 128),
}


def write_model(shape: Shape, name: str, path: Path, matrix_type: str) -> None:
    writer = GGUFWriter(path, shape.architecture)
    _add_metadata(writer, shape, name)
    tensors = list(_tensors(shape, matrix_type))
    for tensor_name, dims, type_name in tensors:
        kind = GGMLQuantizationType[type_name]
        block_len, block_bytes = GGML_QUANT_SIZES[kind]
        row_bytes = dims[-1] // block_len * block_bytes
        stored = dims if type_name == "F32" else (*dims[:-1], row_bytes)
        dtype = np.dtype(np.float32 if type_name == "F32" else np.uint8)
        writer.add_tensor_info(tensor_name, stored, dtype, math.prod(dims[:-1]) * row_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (out,) = writer.fout or ()
    rng = np.random.default_rng(SEED)
    for tensor_name, dims, type_name in tensors:
        writer.write_padding(out, out.tell())
        for piece in _values(rng, tensor_name, dims, type_name, shape):
            out.write(piece.data)
        writer.write_padding(out, out.tell())
    writer.close()


def _add_metadata(writer: GGUFWriter, shape: Shape, name: str) -> None:
    writer.add_name(f"{name}, random weights")
    writer.add_block_count(shape.num_layers)
    writer.add_context_length(shape.context_len)
    writer.add_embedding_length(shape.model_dim)
    writer.add_feed_forward_length(shape.ffn_dim)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    if shape.architecture == "llama":
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_vocab_size(shape.vocab_size)
    texts, merges = _vocabulary(shape.vocab_size - len(SPECIAL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if shape.architecture == "qwen2" else "llama-bpe")
    writer.add_token_list([*texts, *SPECIAL])
    writer.add_token_types([TokenType.NORMAL] * len(texts) + [TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(shape.vocab_size - 1)
    writer.add_bos_token_id(len(texts))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _vocabulary(num_tokens: int) -> tuple[list[str], list[str]]:
    """Bytes, then what random pairs of earlier tokens merge to; the first merges make " time" one token."""
    rng = np.random.default_rng(SEED)
    texts = [*map(chr, BYTE_OF_CHARACTER), "Ġt", "Ġti", "Ġtim", "Ġtime"]
    merges = ["Ġ t", "Ġt i", "Ġti m", "Ġtim e"]
    seen = set(texts)
    while len(texts) < num_tokens:
        for left, right in (rng.random((4096, 2)) ** 2 * len(texts)).astype(int):
            text = texts[left] + texts[right]
            if len(text) <= MAX_TOKEN_LEN and text not in seen:
                seen.add(text)
                texts.append(text)
                merges.append(f"{texts[left]} {texts[right]}")
    return texts[:num_tokens], merges[: num_tokens - len(BYTE_OF_CHARACTER)]


def _tensors(shape: Shape, matrix_type: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, dimensions and type, in the file's order."""
    dim, ffn, heads, kv = (
        shape.model_dim,
        shape.ffn_dim,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    yield "token_embd.weight", (shape.vocab_size, dim), _fitting("Q6_K", dim)
    if shape.architecture == "llama":
        yield "rope_freqs.weight", (shape.head_dim // 2,), "F32"
    for i in range(shape.num_layers):
        for name, rows, columns in (
            *(("attn_q", heads, dim), ("attn_k", kv, dim), ("attn_v", kv, dim), ("attn_output", dim, heads)),
            *(("ffn_gate", ffn, dim), ("ffn_up", ffn, dim), ("ffn_down", dim, ffn)),
        ):
            yield f"blk.{i}.{name}.weight", (rows, columns), _fitting(matrix_type, columns)
            if shape.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{i}.{name}.bias", (rows,), "F32"
        yield f"blk.{i}.attn_norm.weight", (dim,), "F32"
        yield f"blk.{i}.ffn_norm.weight", (dim,), "F32"
    yield "output_norm.weight", (dim,), "F32"


def _fitting(type_name: str, row_len: int) -> str:
    """What llama.cpp's quantiser would take for rows of this length."""
    block_len = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0]
    return type_name if row_len % block_len == 0 else WITHOUT_SUPER_BLOCKS[type_name]


def _values(
    rng: np.random.Generator, name: str, dims: tuple[int, ...], type_name: str, shape: Shape
) -> Iterator[np.ndarray]:
    if name == "rope_freqs.weight":
        yield _llama3_rope_factors(shape)
    elif name.endswith("norm.weight"):
        yield np.ones(dims, np.float32)
    elif type_name == "F32":
        yield rng.normal(0, 0.1, dims).astype(np.float32)
    else:
        yield from _random_blocks(rng, dims, type_name)


def _random_blocks(rng: np.random.Generator, dims: tuple[int, ...], type_name: str) -> Iterator[np.ndarray]:
    """The bytes of a matrix [N, K] whose weights have a mean of 0 and a root mean square of K^-1/2."""
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    num_blocks = math.prod(dims) // block_len
    for first in range(0, num_blocks, CHUNK_BLOCKS):
        count = min(CHUNK_BLOCKS, num_blocks - first)
        blocks = np.frombuffer(bytearray(rng.bytes(count * block_bytes)), np.uint8).reshape(count, block_bytes)
        scale = rng.uniform(0.7, 1.3, (count, 1)) / (RMS_OF_CODES[type_name] * math.sqrt(dims[-1]))
        halves = scale.astype(np.float16).view(np.uint8)
        if type_name == "Q6_K":
            blocks[:, -2:] = halves
        else:
            blocks[:, :2] = halves
        if type_name == "Q4_1":
            blocks[:, 2:4] = (-7.5 * scale).astype(np.float16).view(np.uint8)
        if type_name == "Q4_K":  # every group's offset is its scale times 7.5, the middle of the codes
            blocks[:, 2:4] = (7.5 * scale).astype(np.float16).view(np.uint8)
            blocks[:, 8:12] = blocks[:, 4:8]
            blocks[:, 12:16] = (blocks[:, 12:16] & 15) * 17
        yield blocks


def _llama3_rope_factors(shape: Shape) -> np.ndarray:
    """Llama 3.2's (factor 32, low 1, high 4, of 8192 positions), by which the frequencies are divided."""
    wavelength = 2 * math.pi * shape.rope_base ** (np.arange(0, shape.head_dim, 2) / shape.head_dim)
    smooth = np.clip((8192 / wavelength - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=("Q4_0", "Q4_1", "Q4_K"), default="Q4_0", help="of all but the embedding")
    arguments = parser.parse_args()
    write_model(SHAPES[arguments.name], arguments.name, arguments.out, arguments.type)


if __name__ == "__main__":
    main()
