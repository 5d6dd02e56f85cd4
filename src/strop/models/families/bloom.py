"""BLOOM (Scao et al. 2022): ALiBi, a norm on the embedding."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, name_map
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of BloomForCausalLM."""
    config.require("apply_residual_connection_post_layernorm", False)
    norm = config.layer_norm()
    attention = config.attention(None, qkv_bias=True, out_bias=True, alibi_scale=1.0)
    mlp = config.mlp(4 * config.model_dim, gated=False, bias=True)
    layer = LayerSpec(attention, mlp, norm, norm)
    return config.model([layer] * config.num_layers, norm, embedding_norm=norm)


_QKV = "self_attention.query_key_value"
FAMILY = Family(
    model_type="bloom",
    architectures=("BloomForCausalLM",),
    spec=spec,
    names=name_map(
        prefix="transformer.",
        embed="word_embeddings",
        others={"embedding_norm": "word_embeddings_layernorm", "final_norm": "ln_f"},
        layer="h.{i}",
        layers={
            "attention_norm": "input_layernorm",
            "q": _QKV,
            "k": _QKV,
            "v": _QKV,
            "o": "self_attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        qkv_by_group=True,
    ),
    # The activation is in the code; the length is that of training, which ALiBi may exceed.
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    config_names={
        "hidden_size": ("hidden_size", "n_embed"),
        "num_hidden_layers": ("num_hidden_layers", "n_layer"),
        "num_attention_heads": ("num_attention_heads", "n_head", "num_attention_heads"),
        "layer_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "seq_length",
    },
    ignored="""hidden_dropout attention_dropout slow_but_exact offset_alibi skip_bias_add skip_bias_add_qkv
    attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion unk_token_id n_inner""",
    gguf=Gguf("bloom", GGUF_NAMES, {"hidden_act": "gelu_new"}),
)
