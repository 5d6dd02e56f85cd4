"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side on one norm, rotary positions on part of a head."""

from strop.models.config import Config
from strop.models.families import gpt2
from strop.models.family import Family
from strop.models.names import name_map
from strop.models.spec import LayerSpec, ModelSpec, Rope


def spec(config: Config) -> ModelSpec:
    """The network of GPTJForCausalLM."""
    norm, rotary_dim = config.layer_norm(), config.integer("rotary_dim", config.head_dim)
    mlp = config.mlp(4 * config.model_dim, gated=False, bias=True)
    layer = LayerSpec(config.attention(Rope(10000.0, rotary_dim)), mlp, norm, None, parallel=True)
    return config.model([layer] * config.num_layers, norm, head_bias=True)


FAMILY = Family(
    model_type="gptj",
    architectures=("GPTJForCausalLM",),
    spec=spec,
    names=name_map(
        prefix="transformer.",
        embed="wte",
        others={"final_norm": "ln_f"},
        layer="h.{i}",
        layers={
            "attention_norm": "ln_1",
            "q": "attn.q_proj",
            "k": "attn.k_proj",
            "v": "attn.v_proj",
            "o": "attn.out_proj",
            "up": "mlp.fc_in",
            "down": "mlp.fc_out",
        },
        ignored=(r"attn\.bias", r"attn\.masked_bias"),
        adjacent_rotary_pairs=True,
    ),
    defaults={"max_position_embeddings": 2048, "hidden_act": "gelu_new", "rotary_dim": 64},
    config_names=gpt2.CONFIG_NAMES,
    ignored=gpt2.IGNORED + " rotary scale_attn_weights",
)
