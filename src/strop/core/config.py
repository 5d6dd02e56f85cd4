"""How the engine is to run: small, frozen, plain data."""

from dataclasses import dataclass
from typing import Literal

KvDtype = Literal["bf16", "int8"]
"""How keys and values are cached. int8: codes of each token's key and value with a scale of their own, absmax / 127."""

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Processes:
    """Several processes that together run one engine, each on devices of its own (strop.engine.group)."""

    coordinator: str
    """HOST:PORT at which the first process waits for the others. Whoever reaches it is trusted."""
    num_processes: int
    process_id: int
    """0 is the first, which takes the requests; the others do what it says."""
    join_timeout_s: float = 120.0
    """How long they wait for each other at the start."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits and sizes of one engine. A plan emits it, `serve` and `run` take it."""

    max_num_seqs: int = 32
    """Sequences that may be in one step."""
    max_step_tokens: int = 512
    """Token budget of one step: prefill chunks and decode tokens together."""
    max_chunk_tokens: int = 0
    """Of these, tokens of prompts while answers are continued, whose every token takes as long as its step; 0 means no
    such limit. Prompts that cannot be divided are exempt."""
    max_context_len: int = 0
    """Longest prompt + answer in tokens; 0 means the model's own limit."""
    block_len: int = 32
    """Tokens per cache block (page)."""
    kv_dtype: KvDtype = "bf16"
    """Of the cache; int8 takes little more than half the memory. Without the native kernels, "bf16" keeps the weights'
    type, and int8 rounds but saves nothing."""
    num_blocks: int = 0
    """Cache blocks of every layer, one of them for padding; 0 means as many as `memory_bytes` leaves room for, capped
    by what the sequences can use. A layer with a window takes fewer where that is all that its windows can use."""
    memory_bytes: int = 0
    """Ceiling for the whole process; 0 means the memory available when the engine starts."""
    num_threads: int = 0
    """Threads that compute; 0 means the cores this process may use."""
    mesh: str = ""
    """Devices along the axes x, y and z, such as "8" or "2x4"; empty: one device."""
    layout: str = "auto"
    """How the model is partitioned over them (strop.models.mesh): ws1d, ws2d, wg_x, wg_xy, wg_xyz or dp; auto: as least
    is sent, on XLA in each step anew."""
    attention: Literal["heads", "batch"] = "heads"
    """What of attention, and of the cache, the devices of `mesh` share: heads, or sequences, of which each then has its
    own in a cache of its own: for few key/value heads, which sharded over heads all devices would have."""
    processes: Processes | None = None
    """The processes whose devices make up `mesh`; None: this one alone."""
    prefix_cache: bool = True
    """Whether finished blocks are kept and shared by sequences with the same prefix."""
