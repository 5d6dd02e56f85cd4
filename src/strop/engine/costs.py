"""What a step costs at least, from the operations that the model's own code records."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from strop.machine.probe import MachineRates
from strop.models import decoder
from strop.models.cache import cache_groups
from strop.models.layout import Single
from strop.models.parameters import Parameters
from strop.models.spec import ModelSpec
from strop.ops.attention import AttentionCall, Rows, new_cache
from strop.ops.attention import cost as attention_cost
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

    @property
    def total_flops(self) -> int:
        """Over all kinds."""
        return sum(self.flops.values())

    def limit_s(self, rates: MachineRates) -> float:
        """Least seconds at these rates."""
        return rates.limit_s({kind: float(count) for kind, count in self.flops.items()}, self.num_bytes)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Counts the costs of a loaded model's steps by tracing its decoder; nothing is computed."""

    params: Parameters
    spec: ModelSpec
    layout: Single

    def step(self, num_rows: int, num_logits: int, context_lens: list[int], num_new: int = 1) -> StepCost:
        """A step of `num_rows` token rows, of which `num_logits` need logits.

        Args:
            context_lens: per sequence, the slots its last row sees, itself included.
            num_new: the last rows of each sequence that this step computes.
        """
        flops: Counter[Kind] = Counter()
        num_bytes = 0
        for call in self.calls(num_rows, num_logits):
            seen = read = 0
            if isinstance(call, AttentionCall):
                window = call.window_len
                seen = sum(min(n - i, window or n) for n in context_lens for i in range(num_new))
                read = sum(min(n, (window or n) + num_new - 1) for n in context_lens)
            cost = self.cost(call, seen, read)
            flops[cost.kind] += cost.flops
            num_bytes += cost.bytes_read + cost.bytes_written
        return StepCost(dict(flops), num_bytes)

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
        return sample_cost.cost(call)

    def calls(self, num_rows: int, num_logits: int) -> list[Any]:
        """The operations of one step, in order; those that pick tokens have `num_logits` rows."""
        layout, spec = self.layout, self.spec
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
            return decoder.logits(params, spec, hidden[:num_logits], counts, layout)

        ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((6, num_rows), (len(groups), num_logits, 1), (2,))]
        with record() as calls:
            jax.eval_shape(step, self.params, *ints)
        return calls

    def decode_step(self, batch: int, context_len: int) -> StepCost:
        """One step of `batch` sequences of `context_len` tokens, the new one included."""
        return self.step(batch, batch, [context_len] * batch)

    def prefill(self, num_prompts: int, prompt_len: int) -> StepCost:
        """Prompts in one step: no engine can read the weights less than once."""
        return self.step(num_prompts * prompt_len, num_prompts, [prompt_len] * num_prompts, prompt_len)
