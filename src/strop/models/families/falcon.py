"""Falcon (Almazrouei et al. 2023): attention and MLP side by side, one key and value head or a few; RW ones ALiBi."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, name_map
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of FalconForCausalLM."""
    num_heads, bias, norm = config.integer("num_attention_heads"), config.flag("bias", False), config.layer_norm()
    is_new, alibi = config.flag("new_decoder_architecture", False), config.flag("alibi", False)
    many = config.integer("num_kv_heads", num_heads) if is_new or config.is_gguf else num_heads
    config.get("num_kv_heads")
    heads = {
        "num_kv_heads": 1 if config.flag("multi_query", True) and not is_new and not config.is_gguf else many,
        "alibi_scale": config.head_dim**-0.5 if alibi else None,
    }
    position = rope(config)
    attention = config.attention(None if alibi else position, qkv_bias=bias, out_bias=bias, **heads)
    mlp = config.mlp(4 * config.model_dim, gated=False, bias=bias)
    parallel = config.flag("parallel_attn", True) or is_new
    two_norms = not parallel or (is_new and config.integer("num_ln_in_parallel_attn", 2) == 2)
    config.get("num_ln_in_parallel_attn")
    layer = LayerSpec(attention, mlp, norm, norm if two_norms else None, parallel=parallel)
    return config.model([layer] * config.num_layers, norm)


_QKV = "self_attention.query_key_value"
FAMILY = Family(
    model_type="falcon",
    architectures=("FalconForCausalLM",),
    spec=spec,
    names=name_map(
        prefix="transformer.",
        embed="word_embeddings",
        others={"final_norm": "ln_f"},
        layer="h.{i}",
        layers={
            "attention_norm": "ln_attn|input_layernorm",
            "q": _QKV,
            "k": _QKV,
            "v": _QKV,
            "o": "self_attention.dense",
            "mlp_norm": "ln_mlp|post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        qkv_by_group=True,
    ),
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu", "tie_word_embeddings": True},
    config_names={
        "hidden_act": "activation",
        "intermediate_size": "ffn_hidden_size",
        "layer_norm_eps": "layer_norm_epsilon",
        "num_attention_heads": ("num_attention_heads", "n_head"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_kv_heads": ("num_kv_heads", "n_head_kv"),
    },
    ignored="hidden_dropout apply_residual_connection_post_layernorm",
    gguf=Gguf(
        "falcon",
        GGUF_NAMES.with_layers(attention_norm="attn_norm_2|attn_norm", mlp_norm="attn_norm"),
        derived=lambda config, tensors: {"new_decoder_architecture": "blk.0.attn_norm_2.weight" in tensors},
    ),
)
