"""What a step costs at least, from the operations that the model's own code records."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from strop.machine.probe import MachineRates
from strop.models import decoder
from strop.models.abstract import distinct_layers
from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.parameters import Parameters
from strop.models.partition import Partition
from strop.models.sharding import abstract_mesh, on_mesh, parameter_specs
from strop.models.spec import ModelSpec
from strop.ops.attention import AttentionCall, Rows, new_cache
from strop.ops.attention import cost as attention_cost
from strop.ops.collective import CollectiveCall
from strop.ops.collective import cost as collective_cost
from strop.ops.cost import KV_BYTES, Cost, Kind
from strop.ops.dispatch import record
from strop.ops.embed import EmbedCall
from strop.ops.embed import cost as embed_cost
from strop.ops.experts import ExpertsCall
from strop.ops.experts import cost as experts_cost
from strop.ops.linear import LinearCall
from strop.ops.linear import cost as linear_cost
from strop.ops.norm import AddNormCall
from strop.ops.sample import cost as sample_cost


@dataclass(frozen=True, slots=True)
class StepCost:
    """All operations of one step together."""

    flops: dict[Kind, int]
    num_bytes: int
    """Read and written: weights and cache."""
    bytes_sent: int = 0
    """By each device to others."""

    @property
    def total_flops(self) -> int:
        """Over all kinds."""
        return sum(self.flops.values())

    def limit_s(self, rates: MachineRates) -> float:
        """Least seconds at these rates."""
        return rates.limit_s({kind: float(count) for kind, count in self.flops.items()}, self.num_bytes)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Counts the costs of a model's steps by tracing its decoder, one layer of each kind; nothing is computed.

    The parameters may be loaded or abstract (strop.models.abstract). Those of a partitioned model are `rearranged`
    (strop.models.sharding), and the costs are those of each device.
    """

    params: Parameters
    spec: ModelSpec
    layout: Single | Partition

    def step(self, num_rows: int, num_logits: int, context_lens: list[int], num_new: int = 1) -> StepCost:
        """A step of `num_rows` token rows, of which `num_logits` need logits.

        Args:
            context_lens: per sequence, the slots its last row sees, itself included.
            num_new: the last rows of each sequence that this step computes.
        """
        flops: Counter[Kind] = Counter()
        num_bytes = bytes_sent = 0
        num_shards = 1
        if isinstance(self.layout, Partition) and self.layout.attention == "batch":
            num_shards = self.layout.mesh.size()
        for call, times in self.calls(num_rows, num_logits):
            seen = read = 0
            if isinstance(call, AttentionCall):
                window = call.window_len
                seen = sum(min(n - i, window or n) for n in context_lens for i in range(num_new))
                read = sum(min(n, (window or n) + num_new - 1) for n in context_lens)
            cost = self.cost(call, -(-seen // num_shards), -(-read // num_shards))
            flops[cost.kind] += times * cost.flops
            num_bytes += times * (cost.bytes_read + cost.bytes_written)
            bytes_sent += times * cost.bytes_sent
        return StepCost(dict(flops), num_bytes, bytes_sent)

    def cost(self, call: Any, visible_slots: int = 0, read_slots: int = 0) -> Cost:
        """Of one operation; the slots are those of attention (strop.ops.attention.cost)."""
        if isinstance(call, AttentionCall):
            kv_bytes = KV_BYTES[self.layout.kv_dtype] if self.layout.platform == "native" else (4, 0)
            return attention_cost.cost(call, visible_slots, read_slots, *kv_bytes)
        if isinstance(call, LinearCall):
            return linear_cost.cost(call)
        if isinstance(call, EmbedCall):
            return embed_cost.cost(call)
        if isinstance(call, ExpertsCall):
            return experts_cost.cost(call)
        if isinstance(call, AddNormCall):
            return Cost("f32", 0)  # neither products nor stored data
        if isinstance(call, CollectiveCall):
            return collective_cost.cost(call)
        return sample_cost.cost(call)

    def calls(self, num_rows: int, num_logits: int) -> list[tuple[Any, int]]:
        """The operations of one step and how many times each is done; those that pick tokens have `num_logits` rows.

        Of like layers the first stands for all.
        """
        layout = self.layout
        params, spec, num_alike = distinct_layers(self.params, self.spec)
        groups = cache_groups(spec)

        def step(params: Parameters, fields: jax.Array, tables: jax.Array, counts: jax.Array) -> jax.Array:
            rows = Rows(fields, tables, counts)
            caches = None
            if layout.platform == "native":
                caches = tuple(
                    new_cache(
                        "native",
                        len(group.layers),
                        1,
                        group.num_kv_heads,
                        group.head_dim,
                        layout.block_len,
                        kv_dtype=layout.kv_dtype,
                    )
                    for group in groups
                )
            hidden, _ = decoder.forward(params, spec, rows, caches, layout)
            row_ids = jnp.arange(num_logits, dtype=jnp.int32)
            return decoder.logits(params, spec, hidden, counts, layout, row_ids)

        if isinstance(layout, Partition):
            specs = parameter_specs(params, spec, layout), P(), P(), P()
            step = on_mesh(step, abstract_mesh(layout.mesh), specs, P())
        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((6, num_rows), (len(groups), num_logits, 1), (2,))]
        with record() as calls:
            jax.eval_shape(step, params, *ints)
        times = (1 if layer is None else num_alike[layer] for layer in calls.layers)
        return list(zip(calls, times, strict=True))

    def decode_step(self, batch: int, context_len: int) -> StepCost:
        """One step of `batch` sequences of `context_len` tokens, the new one included."""
        return self.step(batch, batch, [context_len] * batch)

    def prefill(self, num_prompts: int, prompt_len: int) -> StepCost:
        """Prompts in one step: no engine can read the weights less than once."""
        return self.step(num_prompts * prompt_len, num_prompts, [prompt_len] * num_prompts, prompt_len)
