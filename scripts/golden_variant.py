"""What describes a tiny golden model, and the sizes that most share."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Family:
    """How checkpoints of one `model_type` are published, where that is not what transformers 5 writes."""

    model_type: str
    legacy: dict[str, str | None] = field(default_factory=dict)
    """config.json keys as the family's published files spell them; None where they have no such key."""
    rope_type_key: str = "type"
    """What `rope_scaling` calls its kind (llama3 is `rope_type` everywhere)."""
    idle_norm: float = 1.0
    """The norm weight that changes nothing: 0 where the model multiplies by 1 + weight."""
    input_major: tuple[str, ...] = ()
    """Ends of the names of matrices stored [..., inputs, outputs]."""
    encoder: bool = False
    """The golden output is the last hidden state, not logits."""


@dataclass(frozen=True)
class Variant:
    """One tiny model: its config, how the weights are stored, and what else its published files would say."""

    name: str
    family: Family
    config: dict[str, Any]
    dtype: str = "float32"
    shard_size: str = "1GB"
    rope: dict[str, Any] | None = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    legacy: dict[str, Any] = field(default_factory=dict)
    """Keys to set in config_legacy.json; None removes one."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement) for each stored tensor name."""
    extras: dict[str, Any] = field(default_factory=dict)
    """Stored tensors that the model ignores: arrays, or the name of one to copy; `{layer}` stands for every layer."""
    attention: str = "eager"
    """The implementation in transformers that the golden output comes from."""
    idle: tuple[str, ...] = ()
    """Parameters (ends of names) and config keys that cannot show in the output."""


def inverse_frequencies(dim: int) -> np.ndarray:
    return (1.0 / 10000.0 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


def default_rope(theta: float, **others: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **others}


WINDOW = 8
VOCAB = 61
# Epsilons are large everywhere, so that ignoring one shows.
EPS = 3e-3
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB, **IDS}
RMS = {**TINY, "rms_norm_eps": EPS}
RMS_64 = {**RMS, "hidden_size": 64}
GQA_16 = {**heads(4, 2), "head_dim": 16}
