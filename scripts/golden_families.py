"""What the tiny golden models are: one Family per kind of checkpoint, and a few lines of data per model.

scripts/golden_tiny.py makes them; tests/golden/README.md says what each is there for.
"""

from golden_layer_norm import ENCODER_VARIANTS, LAYER_NORM_VARIANTS
from golden_variant import GQA_16, RMS, RMS_64, WINDOW, Family, Variant, default_rope, heads, inverse_frequencies

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

# --- decoders with RMS norm -----------------------------------------------------------------------------------------

LONG_AND_SHORT = {
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.5, 1.6, 2.0, 2.2],
    "long_factor": [1.1, 1.3, 1.8, 2.5, 3.5, 5.0, 7.0, 9.0],
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, **LONG_AND_SHORT}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 512}

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
        "qwen3moe-norm-bf16",
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

VARIANTS = (*LLAMA_VARIANTS, *RMS_VARIANTS, *EXPERT_VARIANTS, *LAYER_NORM_VARIANTS, *ENCODER_VARIANTS)
