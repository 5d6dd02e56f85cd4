"""StarCoder2 (Lozhkov et al. 2024): layer norm, biases everywhere, a window in every layer, an MLP without gate."""

from strop.models.config import Config
from strop.models.family import Family, Gguf
from strop.models.names import GGUF_NAMES, LLAMA_NAMES
from strop.models.rope import rope
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of Starcoder2ForCausalLM."""
    config.require("norm_type", "layer_norm")
    config.require("mlp_type", "default")
    bias, norm, position = config.flag("use_bias", True), config.layer_norm(), rope(config)
    mlp = config.mlp(gated=False, bias=bias)
    layers = [
        LayerSpec(config.attention(position, qkv_bias=bias, out_bias=bias, window_len=window_len), mlp, norm, norm)
        for window_len in config.windows(lambda layer: config.has("sliding_window"))
    ]
    return config.model(layers, norm)


FAMILY = Family(
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    spec=spec,
    names=LLAMA_NAMES.with_layers(up="mlp.c_fc", down="mlp.c_proj"),
    defaults={
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    config_names={"layer_norm_eps": "norm_epsilon"},
    ignored="residual_dropout embedding_dropout",
    gguf=Gguf("starcoder2", GGUF_NAMES),
)
