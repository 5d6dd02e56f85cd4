"""A model of experts in the engine: each step is one native program, and its memory is counted once."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from strop.core.request import Request, SamplingParams
from strop.engine.engine import Engine
from strop.engine.loading import LoadedModel
from strop.formats.gguf import GGUFCheckpoint
from strop.models.load import load
from strop.models.memory import weight_bytes
from strop.models.reader import ParameterReader, load_spec
from strop.ops.bound import BoundProgram


def test_a_step_is_one_program(loaded: Callable[..., LoadedModel], new_engine: Callable[..., Engine]) -> None:
    engine = new_engine(loaded("mixtral"))
    engine.add(Request("a", (3, 4, 5), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
    while engine.has_unfinished:
        engine.step()
    calls = engine._compiled._calls.values()
    assert calls
    assert all(isinstance(call, BoundProgram) for call in calls)


def test_native_scores_are_those_of_the_reference(
    tiny_path: Callable[..., Path], loaded: Callable[..., LoadedModel], new_engine: Callable[..., Engine]
) -> None:
    model = loaded("mixtral", "BF16")
    checkpoint = GGUFCheckpoint(tiny_path("mixtral", "BF16"))
    reader = ParameterReader(checkpoint, model.spec)
    params = load(reader, model.spec, "xla", num_positions=128, source_hash=checkpoint.source_hash)
    reference = LoadedModel(model.spec, params, model.tokenizer, model.memory, "xla")
    token_ids = np.random.default_rng(0).integers(0, 268, 60).tolist()
    found, wanted = (np.concatenate(list(new_engine(one).score(token_ids))) for one in (model, reference))
    error = np.abs(found - wanted).max(axis=1) / np.abs(wanted).max()
    assert np.median(error) < 0.02  # bf16 attention and inputs; a few rows choose other experts


def test_memory_counts_each_expert_once(tiny_path: Callable[..., Path], loaded: Callable[..., LoadedModel]) -> None:
    for weights in ("Q4_1", "BF16"):
        params = loaded("mixtral", weights).params
        made = sum(leaf.nbytes for leaf in jax.tree.leaves((params.weights, params.vectors)))
        checkpoint = GGUFCheckpoint(tiny_path("mixtral", weights))
        reader = ParameterReader(checkpoint, load_spec(checkpoint))
        # Tiles of 16 rows and multiples of 64 bytes: a router of 5 rows is padded to 16.
        assert 0.95 * made < weight_bytes(reader, "native", 4) <= made
