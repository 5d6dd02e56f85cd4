"""Runs networks on a mesh of this process's devices and prints, case by case, how far they are from one device.

python run_cases.py 2x4x2 NETWORK:PREFILL_LAYOUT:DECODE_LAYOUT ...
"""

import json
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from networks import NETWORKS, STEPS, Steps, layout_of, on_one_device, random_parameters, step_of
from stablehlo import collectives

from strop.models.mesh import MeshShape
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.sharding import (
    cache_spec,
    make_mesh,
    new_sharded_caches,
    on_mesh,
    parameter_specs,
    shard,
    to_batch_cache,
)
from strop.models.spec import ModelSpec
from strop.ops.collective import CollectiveCall
from strop.ops.collective.cost import cost
from strop.ops.dispatch import record

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

NUM_SEQS = 16


class OnMesh:
    """A network on a mesh, in one layout after another."""

    def __init__(self, spec: ModelSpec, params: Parameters, layout: Partition, steps: Steps) -> None:
        self.spec, self.mesh = spec, make_mesh(layout.mesh)
        self.params = shard(params, spec, layout, self.mesh)
        self.param_specs = parameter_specs(self.params, spec, layout)
        self.caches = new_sharded_caches(spec, layout, self.mesh, [steps.blocks_per_cache])
        self.bytes: list[tuple[int, int]] = []

    def steps(self, layout: Partition, steps: Steps, which: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Logits of each."""
        assert parameter_specs(self.params, self.spec, layout) == self.param_specs, "one set of stored weights"
        specs = self.param_specs, P(), (cache_spec(layout),)
        sharded = on_mesh(step_of(self.spec, layout), self.mesh, specs, (P(), specs[2]))
        rows = [steps.rows(first, count) for first, count in which]
        with record() as calls:
            lowered = jax.jit(sharded).lower(self.params, rows[0], self.caches)
        recorded = sum(cost(call).bytes_sent for call in calls if isinstance(call, CollectiveCall))
        self.bytes.append((recorded, sum(found.bytes_sent for found in collectives(lowered.as_text()))))
        step = lowered.compile()
        logits = []
        for each in rows:
            out, self.caches = step(self.params, each, self.caches)
            logits.append(np.asarray(out))
        return logits

    def to_batch(self, steps: Steps, before: Partition, after: Partition) -> None:
        num_kv_heads = self.spec.layers[0].attention.num_kv_heads
        block_ids = steps.moved_blocks(after.mesh.size())
        move = on_mesh(
            lambda cache: to_batch_cache(cache, block_ids, num_kv_heads, after),
            self.mesh,
            (cache_spec(before),),
            cache_spec(after),
        )
        self.caches = (jax.jit(move)(self.caches[0]),)


@cache
def one_device(name: str) -> tuple[Parameters, list[np.ndarray]]:
    params = random_parameters(NETWORKS[name])
    return params, on_one_device(NETWORKS[name], params, Steps(NUM_SEQS))


def run(case: str) -> dict[str, Any]:
    shape, name, *layouts = case.split(":")
    mesh = MeshShape.parse(shape)
    spec = NETWORKS[name]
    params, expected = one_device(name)
    prefill, decode = (layout_of(text, mesh) for text in layouts)
    before, after = (Steps(NUM_SEQS, mesh.size() if each.attention == "batch" else 1) for each in (prefill, decode))
    network = OnMesh(spec, params, prefill, before)
    logits = network.steps(prefill, before, STEPS[:1])
    if (prefill.attention, decode.attention) == ("heads", "batch"):
        network.to_batch(before, prefill, decode)
    logits += network.steps(decode, after, STEPS[1:])
    errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(logits, expected, strict=True)]
    return {"errors": errors, "bytes": network.bytes}


if __name__ == "__main__":
    for case in sys.argv[1:]:
        print(json.dumps([case, run(case)]), flush=True)
