"""GPT-NeoX and Pythia (Black et al. 2022): attention and MLP side by side, each on its own norm."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, name_map
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GPTNeoXForCausalLM."""
    norm, bias = config.layer_norm(), config.flag("attention_bias", True)
    attention = config.attention(rope(config), qkv_bias=bias, out_bias=bias)
    mlp = config.mlp(gated=False, bias=True)
    layer = LayerSpec(attention, mlp, norm, norm, parallel=config.flag("use_parallel_residual", True))
    return config.model([layer] * config.num_layers, norm)


_QKV = "attention.query_key_value"
FAMILY = Family(
    model_type="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    spec=spec,
    names=name_map(
        prefix="gpt_neox.",
        embed="embed_in",
        others={"final_norm": "final_layer_norm"},
        head="embed_out",
        layer="layers.{i}",
        layers={
            "attention_norm": "input_layernorm",
            "q": _QKV,
            "k": _QKV,
            "v": _QKV,
            "o": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        ignored=(r"attention\.(bias|masked_bias)", r"rotary_emb\.inv_freq"),
        qkv_by_group=True,
    ),
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu", "partial_rotary_factor": 0.25},
    config_names={"partial_rotary_factor": "rotary_pct", "rope_theta": ("rope_theta", "rotary_emb_base")},
    ignored="hidden_dropout classifier_dropout",
    gguf=Gguf("gptneox", GGUF_NAMES, {"hidden_act": "gelu"}),
)
