"""Builds small GGUF files byte by byte, so that tests can damage any field; and tiny whole models."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from strop.formats.k_quants import SUPER_BLOCK_FORMATS
from strop.formats.values import BLOCK_FORMATS, GROUP_LEN, SUPER_LEN

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "BF16": 30}
TYPE_IDS |= {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "MXFP4": 39}


@dataclass
class RawTensor:
    """A tensor as the file holds it; any field may be a lie."""

    name: str
    shape: Sequence[int]
    type_id: int
    data: bytes
    offset: int | None = None


@dataclass
class RawGGUF:
    """A file as data. `marks` lists the byte positions between fields, after `build`."""

    metadata: Sequence[tuple[str, bytes]]
    tensors: Sequence[RawTensor] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_entries: int | None = None
    alignment: int = 32
    marks: list[int] = field(default_factory=list)

    def build(self) -> bytes:
        out = bytearray()

        def put(part: bytes) -> None:
            out.extend(part)
            self.marks.append(len(out))

        put(self.magic)
        put(struct.pack("<I", self.version))
        put(struct.pack("<Q", len(self.tensors) if self.num_tensors is None else self.num_tensors))
        put(struct.pack("<Q", len(self.metadata) if self.num_entries is None else self.num_entries))
        for key, value in self.metadata:
            put(string(key)[:8])
            put(key.encode())
            put(value[:4])
            put(value[4:])
        end = 0
        for tensor in self.tensors:
            put(string(tensor.name)[:8])
            put(tensor.name.encode())
            put(struct.pack("<I", len(tensor.shape)))
            put(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
            put(struct.pack("<I", tensor.type_id))
            put(struct.pack("<Q", end if tensor.offset is None else tensor.offset))
            end += -(-len(tensor.data) // self.alignment) * self.alignment
        put(bytes(-len(out) % self.alignment))
        for tensor in self.tensors:
            put(tensor.data)
            put(bytes(-len(tensor.data) % self.alignment))
        return bytes(out)


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """Type id and bytes of a metadata value: bool, int (u32), float (f32), str, or a list of one of these."""
    kind, raw = _typed(item)
    return struct.pack("<I", kind) + raw


def _typed(item: Any) -> tuple[int, bytes]:
    if isinstance(item, bool):
        return 7, bytes([item])
    if isinstance(item, int):
        return 4, struct.pack("<I", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    if isinstance(item, str):
        return 8, string(item)
    parts = [_typed(element) for element in item]
    kind = parts[0][0] if parts else 4
    return 9, struct.pack("<IQ", kind, len(parts)) + b"".join(raw for _, raw in parts)


def random_blocks(format_name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random raw blocks with finite scales and offsets, uint8 [rows * (bytes of a row)]."""
    rng = np.random.default_rng(seed)
    if format_name in SUPER_BLOCK_FORMATS:
        super_layout = SUPER_BLOCK_FORMATS[format_name]
        num_blocks = rows * columns // SUPER_LEN
        raw = rng.integers(0, 256, num_blocks * super_layout.block_bytes, dtype=np.uint8)
        records = raw.view(super_layout.fields)
        for name in ("d", "dmin")[: 1 + super_layout.has_offset]:
            records[name] = rng.normal(size=num_blocks)
        return raw
    layout = BLOCK_FORMATS[format_name]
    blocks = rng.integers(0, 256, (rows * columns // GROUP_LEN, layout.block_bytes), dtype=np.uint8)
    if layout.scale_bytes == 1:
        blocks[:, 0] = rng.integers(110, 130, len(blocks))
        return blocks.reshape(-1)
    num_floats = 1 + layout.has_offset
    blocks[:, : 2 * num_floats] = rng.normal(size=(len(blocks), num_floats)).astype("<f2").view(np.uint8)
    return blocks.reshape(-1)


def random_tensor(name: str, shape: Sequence[int], format_name: str, seed: int = 0) -> RawTensor:
    rng = np.random.default_rng(seed)
    single = rng.normal(size=shape).astype(np.float32)
    match format_name:
        case "F32":
            data = single.tobytes()
        case "F16":
            data = single.astype(np.float16).tobytes()
        case "BF16":
            data = (single.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        case _:
            data = random_blocks(format_name, shape[0], shape[1], seed).tobytes()
    return RawTensor(name, shape, TYPE_IDS[format_name], data)


def model_metadata(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A model of 2 layers: D 64, F 96, N 4, K 2, H 16, V 40. A change to None drops the key; `__` stands for `.`."""
    metadata: dict[str, Any] = {
        "general.architecture": family,
        "general.type": "model",
        "general.name": "tiny",
        "general.quantization_version": 2,
        f"{family}.block_count": 2,
        f"{family}.context_length": 128,
        f"{family}.embedding_length": 64,
        f"{family}.feed_forward_length": 96,
        f"{family}.attention.head_count": 4,
        f"{family}.attention.head_count_kv": 2,
        f"{family}.rope.freq_base": 10000.0,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(40)],
    }
    for name, item in changes.items():
        key = name.replace("__", ".")
        if item is None:
            del metadata[key]
        else:
            metadata[key] = item
    return metadata


def model_tensors(family: str = "llama", *, tied: bool = True, weights: str = "Q4_1") -> list[RawTensor]:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "token_embd.weight": ((40, 64), "Q8_0"),
        "output_norm.weight": ((64,), "F32"),
    }
    if not tied:
        shapes["output.weight"] = ((40, 64), "F16")
    for i in range(2):
        blk = f"blk.{i}"
        shapes |= {
            f"{blk}.attn_norm.weight": ((64,), "F32"),
            f"{blk}.attn_q.weight": ((64, 64), weights),
            f"{blk}.attn_k.weight": ((32, 64), weights),
            f"{blk}.attn_v.weight": ((32, 64), weights),
            f"{blk}.attn_output.weight": ((64, 64), weights),
            f"{blk}.ffn_norm.weight": ((64,), "F32"),
            f"{blk}.ffn_gate.weight": ((96, 64), weights),
            f"{blk}.ffn_up.weight": ((96, 64), weights),
            f"{blk}.ffn_down.weight": ((64, 96), weights),
        }
        if family == "qwen2":
            shapes |= {f"{blk}.attn_{x}.bias": ((64 if x == "q" else 32,), "F32") for x in "qkv"}
    return [random_tensor(name, shape, kind, seed) for seed, (name, (shape, kind)) in enumerate(shapes.items())]


def split_parts(raw: RawGGUF, num_parts: int) -> list[RawGGUF]:
    """The file as `llama-gguf-split` writes it: all keys in the first part, the tensors spread over all."""
    per_part = -(-len(raw.tensors) // num_parts)
    parts = []
    for i in range(num_parts):
        keys = [("split.no", value(i)), ("split.count", value(num_parts))]
        keys.append(("split.tensors.count", value(len(raw.tensors))))
        own = raw.tensors[i * per_part : (i + 1) * per_part]
        parts.append(RawGGUF([*raw.metadata, *keys] if i == 0 else keys, own))
    return parts


def write_parts(directory: Path, parts: Sequence[RawGGUF], stem: str = "model") -> list[Path]:
    """Writes them as model-00001-of-00003.gguf and so on."""
    paths = [directory / f"{stem}-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part.build())
    return paths


def tiny_model(
    family: str = "llama", *, tied: bool = True, metadata: Mapping[str, Any] | None = None, weights: str = "Q4_1"
) -> RawGGUF:
    entries = metadata if metadata is not None else model_metadata(family)
    return RawGGUF(
        [(key, value(item)) for key, item in entries.items()], model_tensors(family, tied=tied, weights=weights)
    )
