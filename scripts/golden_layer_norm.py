"""The tiny golden models with layer norm: decoders and encoders."""

import numpy as np
from golden_variant import EPS, IDS, TINY, VOCAB, WINDOW, Family, Variant, default_rope, heads, inverse_frequencies

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
COHERE = Family("cohere")

CAUSAL = np.tril(np.ones((1, 1, 64, 64), np.bool_))

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
        "starcoder2-untied-bf16",
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
    Variant(
        "cohere-gqa",
        COHERE,
        {**LN, **heads(4, 2), "hidden_size": 64, "logit_scale": 1.25, "tie_word_embeddings": True},
        rope=default_rope(1e4),
        legacy={"max_position_embeddings": 32, "model_max_length": 64},
    ),
    Variant(
        "cohere-qk-norm",
        COHERE,
        {**LN, **heads(4, 2), "hidden_size": 64, "use_qk_norm": True, "tie_word_embeddings": True},
        rope=default_rope(1e4),
    ),
    Variant(
        "cohere-bias-untied-bf16",
        COHERE,
        {**LN, **heads(2, 2), "attention_bias": True, "hidden_act": "gelu", "logit_scale": 0.75},
        dtype="bfloat16",
        rope=default_rope(500.0),
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
