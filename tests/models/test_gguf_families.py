"""What transformers says in float32, against GGUF files of every family as llama.cpp's converter writes them."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from converter_rules import file_tensors, fused, metadata, write_file

from strop.formats.checkpoint import open_checkpoint
from strop.formats.hf import HFCheckpoint
from strop.models import decoder
from strop.models.from_hf import family_from_hf
from strop.models.layout import Single
from strop.models.load import load
from strop.models.parameters import Parameters
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import ModelSpec
from strop.ops.attention import Rows

GOLDEN = Path(__file__).parent.parent / "golden"
UNSAID = {
    "gemma2-gqa-bf16": "attention.scale",
    "gemma3-linear-bf16": "attention.scale",
    "gpt-bigcode-mqa": "mlp.activation",
    "gpt-neox-sequential-bf16": "mlp.activation",
    "gpt-oss-f32": "experts.gate_limit",
    "qwen3moe-norm-bf16": "experts mlp",
    "smollm3-nope": "attention.rope",
}
"""What no file of the family can say as the tiny model has it: Gemma's scale of scores, activations, gpt-oss's limit of
gates, dense layers in Qwen3-MoE, which layers of SmolLM3 have no rotation."""
MODELS = [
    *UNSAID,
    "bloom-3-heads-bf16",
    "cohere-gqa",
    "cohere-qk-norm",
    "falcon-gqa-40b-bf16",
    "falcon-mqa-7b",
    "falcon2-one-norm-bf16",
    "gemma-mqa",
    "gpt-neox-parallel",
    "gpt2-prefixed",
    "granite-bias",
    "granite-gqa",
    "llama-bias",
    "llama-head-dim",
    "llama-rope-linear",
    "llama-rope-llama3-bf16",
    "llama-rope-yarn",
    "mistral-gqa",
    "mixtral-gqa",
    "olmo2-gqa-bf16",
    "olmoe-mha",
    "phi3-longrope-long",
    "phi3-longrope-short",
    "phi3-window",
    "phi4-mini-partial",
    "qwen2-gqa",
    "qwen3-gqa",
    "qwen3-tied-bias-yarn",
    "stablelm-12b-bf16",
    "stablelm-qkv-bias",
    "starcoder2-untied-bf16",
]


@partial(jax.jit, static_argnums=1)
def forward(params: Parameters, spec: ModelSpec, token_ids: jax.Array) -> jax.Array:
    """Logits of all positions, without a cache."""
    places = jnp.arange(len(token_ids), dtype=jnp.int32)
    fields = jnp.stack([token_ids, places, places, jnp.zeros_like(places), places + 1, jnp.zeros_like(places)])
    rows = Rows(fields, jnp.zeros((1, 1), jnp.int32), jnp.array([len(token_ids)] * 2, jnp.int32))
    hidden, _ = decoder.forward(params, spec, rows, None, Single("xla"))
    return decoder.logits(params, spec, hidden, rows.counts, Single("xla"))


def taken(layer: Any, other: Any, field: str) -> Any:
    """A layer with one field, or a field of a field, of another."""
    name, _, rest = field.partition(".")
    value = getattr(other, name)
    return replace(layer, **{name: taken(getattr(layer, name), value, rest) if rest else value})


def with_unsaid(spec: ModelSpec, wanted: ModelSpec, fields: str) -> ModelSpec:
    layers = spec.layers
    for field in fields.split():
        layers = tuple(taken(layer, other, field) for layer, other in zip(layers, wanted.layers, strict=True))
    return replace(spec, layers=layers)


@pytest.mark.parametrize("name", [*MODELS, "qwen2-gqa fused", "llama-bias fused", "mixtral-gqa fused"])
def test_the_file_has_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    name, _, is_fused = name.partition(" ")
    checkpoint = HFCheckpoint(GOLDEN / name)
    wanted = load_spec(checkpoint)
    family = family_from_hf(checkpoint.config).gguf
    architecture = "llama" if family is None else family.architecture
    tensors = file_tensors(architecture, wanted, checkpoint)
    keys = dict(metadata(architecture, wanted, checkpoint.config))
    write_file(tmp_path / "model.gguf", architecture, keys, fused(tensors) if is_fused else tensors)

    written = open_checkpoint(tmp_path / "model.gguf")
    spec = load_spec(written)
    if name in UNSAID:
        assert with_unsaid(spec, wanted, UNSAID[name]) != spec
        spec = with_unsaid(spec, wanted, UNSAID[name])
    reader = ParameterReader(written, spec)
    params = load(reader, spec, "xla", num_positions=64, source_hash=written.source_hash)
    with np.load(GOLDEN / name / "expected.npz") as expected:
        logits = forward(params, spec, expected["tokens"][0])
        np.testing.assert_allclose(logits, expected["logits"][0], rtol=0, atol=1e-5)
