"""One configuration, and what to expect of it."""

import math
from dataclasses import dataclass
from typing import Any

from strop.models.mesh import AttentionSharding
from strop.plan.latency import Pass, Placed
from strop.plan.objective import Latency
from strop.plan.passes import PassModel, PassTime
from strop.plan.traffic import Traffic

MOST_LOAD = 0.8
"""Share of its capacity that a copy is given: requests do not come evenly, and queues grow without end at 1."""


@dataclass(frozen=True)
class Candidate:
    """A copy of a model that takes prompts in and continues `batch` answers, in turn, on the same devices."""

    model: PassModel
    traffic: Traffic
    batch: int
    prompt_pass: Pass
    passes_per_prompt: int
    prompt: PassTime
    decode: PassTime
    copies: int
    """That the traffic needs; as many as there are devices for, where no rate is given."""
    price_per_device_hour: float | None

    # --- latencies

    @property
    def num_devices(self) -> int:
        """Of one copy."""
        return self.model.num_devices

    @property
    def round_s(self) -> float:
        """In which `batch` requests are taken in and answered."""
        num_prompt_passes = self.batch / self.prompt_pass.batch * self.passes_per_prompt
        return self.traffic.output_tokens * self.decode.seconds + num_prompt_passes * self.prompt.seconds

    @property
    def ttft_s(self) -> float:
        """From when its turn comes: a step of the others' answers goes before each pass of its prompt."""
        waits = self.decode.seconds if self.batch > self.prompt_pass.batch else 0.0
        return self._gathering_s + self.passes_per_prompt * (self.prompt.seconds + waits)

    @property
    def _gathering_s(self) -> float:
        """At a rate, prompts that share a pass wait for each other, and for the answers at hand if all end together."""
        if self.traffic.rate_per_s is None:
            return 0.0
        rate_per_s = self.traffic.rate_per_s / self.copies
        gathering_s = (self.prompt_pass.batch - 1) / 2 / rate_per_s
        load = min(1.0, rate_per_s / self.requests_per_s)
        ends_together = self.batch == self.prompt_pass.batch
        return max(gathering_s, load * self.round_s / 2 if ends_together else 0.0)

    @property
    def itl_s(self) -> float:
        """Mean time between tokens, with the prompts of the others between that do not share its own's pass."""
        return self.decode.seconds + self.passes_per_step * self.prompt.seconds

    @property
    def passes_per_step(self) -> float:
        """Mean number of passes of others' prompts from one token to the next."""
        num_passes = (self.batch / self.prompt_pass.batch - 1) * self.passes_per_prompt
        return num_passes / self.traffic.output_tokens

    @property
    def max_itl_s(self) -> float:
        """Longest time between tokens: a step and a pass of others' prompts, or as many as the mean needs."""
        return self.decode.seconds + math.ceil(self.passes_per_step) * self.prompt.seconds

    @property
    def e2e_s(self) -> float:
        """From when its turn comes to the last token."""
        return self.ttft_s + (self.traffic.output_tokens - 1) * self.itl_s

    def latency_s(self, name: Latency) -> float:
        """By its name in objectives."""
        return float(getattr(self, f"{name}_s"))

    # --- throughput and cost

    @property
    def requests_per_s(self) -> float:
        """Of one copy that always has requests waiting."""
        return self.batch / self.round_s

    @property
    def device_s_per_request(self) -> float:
        """What the devices in use cost: at the traffic's rate, or, without one, at full batches."""
        if self.traffic.rate_per_s is None:
            return self.num_devices / self.requests_per_s
        return self.copies * self.num_devices / self.traffic.rate_per_s

    @property
    def tokens_per_request(self) -> int:
        """Read and written."""
        return self.traffic.input_tokens + self.traffic.output_tokens

    @property
    def cost_per_request(self) -> float | None:
        """In the price's currency."""
        return (
            None
            if self.price_per_device_hour is None
            else self.device_s_per_request * self.price_per_device_hour / 3600
        )

    @property
    def mfu(self) -> float:
        """Of prompts and answers together, at full batches: 2 N FLOPs per token."""
        flops = 2 * self.model.network.num_parameters * self.tokens_per_request * self.requests_per_s
        return flops / (self.num_devices * self.model.device.peak("bf16"))

    @property
    def mbu(self) -> float:
        """Of a decode step: weights and cache once, over what memories could read in its time."""
        step_bytes = (
            self.model.weight_bytes + self.cache_bytes_per_token * self.sequences_per_device * self.mean_context_len
        )
        return step_bytes / (self.decode.seconds * self.model.device.memory_bytes_per_s)

    # --- memory, of each device

    @property
    def mean_context_len(self) -> int:
        """That a decode step sees."""
        return self.traffic.input_tokens + self.traffic.output_tokens // 2

    @property
    def cache_sharding(self) -> AttentionSharding:
        """Where keys and values lie."""
        return "heads" if self.decode.placed is None else self.decode.placed.sharding

    @property
    def cache_bytes_per_token(self) -> float:
        """Of each sequence that a device holds, its share of the heads."""
        return self.model.cache_bytes_per_token[self.cache_sharding]

    @property
    def sequences_per_device(self) -> int:
        """Whose keys and values it holds."""
        shards = self.num_devices if self.cache_sharding == "batch" else 1
        return math.ceil(self.batch / shards)

    @property
    def cache_bytes(self) -> float:
        """With every sequence as long as the longest."""
        return self.cache_bytes_per_token * self.sequences_per_device * self.traffic.context_len

    @property
    def activation_bytes(self) -> float:
        """Of the largest step: a pass of prompts, and an answer's token of everybody."""
        return self.model.activation_bytes(self.prompt_pass.tokens + self.batch, self.batch)

    @property
    def memory_bytes(self) -> float:
        """All of it."""
        return self.model.weight_bytes + self.cache_bytes + self.activation_bytes + self.model.runtime_bytes

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory_bytes <= self.model.usable_bytes

    @property
    def longest_context_tokens(self) -> int:
        """Of each of `batch` sequences, by memory; the model's own limit may be less."""
        room = self.model.usable_bytes - (self.memory_bytes - self.cache_bytes)
        return int(room / (self.cache_bytes_per_token * self.sequences_per_device))

    def as_json(self) -> dict[str, Any]:
        """For `--json`; times in seconds, rates of one copy, costs in device-seconds and, with a price, money."""
        per_million = 1e6 / self.tokens_per_request
        cost = self.cost_per_request
        return {
            "devices": self.num_devices,
            "copies": self.copies,
            "mesh": list(self.model.mesh),
            "weight_dtype": self.model.weight_dtype,
            "batch": self.batch,
            "prompt": {
                "prompts_at_once": self.prompt_pass.batch,
                "chunk_tokens": self.prompt_pass.new_tokens,
                "passes": self.passes_per_prompt,
                "pass_s": self.prompt.seconds,
                **_placed_json(self.prompt.placed),
            },
            "decode": {"step_s": self.decode.seconds, **_placed_json(self.decode.placed)},
            "ttft_s": self.ttft_s,
            "itl_s": self.itl_s,
            "max_itl_s": self.max_itl_s,
            "e2e_s": self.e2e_s,
            "requests_per_min": 60 * self.requests_per_s,
            "tokens_per_s": self.requests_per_s * self.tokens_per_request,
            "output_tokens_per_s": self.requests_per_s * self.traffic.output_tokens,
            "mfu": self.mfu,
            "mbu": self.mbu,
            "device_s_per_request": self.device_s_per_request,
            "device_s_per_million_tokens": self.device_s_per_request * per_million,
            "cost_per_request": cost,
            "cost_per_million_tokens": None if cost is None else cost * per_million,
            "memory_bytes_per_device": {
                "weights": round(self.model.weight_bytes),
                "cache": round(self.cache_bytes),
                "activations": round(self.activation_bytes),
                "runtime": round(self.model.runtime_bytes),
                "total": round(self.memory_bytes),
                "limit": round(self.model.usable_bytes),
            },
            "longest_context_tokens": self.longest_context_tokens,
            "binds": self.binds,
            "prompt_binds": self.prompt_binds,
            "query_heads": self.model.network.num_heads,
        }

    @property
    def binds(self) -> str:
        """What most of a decode step waits for."""
        return self._binds(Pass(self.batch, 1, self.mean_context_len), self.decode)

    @property
    def prompt_binds(self) -> str:
        """What most of a pass of prompts waits for."""
        return self._binds(self.prompt_pass, self.prompt)

    def _binds(self, step: Pass, time: PassTime) -> str:
        shares = self.model.parts(step, time)
        return max(shares, key=lambda name: shares[name])


def _placed_json(placed: Placed | None) -> dict[str, Any]:
    return {} if placed is None else {"layout": placed.layout, "attention": placed.sharding}
