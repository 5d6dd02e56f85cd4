"""Small models that behave: weights of ordinary size, a tokenizer that spells every byte, a chat template."""

from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
from tiny_gguf import TYPE_IDS, RawGGUF, RawTensor, model_metadata, random_blocks, value
from tiny_tokenizer import tiny_metadata

from strop.formats.k_quants import SUPER_BLOCK_FORMATS

VOCAB_SIZE = 268
END_ID = 1
NUM_EXPERTS = 5


def tiny_llm(
    family: str = "llama", weights: str = "Q4_1", *, tied: bool = True, context_len: int = 128, ffn_dim: int = 96
) -> RawGGUF:
    """2 layers, D 64, F 96 or as given, N 4, K 2, H 16, V 268; "mixtral" has E 5, 2 active. Its greedy answers
    wander and its sampled ones differ by seed.

    With weights "Q4_K_M", the mixture that llama.cpp makes, rows are whole super-blocks: D 256, F 512, H 64.
    """
    with_experts, family = family == "mixtral", "llama" if family == "mixtral" else family
    metadata = model_metadata(family) | tiny_metadata() | {f"{family}.context_length": context_len}
    metadata[f"{family}.feed_forward_length"] = ffn_dim
    if weights == "Q4_K_M":
        return _tiny_k_quants(metadata | {f"{family}.embedding_length": 256, f"{family}.feed_forward_length": 512})
    if with_experts:
        metadata |= {f"{family}.expert_count": NUM_EXPERTS, f"{family}.expert_used_count": 2}
    shapes: dict[str, Sequence[int]] = {"token_embd": (VOCAB_SIZE, 64), "output_norm": (64,)}
    if not tied:
        shapes["output"] = (VOCAB_SIZE, 64)
    for i in range(2):
        kv = {"attn_k": (32, 64), "attn_v": (32, 64)}
        mlp: dict[str, Sequence[int]] = {"ffn_gate": (ffn_dim, 64), "ffn_up": (ffn_dim, 64), "ffn_down": (64, ffn_dim)}
        if with_experts:
            mlp = {"ffn_gate_inp": (NUM_EXPERTS, 64)} | {f"{k}_exps": (NUM_EXPERTS, *shape) for k, shape in mlp.items()}
        layer = {"attn_norm": (64,), "attn_q": (64, 64), **kv, "attn_output": (64, 64), "ffn_norm": (64,), **mlp}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = []
    rng = np.random.default_rng(5)
    for name, shape in shapes.items():
        spread = {"token_embd": 1.0, "output": 0.35}.get(name, 3 / np.sqrt(shape[-1]))
        numbers = rng.normal(size=shape).astype(np.float32) * spread
        if len(shape) == 1:
            numbers = (1 + 0.1 * numbers) * (0.4 if tied and name == "output_norm" else 1)
        tensors.append(_tensor(f"{name}.weight", numbers, "F32" if name.endswith("gate_inp") else weights))
    if family == "qwen2":
        for i in range(2):
            for part, length in (("q", 64), ("k", 32), ("v", 32)):
                bias = rng.normal(size=length).astype(np.float32) * 0.5
                tensors.append(_tensor(f"blk.{i}.attn_{part}.bias", bias, weights))
    return RawGGUF([(key, value(item)) for key, item in metadata.items()], tensors)


def _tensor(name: str, numbers: np.ndarray, format_name: str) -> RawTensor:
    if numbers.ndim == 1:
        format_name = "F32"
    kind = gguf.GGMLQuantizationType[format_name]
    data = gguf.quants.quantize(numbers.astype(np.float32), kind)
    return RawTensor(name, numbers.shape, TYPE_IDS[format_name], data.tobytes())


_MORE_BITS = {"token_embd": "Q6_K", "blk.0.attn_v": "Q6_K", "blk.1.ffn_down": "Q6_K", "blk.1.attn_k": "Q5_K"}


def _tiny_k_quants(metadata: dict[str, Any]) -> RawGGUF:
    kv = {"attn_k": (128, 256), "attn_v": (128, 256)}
    mlp = {"ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512)}
    layer = {"attn_q": (256, 256), **kv, "attn_output": (256, 256), **mlp}
    shapes = {"token_embd": (VOCAB_SIZE, 256)} | {f"blk.{i}.{name}": layer[name] for i in range(2) for name in layer}
    tensors = []
    for seed, (name, shape) in enumerate(shapes.items()):
        format_name = _MORE_BITS.get(name, "Q4_K")
        spread = 1.0 if name == "token_embd" else 3 / np.sqrt(shape[-1])
        data = _random_k_quants(format_name, shape, spread, seed).tobytes()
        tensors.append(RawTensor(f"{name}.weight", shape, TYPE_IDS[format_name], data))
    for name in ("output_norm", *(f"blk.{i}.{norm}" for i in range(2) for norm in ("attn_norm", "ffn_norm"))):
        tensors.append(_tensor(f"{name}.weight", np.full(256, 0.2 if name == "output_norm" else 1.0), "F32"))
    return RawGGUF([(key, value(item)) for key, item in metadata.items()], tensors)


def _random_k_quants(format_name: str, shape: tuple[int, int], spread: float, seed: int) -> np.ndarray:
    """Random blocks whose weights deviate by `spread` from a mean near 0."""
    raw = random_blocks(format_name, *shape, seed)
    layout = SUPER_BLOCK_FORMATS[format_name]
    records = raw.view(layout.fields)
    records["d"] = 2**-8
    if layout.has_offset:
        records["dmin"] = 2**-8 * ((1 << layout.bits) - 1) / 2
    weights = gguf.dequantize(raw, gguf.GGMLQuantizationType[format_name])
    for name in ("d", "dmin")[: 1 + layout.has_offset]:
        records[name] *= spread / weights.std()
    return raw
