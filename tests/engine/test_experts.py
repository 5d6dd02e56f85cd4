"""The memory of a model of experts is that of each expert once, though one tensor holds them all."""

from collections.abc import Callable
from pathlib import Path

import jax

from strop.engine.loading import LoadedModel
from strop.formats.gguf import GGUFCheckpoint
from strop.models.memory import weight_bytes
from strop.models.reader import ParameterReader, load_spec


def test_memory_counts_each_expert_once(tiny_path: Callable[..., Path], loaded: Callable[..., LoadedModel]) -> None:
    for weights in ("Q4_1", "BF16"):
        params = loaded("mixtral", weights).params
        made = sum(leaf.nbytes for leaf in jax.tree.leaves((params.weights, params.vectors)))
        checkpoint = GGUFCheckpoint(tiny_path("mixtral", weights))
        reader = ParameterReader(checkpoint, load_spec(checkpoint))
        # Tiles of 16 rows and multiples of 64 bytes: a router of 5 rows is padded to 16.
        assert 0.95 * made < weight_bytes(reader, "native", 4) <= made
