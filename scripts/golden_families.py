"""What the tiny golden models are: one Family per kind of checkpoint, and a few lines of data per model.

scripts/golden_tiny.py makes them; tests/golden/README.md says what each is there for.
"""

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
    """Stored tensors that the model ignores, as arrays or as the name of one to copy; `{layer}` stands for every layer."""
    attention: str = "eager"
    idle: tuple[str, ...] = ()
    """Parameters (ends of names) and config keys that cannot show in the output."""


def heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


def default_rope(theta: float, **others: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **others}


# --- Llama and Qwen2 ----------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 97, "rms_norm_eps": 1e-5}
WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 96}

LLAMA = Family("llama")
QWEN2 = Family("qwen2")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

LLAMA_VARIANTS = (
    Variant("llama-mha", LLAMA, {**SMALL, **heads(4, 4)}),
    Variant("llama-gqa-tied-bf16", LLAMA, {**WIDE, **heads(4, 2), "tie_word_embeddings": True}, dtype="bfloat16"),
    # An epsilon as large as the embeddings' variance, so that ignoring it shows.
    Variant("llama-mqa-eps", LLAMA, {**SMALL, **heads(4, 1), "vocab_size": 11, "rms_norm_eps": 1e-2}),
    Variant("llama-head-dim", LLAMA, {**SMALL, **heads(4, 2), "head_dim": 12, "intermediate_size": 80}),
    Variant("llama-bias", LLAMA, {**SMALL, **heads(4, 2), "attention_bias": True, "mlp_bias": True}),
    Variant(
        "llama-rope-linear",
        LLAMA,
        {**SMALL, **heads(2, 1)},
        rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    Variant("llama-rope-llama3-bf16", LLAMA, {**WIDE, **heads(4, 2)}, dtype="bfloat16", rope=LLAMA3_ROPE),
    Variant("llama-sharded", LLAMA, {**SMALL, **heads(4, 2), "tie_word_embeddings": True}, shard_size="50KB"),
    Variant("qwen2-gqa", QWEN2, {**SMALL, **heads(4, 2), "vocab_size": 61}),
    Variant(
        "qwen2-mha-tied-bf16",
        QWEN2,
        {**WIDE, **heads(4, 4), "tie_word_embeddings": True},
        dtype="bfloat16",
        rope={"rope_type": "default", "rope_theta": 1e6},
    ),
    Variant("qwen2-mqa", QWEN2, {**SMALL, **heads(4, 1), "rms_norm_eps": 1e-6}),
    Variant(
        "qwen2-window",
        QWEN2,
        {**SMALL, **heads(4, 2), "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
)

# --- the sizes and parts that the other families share --------------------------------------------------------------

WINDOW = 8
VOCAB = 61
# Epsilons are large everywhere, so that ignoring one shows.
EPS = 3e-3
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": VOCAB, **IDS}
RMS = {**TINY, "rms_norm_eps": EPS}
RMS_64 = {**RMS, "hidden_size": 64}
GQA_16 = {**heads(4, 2), "head_dim": 16}

LONG_AND_SHORT = {
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 1.6, 2.0, 2.2],
    "long_factor": [1.1, 1.3, 1.8, 2.5, 3.5, 5.0, 7.0, 9.0],
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **LONG_AND_SHORT}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 512}

CAUSAL = np.tril(np.ones((1, 1, 64, 64), np.bool_))


def inverse_frequencies(dim: int) -> np.ndarray:
    return (1.0 / 10000.0 ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


# --- decoders with RMS norm -----------------------------------------------------------------------------------------

MISTRAL = Family("mistral")
QWEN3 = Family("qwen3", rope_type_key="rope_type")
GEMMA_LEGACY: dict[str, str | None] = {"use_bidirectional_attention": None}
GEMMA = Family("gemma", idle_norm=0.0, legacy=GEMMA_LEGACY)
GEMMA2 = Family("gemma2", idle_norm=0.0, legacy=GEMMA_LEGACY)
GEMMA3 = Family("gemma3_text", idle_norm=0.0, legacy=GEMMA_LEGACY, rope_type_key="rope_type")
PHI3 = Family("phi3")
SMOLLM3 = Family("smollm3")
OLMO2 = Family("olmo2")
GRANITE = Family("granite")

GEMMA_GELU = {"hidden_act": "gelu_pytorch_tanh"}

RMS_VARIANTS = (
    Variant(
        "llama-rope-dynamic",
        LLAMA,
        {**RMS, **heads(2, 1)},
        rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        extras={"model.layers.{layer}.self_attn.rotary_emb.inv_freq": inverse_frequencies(16)},
        idle=("rope_type", "factor"),
    ),
    Variant(
        "llama-rope-dynamic-long",
        LLAMA,
        {**RMS, **heads(2, 1), "max_position_embeddings": 24},
        rope={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    Variant("llama-rope-yarn", LLAMA, {**RMS, **heads(2, 1), "max_position_embeddings": 2048}, rope=YARN),
    Variant(
        "llama-rope-longrope",
        LLAMA,
        {**RMS, **heads(2, 1), "max_position_embeddings": 96},
        rope={**LONGROPE, "original_max_position_embeddings": 24, "factor": 4.0},
        idle=("short_factor",),
    ),
    Variant(
        "mistral-gqa",
        MISTRAL,
        {**RMS, **GQA_16, "sliding_window": None},
        rope=default_rope(1e6),
        idle=("sliding_window",),
    ),
    Variant("mistral-window", MISTRAL, {**RMS, **heads(2, 1), "sliding_window": WINDOW}),
    Variant("qwen3-gqa", QWEN3, {**RMS, **GQA_16}, rope=default_rope(1e6)),
    Variant(
        "qwen3-tied-bias-yarn",
        QWEN3,
        {**RMS, **GQA_16, "tie_word_embeddings": True, "attention_bias": True, "max_position_embeddings": 2048},
        rope={**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3},
    ),
    Variant(
        "qwen3-window",
        QWEN3,
        {**RMS, **GQA_16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    Variant(
        "gemma-mqa",
        GEMMA,
        {**RMS, **heads(4, 1), "head_dim": 16, "tie_word_embeddings": True, **GEMMA_GELU},
        # The first release says gelu and means the tanh approximation.
        legacy={"hidden_act": "gelu"},
    ),
    Variant(
        "gemma2-gqa-bf16",
        GEMMA2,
        {
            **RMS,
            **GQA_16,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.5,
        },
        dtype="bfloat16",
        legacy={**GEMMA_GELU, "cache_implementation": "hybrid"},
    ),
    Variant(
        "gemma2-uncapped",
        GEMMA2,
        {
            **RMS,
            **heads(2, 1),
            "head_dim": 16,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    Variant(
        "gemma3-linear-bf16",
        GEMMA3,
        {
            **RMS,
            **GQA_16,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24,
        },
        dtype="bfloat16",
        rope={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        legacy={"cache_implementation": "hybrid", "_sliding_window_pattern": None, "sliding_window_pattern": 3},
    ),
    Variant(
        "gemma3-mqa",
        GEMMA3,
        {
            **RMS,
            **heads(4, 1),
            "head_dim": 16,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
        rope={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
        # The 270m's file: layer types, and a pattern that is not read beside them.
        legacy={"layer_types": ["full_attention", "sliding_attention"], "_sliding_window_pattern": 6},
    ),
    Variant("phi3-window", PHI3, {**RMS, **heads(2, 2), "sliding_window": WINDOW}),
    Variant(
        "phi3-longrope-short",
        PHI3,
        {**RMS, **heads(2, 2), "max_position_embeddings": 256, "original_max_position_embeddings": 64},
        rope=LONGROPE,
        idle=("long_factor",),
    ),
    Variant(
        "phi3-longrope-long",
        PHI3,
        {**RMS, **heads(2, 2), "max_position_embeddings": 96, "original_max_position_embeddings": 24},
        rope=LONGROPE,
        legacy={"rope_scaling": {**LONG_AND_SHORT, "type": "su", "original_max_position_embeddings": 24}},
        idle=("short_factor",),
    ),
    Variant("phi4-gqa-bf16", PHI3, {**RMS_64, **heads(4, 2)}, dtype="bfloat16", rope=default_rope(250000.0)),
    Variant(
        "phi4-mini-partial",
        PHI3,
        {
            **RMS,
            **heads(2, 1),
            "tie_word_embeddings": True,
            "max_position_embeddings": 96,
            "original_max_position_embeddings": 24,
        },
        rope={
            **LONGROPE,
            "partial_rotary_factor": 0.75,
            "short_factor": LONG_AND_SHORT["short_factor"][:6],
            "long_factor": LONG_AND_SHORT["long_factor"][:6],
        },
        idle=("short_factor",),
    ),
    Variant(
        "smollm3-nope",
        SMOLLM3,
        {**RMS, **heads(2, 1), "num_hidden_layers": 3, "tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]},
        rope=default_rope(5e6),
        legacy={"no_rope_layers": None, "no_rope_layer_interval": 2, "layer_types": ["full_attention"] * 3},
    ),
    Variant("olmo2-mha", OLMO2, {**RMS, **heads(2, 2)}, rope=default_rope(5e5)),
    Variant("olmo2-gqa-bf16", OLMO2, {**RMS_64, **heads(4, 2)}, dtype="bfloat16", rope=default_rope(5e5)),
    Variant(
        "granite-gqa",
        GRANITE,
        {
            **RMS,
            **heads(2, 1),
            "tie_word_embeddings": True,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.5,
        },
    ),
    Variant(
        "granite-bias",
        GRANITE,
        {
            **RMS,
            **heads(2, 2),
            "attention_bias": True,
            "mlp_bias": True,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
)

# --- mixtures of experts --------------------------------------------------------------------------------------------

MIXTRAL = Family("mixtral")
QWEN3_MOE = Family("qwen3_moe", rope_type_key="rope_type", legacy={"num_local_experts": "num_experts"})
OLMOE = Family("olmoe", legacy={"num_local_experts": "num_experts"})
GPT_OSS = Family(
    "gpt_oss",
    rope_type_key="rope_type",
    input_major=("experts.gate_up_proj", "experts.down_proj"),
    legacy={"swiglu_alpha": None},
)

EXPERTS_4 = {**RMS, "intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN3_EXPERTS = {**RMS, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 512,
}

EXPERT_VARIANTS = (
    Variant("mixtral-gqa", MIXTRAL, {**EXPERTS_4, **heads(2, 1)}, rope=default_rope(1e6)),
    Variant("mixtral-window-bf16", MIXTRAL, {**EXPERTS_4, **GQA_16, "sliding_window": WINDOW}, dtype="bfloat16"),
    Variant(
        "qwen3moe-norm",
        QWEN3_MOE,
        {
            **QWEN3_EXPERTS,
            **GQA_16,
            "num_hidden_layers": 3,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
        dtype="bfloat16",
        rope=default_rope(1e6),
    ),
    Variant(
        "qwen3moe-step",
        QWEN3_MOE,
        {**QWEN3_EXPERTS, **heads(2, 1), "head_dim": 16, "norm_topk_prob": False, "decoder_sparse_step": 2},
        rope=default_rope(1e6),
    ),
    Variant(
        "olmoe-mha",
        OLMOE,
        {
            **RMS,
            **heads(2, 2),
            "intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "clip_qkv": None,
        },
    ),
    Variant(
        "gpt-oss-f32",
        GPT_OSS,
        {**EXPERTS_4, **heads(4, 1), "head_dim": 16, "sliding_window": WINDOW, "swiglu_limit": 1.0},
        rope=GPT_OSS_ROPE,
        legacy={
            "layer_types": ["sliding_attention", "full_attention"],
            "experts_per_token": 2,
            "initial_context_length": 512,
        },
    ),
    Variant(
        "gpt-oss-bf16",
        GPT_OSS,
        {
            **EXPERTS_4,
            **GQA_16,
            "num_hidden_layers": 3,
            "num_experts_per_tok": 3,
            "sliding_window": WINDOW,
            "swiglu_limit": 0.7,
        },
        dtype="bfloat16",
        rope=GPT_OSS_ROPE,
        legacy={"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
)

# --- decoders with layer norm ---------------------------------------------------------------------------------------

STARCODER2 = Family("starcoder2")
GPT2 = Family("gpt2", input_major=("c_attn.weight", "c_proj.weight", "c_fc.weight"))
GPTJ = Family("gptj")
GPT_NEOX = Family(
    "gpt_neox",
    legacy={
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
        "rope_scaling": None,
        "is_decoder": None,
    },
)
FALCON = Family(
    "falcon",
    legacy={"activation": None, "rope_theta": None, "rope_scaling": None, "max_position_embeddings": None},
)
BLOOM = Family("bloom")
GPT_BIGCODE = Family("gpt_bigcode", legacy={"num_key_value_heads": None})
STABLELM = Family("stablelm")

LN = {**TINY, "layer_norm_eps": EPS}
GPT = {
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "n_inner": 64,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "layer_norm_epsilon": EPS,
    **IDS,
}
FALCON_SIZES = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "ffn_hidden_size": 64,
    "layer_norm_epsilon": EPS,
    **IDS,
}
FALCON_64 = {**FALCON_SIZES, "hidden_size": 64, "num_attention_heads": 4}
BLOOM_SIZES = {"n_layer": 2, "vocab_size": VOCAB, "layer_norm_epsilon": EPS, **IDS}
NEOX_BUFFERS = {
    "gpt_neox.layers.{layer}.attention.bias": CAUSAL,
    "gpt_neox.layers.{layer}.attention.masked_bias": np.float32(-1e9),
    "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": inverse_frequencies(4),
}
GPTJ_BUFFERS = {
    "transformer.h.{layer}.attn.bias": CAUSAL,
    "transformer.h.{layer}.attn.masked_bias": np.float32(-1e9),
}

LAYER_NORM_VARIANTS = (
    Variant(
        "starcoder2-window",
        STARCODER2,
        {**TINY, **heads(2, 1), "norm_epsilon": EPS, "sliding_window": WINDOW, "tie_word_embeddings": True},
        rope=default_rope(1e5),
        legacy={"norm_type": "layer_norm", "mlp_type": "default"},
    ),
    Variant(
        "starcoder2-untied-no-bias",
        STARCODER2,
        {**TINY, **heads(4, 2), "hidden_size": 64, "norm_epsilon": EPS, "use_bias": False},
        dtype="bfloat16",
    ),
    Variant(
        "gpt2-bare-names",
        GPT2,
        {**GPT, "tie_word_embeddings": True},
        rope=None,
        legacy={"n_ctx": 64},
        renamed=((r"^transformer\.", ""),),
        extras={"h.{layer}.attn.bias": CAUSAL.astype(np.float32)},
    ),
    Variant(
        "gpt2-prefixed",
        GPT2,
        {**GPT, "n_inner": None, "tie_word_embeddings": True},
        rope=None,
        legacy={"n_inner": None, "n_ctx": 64},
    ),
    Variant("gptj-partial", GPTJ, {**GPT, "rotary_dim": 8}, rope=None, legacy={"rotary": True}, extras=GPTJ_BUFFERS),
    Variant(
        "gpt-neox-parallel",
        GPT_NEOX,
        {**LN, "num_attention_heads": 2, "intermediate_size": 64},
        rope=default_rope(1e4, partial_rotary_factor=0.25),
        extras=NEOX_BUFFERS,
    ),
    Variant(
        "gpt-neox-sequential-bf16",
        GPT_NEOX,
        {
            **LN,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "use_parallel_residual": False,
            "hidden_act": "gelu_fast",
        },
        dtype="bfloat16",
        rope=default_rope(500.0, partial_rotary_factor=0.5),
    ),
    Variant(
        "falcon-mqa-7b",
        FALCON,
        {**FALCON_SIZES, "ffn_hidden_size": 128, "multi_query": True, "tie_word_embeddings": True},
        legacy={"ffn_hidden_size": None, "num_ln_in_parallel_attn": None},
        extras={"lm_head.weight": "transformer.word_embeddings.weight"},
    ),
    Variant(
        "falcon-gqa-40b-bf16",
        FALCON,
        {**FALCON_64, "new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True},
        dtype="bfloat16",
        legacy={"num_ln_in_parallel_attn": None},
    ),
    Variant(
        "falcon2-one-norm-bf16",
        FALCON,
        {
            **FALCON_64,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 2,
            "tie_word_embeddings": False,
        },
        dtype="bfloat16",
        rope=default_rope(500.0),
        legacy={"rope_theta": 500.0},
    ),
    Variant(
        "falcon-rw-alibi-bf16",
        FALCON,
        {
            **FALCON_64,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
            "tie_word_embeddings": True,
        },
        dtype="bfloat16",
        rope=None,
        # Eager attention of transformers 5.23 adds ALiBi twice, in the mask and to the scores.
        attention="sdpa",
    ),
    Variant(
        "falcon-rw-rotary",
        FALCON,
        {**FALCON_SIZES, "bias": True, "multi_query": False, "parallel_attn": False, "tie_word_embeddings": True},
    ),
    Variant(
        "bloom-2-heads",
        BLOOM,
        {**BLOOM_SIZES, "hidden_size": 32, "n_head": 2, "tie_word_embeddings": True},
        rope=None,
        legacy={"offset_alibi": 100, "seq_length": 64},
        renamed=((r"^transformer\.", ""),),
    ),
    Variant(
        "bloom-3-heads-bf16",
        BLOOM,
        {**BLOOM_SIZES, "hidden_size": 48, "n_head": 3, "tie_word_embeddings": True},
        dtype="bfloat16",
        rope=None,
        legacy={"hidden_size": None, "n_embed": 48, "n_head": None, "num_attention_heads": 3},
    ),
    Variant(
        "gpt-bigcode-mqa",
        GPT_BIGCODE,
        {**GPT, "multi_query": True, "activation_function": "gelu", "tie_word_embeddings": True},
        rope=None,
    ),
    Variant("gpt-bigcode-mha", GPT_BIGCODE, {**GPT, "multi_query": False, "tie_word_embeddings": True}, rope=None),
    Variant(
        "stablelm-qkv-bias",
        STABLELM,
        {**LN, **heads(2, 2), "use_qkv_bias": True},
        rope=default_rope(1e4, partial_rotary_factor=0.25),
    ),
    Variant(
        "stablelm-12b-bf16",
        STABLELM,
        {**LN, **heads(4, 2), "hidden_size": 64, "qk_layernorm": True, "use_parallel_residual": True},
        dtype="bfloat16",
        rope=default_rope(1e4, partial_rotary_factor=0.5),
    ),
)

# --- encoders -------------------------------------------------------------------------------------------------------

BERT = Family("bert", encoder=True, legacy={"add_cross_attention": None, "is_decoder": None})
BERT_SIZES = {**LN, "num_attention_heads": 2, "intermediate_size": 64, "tie_word_embeddings": True}
# Without rotation a bias on the keys adds the same to every score of a query.
BERT_IDLE = ("key.bias", "pooler.dense.weight", "pooler.dense.bias")

ENCODER_VARIANTS = (
    Variant(
        "bert-minilm",
        BERT,
        BERT_SIZES,
        rope=None,
        legacy={"position_embedding_type": "absolute", "gradient_checkpointing": False},
        extras={"embeddings.position_ids": np.arange(64, dtype=np.int64)[None]},
        idle=BERT_IDLE,
    ),
    Variant(
        "bert-base-gamma",
        BERT,
        BERT_SIZES,
        rope=None,
        legacy={"position_embedding_type": "absolute", "architectures": ["BertForMaskedLM"]},
        renamed=(
            (r"^", "bert."),
            (r"LayerNorm\.weight$", "LayerNorm.gamma"),
            (r"LayerNorm\.bias$", "LayerNorm.beta"),
        ),
        extras={
            "cls.predictions.bias": np.linspace(-1, 1, VOCAB, dtype=np.float32),
            "cls.predictions.transform.dense.weight": np.eye(32, dtype=np.float32),
            "cls.predictions.transform.dense.bias": np.zeros(32, np.float32),
            "cls.predictions.transform.LayerNorm.gamma": np.ones(32, np.float32),
            "cls.predictions.transform.LayerNorm.beta": np.zeros(32, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
            "cls.seq_relationship.bias": np.zeros(2, np.float32),
        },
        idle=BERT_IDLE,
    ),
)

VARIANTS = (*LLAMA_VARIANTS, *RMS_VARIANTS, *EXPERT_VARIANTS, *LAYER_NORM_VARIANTS, *ENCODER_VARIANTS)
