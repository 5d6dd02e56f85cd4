"""GPT-2 (Radford et al. 2019): learned positions, layer norm, matrices stored [in, out]."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, name_map
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of GPT2LMHeadModel."""
    config.require("scale_attn_weights", True)
    config.require("scale_attn_by_inverse_layer_idx", False)
    norm = config.layer_norm()
    attention = config.attention(None, qkv_bias=True, out_bias=True)
    mlp = config.mlp(4 * config.model_dim, gated=False, bias=True)
    layer = LayerSpec(attention, mlp, norm, norm)
    return config.model(
        [layer] * config.num_layers, norm, num_positions=config.integer("max_position_embeddings", 1024)
    )


CONFIG_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "n_positions",
}
IGNORED = """n_ctx resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn gradient_checkpointing"""
DEFAULTS = {"max_position_embeddings": 1024, "hidden_act": "gelu_new", "tie_word_embeddings": True}
FAMILY = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
    spec=spec,
    names=name_map(
        prefix="transformer.",
        embed="wte",
        others={"positions": "wpe", "final_norm": "ln_f"},
        layer="h.{i}",
        layers={
            "attention_norm": "ln_1",
            "q": "attn.c_attn",
            "k": "attn.c_attn",
            "v": "attn.c_attn",
            "o": "attn.c_proj",
            "mlp_norm": "ln_2",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        transposed=(r"\.c_(attn|proj|fc)\.weight",),
        ignored=(r"attn\.bias", r"attn\.masked_bias"),
    ),
    defaults=DEFAULTS,
    config_names=CONFIG_NAMES,
    ignored=IGNORED,
    gguf=Gguf("gpt2", GGUF_NAMES, {"hidden_act": "gelu_new"}),
)
