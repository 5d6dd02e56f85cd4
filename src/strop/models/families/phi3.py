"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with joined matrices; part of a head may be rotated."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of Phi3ForCausalLM."""
    position, mlp, norm = rope(config), config.mlp(), config.rms_norm()
    layers = [
        LayerSpec(config.attention(position, window_len=window_len), mlp, norm, norm)
        for window_len in config.windows(lambda layer: config.has("sliding_window"))
    ]
    return config.model(layers, norm)


_QKV, _GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
FAMILY = Family(
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(q=_QKV, k=_QKV, v=_QKV, gate=_GATE_UP, up=_GATE_UP),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ignored="embd_pdrop resid_pdrop attention_bias",
    gguf=Gguf("phi3", GGUF_NAMES.with_layers(gate="ffn_up", up="ffn_up")),
)
