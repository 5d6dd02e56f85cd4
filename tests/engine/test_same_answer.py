"""The promise: an answer is bit for bit the same alone and in a crowd, whatever the engine does on the way."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from strop.core.config import EngineConfig
from strop.core.request import Request, SamplingParams, StructuredOutputsParams
from strop.engine.blocks import BlockPool
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel, load_model
from strop.engine.sample import SampleRow, build_sample_inputs
from strop.engine.scheduler import Scheduler
from strop.engine.sequence import choice_seed
from strop.ops import native
from strop.ops.sample.op import sample

MODELS = {
    "llama-q4_1": ("llama", "Q4_1", True),
    "qwen2-q8_0": ("qwen2", "Q8_0", False),
    "llama-bf16": ("llama", "BF16", True),
    "mixtral-q4_1": ("mixtral", "Q4_1", True),
    "llama-q4_k_m": ("llama", "Q4_K_M", True),
}


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    if not native.register() or not native.select_isa(request.param):
        pytest.skip(f"this machine does not run {request.param}")
    yield request.param
    native.select_isa(str(before))


def requests_of_every_kind(seed: int = 0) -> list[Request]:
    """Long and short, shared prefixes and none, greedy and sampled, penalised, forked; all fit the tiny pool alone."""
    rng = random.Random(seed)
    stem = [rng.randrange(268) for _ in range(70)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 0.9, "seed": 3, "logprobs": 2},
        {"temperature": 1.3, "seed": 4, "top_k": 40, "top_p": 0.95, "stop_token_ids": tuple(range(60)), "logprobs": 2},
        {"temperature": 1.0, "seed": 2**63, "min_p": 0.02, "prompt_logprobs": 0},
        {"temperature": 0.7, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 2},
        {"temperature": 0.8, "seed": 6, "n": 3, "logprobs": 2},
        {"temperature": 0, "logit_bias": {7: 2.5, 9: -4.0}, "min_tokens": 4},
        {"temperature": 1.1, "seed": 8, "n": 2, "structured_outputs": StructuredOutputsParams(json_object=True)},
        {"temperature": 0, "logprobs": 1, "structured_outputs": StructuredOutputsParams(regex="([a-f]{2}-){4,}")},
    ]
    requests = []
    for i, kind in enumerate(2 * kinds):
        shared = rng.choice((0, 31, 32, 33, 64, 70))
        prompt = stem[:shared] + [rng.randrange(268) for _ in range(rng.choice((1, 2, 9, 30)))]
        params = SamplingParams(
            max_tokens=rng.choice((4, 26, min(70, 128 - len(prompt)))), ignore_eos=i % 3 == 0, **kind
        )
        requests.append(Request(f"r{i}", tuple(prompt), params))
    return requests


@pytest.mark.parametrize("name", MODELS)
def test_alone_and_in_a_crowd(
    isa: str,
    name: str,
    loaded: Callable[..., Any],
    new_engine: Callable[..., Engine],
    alone: Callable[..., Any],
    crowd: Callable[..., Any],
) -> None:
    family, weights, tied = MODELS[name]
    model = loaded(family, weights, tied=tied)
    requests = requests_of_every_kind()
    native.set_num_threads(1)
    expected = alone(lambda: new_engine(model, prefix_cache=False), requests)
    assert {finish for finish, _ in (answer.finish for answer in expected.values())} == {"length", "stop"}
    num_preemptions = num_hits = 0
    doomed = frozenset({"r1", "r6", "r11"})
    ways = [(64, True, 2), (5, False, 1), (16, True, 1), (64, False, 2), (3, True, 2), (1, True, 1)]
    if isa == "amx_emulated":  # slow
        ways = ways[:2]
    for seed, (max_step_tokens, prefix_cache, num_threads) in enumerate(ways):
        native.set_num_threads(num_threads)
        engine = new_engine(model, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache)
        rng = random.Random(seed)
        order = rng.sample(requests, len(requests))
        answers = crowd(engine, order, seed=seed, doomed=doomed if seed % 2 else frozenset())
        for key, answer in answers.items():
            assert answer == expected[key], (seed, key)
        num_preemptions += engine.scheduler.num_preemptions
        num_hits += engine.scheduler.num_prefix_hit_tokens
        if prefix_cache:  # once more, with the blocks of the first time
            again = crowd(engine, requests[::-1], seed=seed)
            assert again == expected
    assert num_preemptions >= len(ways)
    assert num_hits > 30 * len(ways)


def test_an_int8_cache_in_a_crowd(
    new_engine: Callable[..., Engine], alone: Callable[..., Any], crowd: Callable[..., Any]
) -> None:
    requests = requests_of_every_kind()
    native.set_num_threads(1)
    expected = alone(lambda: new_engine(prefix_cache=False, kv_dtype="int8"), requests)
    assert expected != alone(new_engine, requests)
    for seed, (max_step_tokens, num_threads) in enumerate([(5, 1), (64, 2)]):
        native.set_num_threads(num_threads)
        engine = new_engine(max_step_tokens=max_step_tokens, kv_dtype="int8")
        assert crowd(engine, requests, seed=seed) == expected


def with_windows(model: LoadedModel, *window_lens: int | None) -> LoadedModel:
    """The model with a window in each layer. A GGUF file's metadata has none: the spec takes them here."""
    layers = [
        replace(layer, attention=replace(layer.attention, window_len=window_len))
        for layer, window_len in zip(model.spec.layers, window_lens, strict=True)
    ]
    return replace(model, spec=replace(model.spec, layers=tuple(layers)))


def without_freeing(engine: Engine) -> Engine:
    """Every layer keeps all of its blocks until the end."""
    pools = [BlockPool(pool.num_blocks, pool.block_len, pool.prefix_cache) for pool in engine.scheduler.groups.pools]
    engine.scheduler = Scheduler(engine.config, pools, engine.tokenizer.eos_ids)
    return engine


@pytest.mark.parametrize("window_lens", [(None, 20), (40, 7)], ids=str)
def test_blocks_that_windows_free(
    window_lens: tuple[int | None, ...],
    loaded: Callable[..., Any],
    new_engine: Callable[..., Engine],
    alone: Callable[..., Any],
    crowd: Callable[..., Any],
) -> None:
    model = with_windows(loaded(), *window_lens)
    requests = requests_of_every_kind()
    expected = alone(lambda: without_freeing(new_engine(model, prefix_cache=False)), requests)
    num_preemptions = num_hits = 0
    for seed, (max_step_tokens, prefix_cache) in enumerate([(64, True), (5, False), (16, True)]):
        engine = new_engine(model, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache, num_blocks=5 + seed)
        assert len(engine.scheduler.groups.pools) == 2
        for order in (random.Random(seed).sample(requests, len(requests)), requests):  # the second finds prefixes
            assert crowd(engine, order, seed=seed) == expected
        num_preemptions += engine.scheduler.num_preemptions
        num_hits += engine.scheduler.num_prefix_hit_tokens
    assert num_hits > 100
    assert num_preemptions > (3 if None in window_lens else 0)


def test_the_real_model_in_a_crowd(
    smollm2_path: Path, new_engine: Callable[..., Engine], alone: Callable[..., Any], crowd: Callable[..., Any]
) -> None:
    if not native.register():
        pytest.skip("the native library is not built")
    sizes = EngineConfig(max_num_seqs=4, max_context_len=128, num_blocks=6, max_step_tokens=64, num_threads=2)
    model, _ = load_model(str(smollm2_path), sizes)
    prompts = ["Once upon a time", "def fibonacci(n):", "The capital of France is", "Once upon a time, in a land far"]
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.8, "seed": 1}, {"temperature": 0, "n": 2}]
    requests = [
        Request(f"r{i}{j}", tuple(model.tokenizer.encode(prompt)), SamplingParams(max_tokens=40, logprobs=2, **kind))
        for i, prompt in enumerate(prompts)
        for j, kind in enumerate(kinds)
    ]
    native.set_num_threads(1)
    expected = alone(lambda: new_engine(model, prefix_cache=False), requests)
    native.set_num_threads(2)
    num_preemptions = 0
    for seed, max_step_tokens in enumerate((64, 3)):
        engine = new_engine(model, max_step_tokens=max_step_tokens)
        assert crowd(engine, requests, seed=seed) == expected
        num_preemptions += engine.scheduler.num_preemptions
    assert num_preemptions > 0


def test_equals_naive_recompute(new_engine: Callable[..., Engine], alone: Callable[..., Any]) -> None:
    """Every token again from a full pass over all tokens before it."""
    free = [request for request in requests_of_every_kind(1) if request.params.structured_outputs is None]
    requests = [request for request in free if request.params.n == 1]
    answers = alone(new_engine, requests)
    pick = jax.jit(sample, static_argnames=("num_top", "platform"))
    engine = new_engine()
    for request in requests:
        answer, params = answers[request.request_id, 0], request.params
        tokens = [*request.prompt_token_ids]
        logits = np.concatenate(list(engine.score([*tokens, *answer.token_ids])))
        finish = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else engine.tokenizer.eos_ids)
        wanted = params.structured_outputs
        matcher = None if wanted is None else engine._grammars.compile(wanted).matcher()
        seed = choice_seed(params.seed or 0, 0)
        row = SampleRow(params, seed, tokens, len(tokens), finish_token_ids=finish, matcher=matcher)
        for at, token_id in enumerate(answer.token_ids):
            inputs = build_sample_inputs([row], 1, engine._allowed([row], 1))
            place = len(tokens) - 1
            got = pick(logits[place : place + 1], inputs, jnp.ones(2, jnp.int32), num_top=2, platform="native")
            assert int(got.token_ids[0]) == token_id, (request.request_id, at)
            if params.logprobs is not None:
                assert answer.logprobs[at].logprob == float(got.logprobs[0])
                assert answer.logprobs[at].top[0] == (int(got.top_ids[0, 0]), float(got.top_logprobs[0, 0]))
            tokens.append(token_id)
            if matcher is not None:
                matcher.advance(token_id)


def test_like_blocks_after_unlike_ones_are_not_shared(
    new_engine: Callable[..., Engine], alone: Callable[..., Any], crowd: Callable[..., Any]
) -> None:
    head, other_head, middle = ([rng.randrange(268) for _ in range(32)] for rng in map(random.Random, (1, 2, 3)))
    prompts = [[*head, *middle, 5], [*other_head, 5], [*other_head, *middle, 5]]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)
    requests = [Request(f"r{i}", tuple(prompt), params) for i, prompt in enumerate(prompts)]
    engine = new_engine()
    answers = {key: answer for request in requests for key, answer in crowd(engine, [request]).items()}
    assert engine.scheduler.num_prefix_hit_tokens == 32
    assert answers == alone(new_engine, requests)


def test_stale_cache_is_never_read(new_engine: Callable[..., Engine], crowd: Callable[..., Any]) -> None:
    """Pages hold whatever was there before: with NaN everywhere, nothing changes."""
    requests = requests_of_every_kind(2)
    expected = crowd(new_engine(), requests)
    engine = new_engine()
    engine._caches = tuple(jnp.full_like(cache, jnp.nan) for cache in engine._caches)
    assert crowd(engine, requests) == expected


def test_an_n_of_many_equals_its_choices(new_engine: Callable[..., Engine], alone: Callable[..., Any]) -> None:
    """Choice 0 does not depend on n; choices differ from each other."""
    prompt = tuple(range(5, 70))
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=12, n=4, logprobs=2, ignore_eos=True)
    many = alone(new_engine, [Request("many", prompt, params)])
    one = alone(new_engine, [Request("one", prompt, replace(params, n=1))])
    assert many["many", 0] == one["one", 0]
    assert len({tuple(many["many", i].token_ids) for i in range(4)}) == 4


def test_native_and_xla_agree_on_windows_and_biases(
    loaded: Callable[..., Any], tiny_path: Callable[..., Any], new_engine: Callable[..., Engine]
) -> None:
    """The references on the same float32 values: what bf16 attention changes is small."""
    from strop.formats.checkpoint import open_checkpoint
    from strop.models.load import load
    from strop.models.reader import ParameterReader

    model = loaded("qwen2", "F32", tied=False)
    checkpoint = open_checkpoint(tiny_path("qwen2", "F32", tied=False))
    spec = with_windows(model, None, 20).spec
    params = load(
        ParameterReader(checkpoint, model.spec), spec, "xla", num_positions=128, source_hash=checkpoint.source_hash
    )
    tokens = np.random.default_rng(3).integers(0, 268, 90).tolist()
    on_xla = replace(model, spec=spec, params=params, platform="xla")
    engines = [new_engine(replace(model, spec=spec)), new_engine(on_xla), new_engine(model)]
    windowed, exact, wide = (np.concatenate(list(engine.score(tokens))) for engine in engines)
    assert np.sqrt(np.mean(np.square(windowed - exact))) < 0.02 * np.std(exact)
    assert np.sqrt(np.mean(np.square(wide - exact)[20:])) > 0.2 * np.std(exact)
