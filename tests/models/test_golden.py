"""What transformers says in float32, against the decoder: without a cache, and through the engine's paged one."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strop.core.config import EngineConfig
from strop.core.request import Request, SamplingParams
from strop.engine.embedder import Embedder, _Tokens
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel
from strop.formats.checkpoint import open_checkpoint
from strop.formats.sentence_transformers import Pooling
from strop.models import decoder
from strop.models.layout import Single
from strop.models.load import load
from strop.models.memory import plan_memory
from strop.models.parameters import Parameters
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import ModelSpec
from strop.ops import native
from strop.ops.attention import Rows
from strop.ops.dispatch import Platform

GOLDEN = Path(__file__).parent.parent / "golden"
ENCODERS = sorted(path.name for path in GOLDEN.glob("bert*"))
TINY = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name not in ENCODERS)
BEYOND_TRAINING = "llama-rope-dynamic-long"
"""transformers' frequencies there follow the length of the text; Strop refuses contexts longer than in training."""
IN_RANGE = [name for name in TINY if name != BEYOND_TRAINING]
BF16_ATTENTION = {"f32": (0.006, 0.035), "bf16": (0.01, 0.045)}
"""Root mean square error of a logit (their rms is 1), and what 99 of 100 errors are below, with queries, keys, values
and probabilities rounded to bf16, which is 0.4 % of a value each time. bf16 weights round their inputs as well."""
LARGEST_FACTOR = 4.0
"""By which the rest, all in a row whose norm divides by little, may be larger."""
EXPERTS_FACTOR = 1.5
"""By which a router's softmax enlarges these errors."""


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "expected.npz") as file:
        return dict(file)


def tiny_engine(name: str, platform: Platform, max_step_tokens: int = 64) -> Engine:
    checkpoint = open_checkpoint(GOLDEN / name)
    spec = load_spec(checkpoint)
    reader = ParameterReader(checkpoint, spec)
    config = EngineConfig(
        max_num_seqs=2,
        max_step_tokens=max_step_tokens,
        max_context_len=64,
        block_len=32 if platform == "native" else 16,
        num_blocks=9,
        num_threads=2,
    )
    params = load(reader, spec, platform, num_positions=64, source_hash=checkpoint.source_hash)
    memory = plan_memory(reader, spec, config, platform, available_bytes=2**32)
    tokenizer = SimpleNamespace(eos_ids=frozenset[int]())
    return Engine(LoadedModel(spec, params, tokenizer, memory, platform), config)  # type: ignore[arg-type]


def native_engine(name: str, max_step_tokens: int = 64) -> Engine:
    if not native.register():
        pytest.skip("the native library is not built")
    spec = load_spec(open_checkpoint(GOLDEN / name))
    for layer in spec.layers:
        if layer.attention.head_dim % 16 or layer.mlp.ffn_dim % 16:
            pytest.skip("the kernels decline these sizes")
    return tiny_engine(name, "native", max_step_tokens)


def scores(engine: Engine, token_ids: list[int], decode_from: int | None = None) -> np.ndarray:
    return np.concatenate(list(engine.score(token_ids, decode_from=decode_from)))


def rows_of(token_ids: jax.Array, causal: bool) -> Rows:
    places = jnp.arange(len(token_ids), dtype=jnp.int32)
    ends = places + 1 if causal else jnp.full_like(places, len(token_ids))
    fields = jnp.stack([token_ids, places, places, jnp.zeros_like(places), ends, jnp.zeros_like(places)])
    counts = jnp.array([len(token_ids)] * 2, jnp.int32)
    return Rows(fields, jnp.zeros((1, 1), jnp.int32), counts)


def logits_without_cache(params: Parameters, spec: ModelSpec, token_ids: jax.Array) -> jax.Array:
    rows, layout = rows_of(token_ids, spec.causal), Single("xla")
    hidden, _ = decoder.forward(params, spec, rows, None, layout)
    return decoder.logits(params, spec, hidden, rows.counts, layout)


def embedder(name: str, platform: Platform, **sizes: Any) -> Embedder:
    engine = tiny_engine(name, platform) if platform == "xla" else native_engine(name)
    model = LoadedModel(engine.spec, engine.params, engine.tokenizer, engine.memory, platform, Pooling("last", False))
    return Embedder(model, replace(engine.config, **sizes))


def hidden_states(model: Embedder, texts: np.ndarray) -> np.ndarray:
    """Hidden states [B, T, D], all texts in one step."""
    batch = [_Tokens(tuple(ids)) for ids in texts.tolist()]
    hidden = model._hidden(batch, 0, [len(text.ids) for text in batch])
    return hidden[: texts.size].reshape(*texts.shape, -1).copy()


def greedy(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        engine.add(Request(str(i), tuple(prompt), params))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_unfinished:
        for event in engine.step():
            answers[int(event.request_id)] += event.token_ids
    return answers


@pytest.mark.parametrize("name", IN_RANGE)
def test_float32_parity_with_transformers(name: str) -> None:
    expected = arrays(name)
    engine = tiny_engine(name, "xla", max_step_tokens=16)
    forward = jax.jit(logits_without_cache, static_argnums=1)
    tokens = np.concatenate([expected["tokens"], expected["greedy"]], axis=1)
    for token_ids, wanted, answer in zip(tokens, expected["logits"], expected["greedy"], strict=True):
        through_cache = scores(engine, token_ids.tolist(), decode_from=45)
        np.testing.assert_allclose(through_cache[:40], wanted, rtol=0, atol=1e-5)
        np.testing.assert_allclose(forward(engine.params, engine.spec, token_ids)[:40], wanted, rtol=0, atol=1e-5)
        # Each answer token is the best one given those before it: just what greedy decoding does.
        np.testing.assert_array_equal(through_cache[39:47].argmax(-1), answer)


@pytest.mark.parametrize("name", ENCODERS)
def test_float32_parity_of_encoders_with_transformers(name: str) -> None:
    expected = arrays(name)
    engine = tiny_engine(name, "xla")
    forward = jax.jit(decoder.forward, static_argnums=(1, 4))
    for token_ids, wanted in zip(expected["tokens"], expected["hidden"], strict=True):
        rows = rows_of(token_ids, engine.spec.causal)
        hidden, _ = forward(engine.params, engine.spec, rows, None, Single("xla"))
        np.testing.assert_allclose(hidden, wanted, rtol=0, atol=1e-5)
    crowded = hidden_states(embedder(name, "xla"), expected["tokens"][:, :32])
    for token_ids, found in zip(expected["tokens"][:, :32], crowded, strict=True):
        hidden, _ = forward(engine.params, engine.spec, rows_of(token_ids, False), None, Single("xla"))
        np.testing.assert_allclose(found, hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_native_parity_of_encoders_within_bf16_attention(name: str) -> None:
    expected = arrays(name)
    model = embedder(name, "native")
    mean_tolerance, tolerance = BF16_ATTENTION["f32"]
    before = str(native.isa())
    for isa in filter(native.select_isa, native.ISAS):
        for token_ids, wanted in zip(expected["tokens"], expected["hidden"], strict=True):
            found = hidden_states(model, token_ids[None])[0]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance, err_msg=isa)
            assert np.sqrt(np.mean(np.square(found - wanted))) < mean_tolerance, isa
    native.select_isa(before)


@pytest.mark.parametrize("name", ["gpt2-prefixed", "mistral-window", "llama-gqa-tied-bf16"])
def test_a_decoders_last_hidden_state_gives_its_logits(name: str) -> None:
    expected = arrays(name)
    # Chunks of 7 tokens; where there is a window, fewer blocks than a text has, so that they are used again.
    model = embedder(name, "xla", block_len=8, max_step_tokens=7, max_num_seqs=1, prefix_cache=False)
    tokenized = [_Tokens(tuple(ids)) for ids in expected["tokens"].tolist()]
    hidden = np.stack([model._vectors([tokens], model.pooling)[0] for tokens in tokenized])
    weights = tiny_engine(name, "xla").params.weights
    head = np.asarray(weights["embed" if model.spec.tied_embeddings else "head"].data)[0]
    np.testing.assert_allclose(hidden @ head.T, expected["logits"][:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", IN_RANGE)
def test_native_parity_within_bf16_attention(name: str) -> None:
    expected = arrays(name)
    engine = native_engine(name)
    factor = EXPERTS_FACTOR if any(layer.experts for layer in engine.spec.layers) else 1.0
    mean_tolerance, tolerance = (factor * part for part in BF16_ATTENTION[engine.params.weights["embed"].format])
    before = str(native.isa())
    for isa in filter(native.select_isa, native.ISAS):
        for token_ids, wanted in zip(expected["tokens"], expected["logits"], strict=True):
            found = scores(engine, token_ids.tolist())
            errors = np.abs(found - wanted)
            assert np.sqrt(np.mean(np.square(errors))) < mean_tolerance, isa
            assert np.quantile(errors, 0.99) < tolerance, isa
            assert errors.max() < LARGEST_FACTOR * tolerance, isa
    native.select_isa(before)


@pytest.mark.parametrize(
    "name", ["llama-rope-linear", "llama-rope-llama3-bf16", "mixtral-gqa", "mixtral-window-bf16", "qwen2-mha-tied-bf16"]
)
def test_native_chunking_does_not_change_a_bit(name: str) -> None:
    token_ids = arrays(name)["tokens"][0].tolist()
    whole = scores(native_engine(name), token_ids)
    for max_step_tokens, decode_from in ((16, 40), (7, 40), (64, 11), (5, 3), (1, 40)):
        np.testing.assert_array_equal(scores(native_engine(name, max_step_tokens), token_ids, decode_from), whole)


@pytest.mark.parametrize("name", ["llama-gqa-tied-bf16", "mixtral-gqa", "qwen2-window"])
def test_gradient_is_the_slope(name: str) -> None:
    engine = tiny_engine(name, "xla")
    token_ids = jnp.asarray(arrays(name)["tokens"][0])

    @jax.jit
    def loss(params: Parameters) -> jax.Array:
        logprobs = jax.nn.log_softmax(logits_without_cache(params, engine.spec, token_ids[:-1]))
        return -jnp.mean(jnp.take_along_axis(logprobs, token_ids[1:, None], axis=1))

    gradient = jax.grad(loss)(engine.params)
    for slope in (gradient.weights, gradient.vectors):
        for leaf in jax.tree.leaves(slope):
            assert np.isfinite(leaf).all()
            assert np.abs(leaf).max() > 0
    step = jax.tree.map(lambda leaf: 1e-2 * leaf / jnp.sqrt(jnp.mean(jnp.square(leaf)) + 1e-12), gradient.weights)
    slope = sum(
        float(jnp.vdot(a, b)) for a, b in zip(jax.tree.leaves(gradient.weights), jax.tree.leaves(step), strict=True)
    )

    def moved(sign: float) -> float:
        weights = jax.tree.map(lambda leaf, by: leaf + sign * by, engine.params.weights, step)
        return float(loss(Parameters(weights, engine.params.vectors, engine.params.ropes, engine.params.layers)))

    epsilon = 0.005
    assert (moved(epsilon) - moved(-epsilon)) / (2 * epsilon) == pytest.approx(slope, rel=0.01)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Engine:
    """The real weights in float32 on XLA; one page holds a whole sequence, so that few shapes are compiled."""
    from strop.engine.loading import load_tokenizer

    checkpoint = open_checkpoint(smollm2_path)
    greedy_file = json.loads((GOLDEN / "smollm2_greedy.json").read_text())
    if checkpoint.source_hash() != greedy_file["gguf_sha256"]:
        pytest.skip("the golden answers are those of another SmolLM2 file")
    spec = load_spec(checkpoint)
    reader = ParameterReader(checkpoint, spec)
    params = load(reader, spec, "xla", num_positions=256, source_hash=checkpoint.source_hash)
    config = EngineConfig(
        max_num_seqs=10, max_step_tokens=1024, max_context_len=256, block_len=256, num_blocks=21, num_threads=2
    )
    memory = plan_memory(reader, spec, config, "xla", available_bytes=2**34)
    return Engine(LoadedModel(spec, params, load_tokenizer(checkpoint), memory, "xla"), config)


def test_smollm2_greedy_answers(smollm2: Engine) -> None:
    prompts = json.loads((GOLDEN / "smollm2_greedy.json").read_text())["prompts"]
    for prompt in prompts:
        assert smollm2.tokenizer.encode(prompt["text"], add_special=False) == prompt["prompt_token_ids"]
    answers = greedy(smollm2, [prompt["prompt_token_ids"] for prompt in prompts], 64)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == prompt["token_ids"], prompt["text"]
        assert smollm2.tokenizer.decode(answer) == prompt["generated_text"]


def test_smollm2_logits(smollm2: Engine) -> None:
    with np.load(GOLDEN / "smollm2_logits.npz") as file:
        expected = dict(file)
    logits = scores(smollm2, expected["tokens"].tolist())[expected["positions"]].astype(np.float64)
    found = np.take_along_axis(logits, expected["top_ids"].astype(np.int64), axis=1)
    np.testing.assert_allclose(found, expected["top_logits"], rtol=0, atol=2e-4)
    top = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
    np.testing.assert_allclose(total, expected["logsumexp"], rtol=0, atol=2e-4)
