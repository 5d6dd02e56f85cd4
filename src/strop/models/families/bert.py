"""BERT (Devlin et al. 2019) and its like, MiniLM among them: an encoder, norms after each sum."""

from strop.models.config import Config
from strop.models.family import Family
from strop.models.names import name_map
from strop.models.spec import LayerSpec, ModelSpec


def spec(config: Config) -> ModelSpec:
    """The network of BertModel, without its pooler."""
    config.require("position_embedding_type", "absolute")
    config.require("is_decoder", False)
    norm = config.layer_norm()
    attention = config.attention(None, qkv_bias=True, out_bias=True)
    layer = LayerSpec(attention, config.mlp(gated=False, bias=True), None, None, norm, norm, norm_after=True)
    return config.model(
        [layer] * config.num_layers,
        None,
        causal=False,
        embedding_norm=norm,
        num_positions=config.integer("max_position_embeddings"),
        num_token_types=config.integer("type_vocab_size", 2),
    )


_SELF = "attention.self."
_NAMES = name_map(
    prefix="bert.",
    embed="embeddings.word_embeddings",
    others={
        "positions": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "embedding_norm": "embeddings.LayerNorm",
    },
    layer="encoder.layer.{i}",
    layers={
        "q": _SELF + "query",
        "k": _SELF + "key",
        "v": _SELF + "value",
        "o": "attention.output.dense",
        "attention_out_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_out_norm": "output.LayerNorm",
    },
    ignored=(r"position_ids", r"pooler\.dense\.(weight|bias)", r"cls\..*"),
)
FAMILY = Family(
    model_type="bert",
    architectures=("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining"),
    spec=spec,
    names=_NAMES.with_alternatives(
        {"LayerNorm.weight": "LayerNorm.weight|gamma", "LayerNorm.bias": "LayerNorm.bias|beta"}
    ),
    defaults={
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    ignored="hidden_dropout_prob attention_probs_dropout_prob classifier_dropout gradient_checkpointing",
)
