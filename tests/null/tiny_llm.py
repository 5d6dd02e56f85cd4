"""Small models that behave: weights of ordinary size, a tokenizer that spells every byte, a chat template."""

from collections.abc import Sequence

import gguf
import numpy as np
from tiny_gguf import TYPE_IDS, RawGGUF, RawTensor, model_metadata, value
from tiny_tokenizer import tiny_metadata

VOCAB_SIZE = 268
END_ID = 1
NUM_EXPERTS = 5


def tiny_llm(family: str = "llama", weights: str = "Q4_1", *, tied: bool = True, context_len: int = 128) -> RawGGUF:
    """2 layers, D 64, F 96, N 4, K 2, H 16, V 268; "mixtral" has E 5, 2 active. Its greedy answers wander and its
    sampled ones differ by seed."""
    with_experts, family = family == "mixtral", "llama" if family == "mixtral" else family
    metadata = model_metadata(family) | tiny_metadata() | {f"{family}.context_length": context_len}
    if with_experts:
        metadata |= {f"{family}.expert_count": NUM_EXPERTS, f"{family}.expert_used_count": 2}
    shapes: dict[str, Sequence[int]] = {"token_embd": (VOCAB_SIZE, 64), "output_norm": (64,)}
    if not tied:
        shapes["output"] = (VOCAB_SIZE, 64)
    for i in range(2):
        kv = {"attn_k": (32, 64), "attn_v": (32, 64)}
        mlp: dict[str, Sequence[int]] = {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
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
