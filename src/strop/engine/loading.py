"""A model name -> everything an engine needs, with memory computed and refused before anything is loaded."""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from strop.core.config import EngineConfig
from strop.core.errors import RequestError, UnsupportedError
from strop.formats.chat_templates import DEFAULT
from strop.formats.checkpoint import AnyCheckpoint, open_checkpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.gguf_tokenizer import tokenizer_from_gguf
from strop.formats.pack_cache import cache_directory
from strop.formats.sentence_transformers import Pooling, PoolingKind, read_pooling
from strop.formats.template import TemplateRenderer
from strop.formats.tokenizer import Tokenizer, tokenizer_from_folder
from strop.machine.cores import usable_cores
from strop.machine.memory import available_bytes
from strop.models.memory import MemoryPlan, plan_memory
from strop.models.mesh import MeshPart
from strop.models.reader import ParameterReader, load_spec
from strop.models.spec import ModelSpec
from strop.ops import native
from strop.ops.cost import KV_BYTES
from strop.ops.dispatch import Platform

if TYPE_CHECKING:  # jax is imported while the chat template's helper starts
    from strop.engine.group import Followers, Leader
    from strop.models.parameters import Parameters
    from strop.models.partition import Partition

log = logging.getLogger(__name__)


_LEAST = {
    "max_num_seqs": 1,
    "max_step_tokens": 1,
    "max_chunk_tokens": 0,
    "max_context_len": 0,
    "block_len": 1,
    "num_blocks": 0,
    "memory_bytes": 0,
    "num_threads": 0,
}


Runner = Literal["auto", "generate", "pooling"]
"""What a model is loaded for. auto: to pool, if it is an encoder or comes with the files of sentence-transformers."""

_GGUF_POOLING: tuple[PoolingKind | None, ...] = (None, "mean", "cls", "last")
"""By the number that a GGUF file has for it; None: the file does not say."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What loading found and made."""

    spec: ModelSpec
    params: "Parameters"
    tokenizer: Tokenizer
    memory: MemoryPlan
    platform: Platform
    pooling: Pooling | None = None
    """How texts become vectors; None: the model is to generate."""
    layout: "Partition | None" = None
    """Where it is on several devices: as its parameters are sharded."""
    group: "Followers | Leader | None" = None
    """The other processes whose devices it is on."""


def load_model(
    model: str,
    config: EngineConfig,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    *,
    chat: bool = False,
    runner: Runner = "generate",
) -> tuple[LoadedModel, EngineConfig]:
    """Opens, checks, plans memory, then loads. Returns the config with every 0 resolved.

    Args:
        on_plan: called with the memory plan before the weights are touched.
        chat: the chat template will be needed soon: start its helper process at once.
        runner: to pool (strop.engine.embedder), the cache has room for a step's tokens, or those of one longer text.

    Raises:
        FormatError, UnsupportedError: the checkpoint is damaged or asks for what Strop does not do.
        CapacityError: it does not fit.
    """
    checkpoint = open_checkpoint(model)
    spec = load_spec(checkpoint)
    reader = ParameterReader(checkpoint, spec)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.fit_embedding(spec.vocab_size)
    if chat:
        tokenizer.start_renderer()
    pooling = _pooling(model, checkpoint, spec, runner)
    if pooling is not None and pooling.max_tokens is not None and not config.max_context_len:
        config = replace(config, max_context_len=min(pooling.max_tokens, spec.max_context_len))
    config = resolve(config, spec)
    if pooling is not None:
        config = _for_pooling(config, spec)
        if config.mesh or config.processes:
            raise RequestError(f"mesh={config.mesh!r} is for models that generate: to pool, leave it out")

    group: Followers | Leader | None = None
    if config.processes is not None:
        from strop.engine.group import join

        group, config = join(config, config.processes)

    keep_compiled_steps()
    platform, reason = choose_platform(spec, config)
    if reason is not None:
        log.warning(
            "running on XLA without the native kernels (%s): the weights are dequantised to float32, which takes 4 to "
            "7 times the memory of 4-bit weights and is several times slower",
            reason,
        )
    layout = _layout(spec, config, platform)
    part = None
    if layout is not None:
        num_processes = 1 if config.processes is None else config.processes.num_processes
        part = MeshPart(layout.placement, layout.mesh, layout.mesh.size() // num_processes, layout.attention)
    memory = plan_memory_here(reader, spec, config, platform, part)
    if on_plan is not None:
        on_plan(memory)
    config = replace(config, num_blocks=memory.num_blocks, memory_bytes=memory.limit_bytes)
    native.set_num_threads(config.num_threads)

    from strop.models.load import load

    sharder = None
    if layout is not None:
        from strop.models.sharding import Sharder, make_mesh

        sharder = Sharder(spec, layout, make_mesh(layout.mesh))
    source_hash, num_positions = checkpoint.source_hash, config.max_context_len
    params = load(reader, spec, platform, num_positions=num_positions, source_hash=source_hash, sharder=sharder)
    if group is not None:
        from strop.engine.channel import Ready

        num_blocks = group.agree(Ready(platform, checkpoint.source_hash(), config.num_blocks))
        config = replace(config, num_blocks=num_blocks)
        memory = plan_memory_here(reader, spec, config, platform, part)
    return LoadedModel(spec, params, tokenizer, memory, platform, pooling, layout, group), config


def _layout(spec: ModelSpec, config: EngineConfig, platform: Platform) -> "Partition | None":
    """How the model is to be partitioned; None for one device."""
    if not config.mesh and config.layout == "auto" and config.attention == "heads":
        return None
    from strop.engine.layouts import choose_layout
    from strop.models.partition import Partition

    layout = choose_layout(spec, config, platform)
    return layout if isinstance(layout, Partition) else None


def _pooling(model: str, checkpoint: AnyCheckpoint, spec: ModelSpec, runner: Runner) -> Pooling | None:
    """How the model is to pool, None if it is to generate. UnsupportedError for an encoder that is to generate."""
    if runner not in get_args(Runner):
        raise RequestError(f"runner={runner!r:.80} is unknown: choose from {', '.join(get_args(Runner))}")
    if runner == "generate":
        if not spec.causal:
            raise UnsupportedError(
                f"{model}: an encoder, which makes vectors of texts and writes none: use `strop embed` or LLM.embed; to"
                " write text, pass a decoder, such as a Llama or a Qwen"
            )
        return None
    found = _stored_pooling(checkpoint)
    if found is None and (runner == "pooling" or not spec.causal):
        found = Pooling("last" if spec.causal else "mean")  # only its last token has seen all of a decoder's text
        log.info("the model does not say how to pool: taking the %s of its hidden states, to length 1", found.kind)
    return found


def _stored_pooling(checkpoint: AnyCheckpoint) -> Pooling | None:
    """What the model's files say of it, if anything."""
    if not isinstance(checkpoint, GGUFCheckpoint):
        return read_pooling(checkpoint.path)
    key = f"{checkpoint.metadata.get('general.architecture')}.pooling_type"
    number = checkpoint.metadata.get(key, 0)
    if number not in range(len(_GGUF_POOLING)):
        raise UnsupportedError(f"{checkpoint.path}: {key}={number!r:.80}; accepted are 1 (mean), 2 (cls) and 3 (last)")
    kind = _GGUF_POOLING[number]
    return None if kind is None else Pooling(kind)


def _for_pooling(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """Steps that hold a whole text, where its tokens see those after them, and the blocks that one step can use."""
    if not spec.causal:
        config = replace(config, max_step_tokens=max(config.max_step_tokens, config.max_context_len))
    of_a_step = config.max_step_tokens // config.block_len + config.max_num_seqs
    of_a_text = -(-config.max_context_len // config.block_len)
    return replace(config, num_blocks=1 + max(of_a_step, of_a_text))


def choose_platform(spec: ModelSpec, config: EngineConfig) -> tuple[Platform, str | None]:
    """What the model runs on here, and on a processor without the native kernels the reason."""
    import jax

    if jax.default_backend() != "cpu":
        return "xla", None
    reason = no_kernels(spec, config)
    return ("native" if reason is None else "xla"), reason


def plan_memory_here(
    reader: ParameterReader,
    spec: ModelSpec,
    config: EngineConfig,
    platform: Platform,
    part: MeshPart | None = None,
) -> MemoryPlan:
    """`plan_memory` with what this machine has. `config` must be resolved. Raises CapacityError."""
    import jax

    item_bytes = 4 if jax.default_backend() == "cpu" else 2
    return plan_memory(
        reader, spec, config, platform, available_bytes=available_bytes(), dense_item_bytes=item_bytes, part=part
    )


def no_kernels(spec: ModelSpec, config: EngineConfig) -> str | None:
    """Why the native kernels cannot serve this model here; None when they can."""
    if os.environ.get("STROP_NATIVE") == "0":
        return "STROP_NATIVE=0"
    if not native.register():
        if forced := os.environ.get("STROP_ISA"):
            raise UnsupportedError(
                f"STROP_ISA={forced!r}: this machine does not run it, or the native library is not built; known are "
                f"{', '.join(native.ISAS)}: unset it to run the best one"
            )
        return "the library was not built, or this processor lacks AVX2"
    from strop.ops.attention.cpu import declines_shape
    from strop.ops.linear.cpu import declines_gate

    for layer in dict.fromkeys(spec.layers):
        reason = declines_shape(layer.attention.head_dim, config.block_len) or declines_gate(layer.mlp.ffn_dim)
        if reason is not None:
            return reason
    return None


def load_text_side(model: str, chat_template: str | None = None) -> Tokenizer:
    """What a front end needs of a model whose engine runs elsewhere; the template, if given, is used for all chats.

    Raises FormatError for a template that does not parse.
    """
    checkpoint = open_checkpoint(model)
    # What a client says can make a template slow, and other chats wait for it.
    tokenizer = load_tokenizer(checkpoint, TemplateRenderer(timeout_s=1.0))
    tokenizer.fit_embedding(load_spec(checkpoint).vocab_size)
    if chat_template is not None:
        tokenizer.chat_templates = {DEFAULT: chat_template}
        with suppress(RequestError):  # whether it likes these messages is another matter
            tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    tokenizer.start_renderer()
    return tokenizer


def load_tokenizer(checkpoint: AnyCheckpoint, renderer: TemplateRenderer | None = None) -> Tokenizer:
    """The tokenizer stored with the checkpoint."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return tokenizer_from_gguf(checkpoint.metadata, renderer)
    return tokenizer_from_folder(checkpoint.path, renderer)


def resolve(config: EngineConfig, spec: ModelSpec) -> EngineConfig:
    """The config with the model's and the machine's values for 0. Raises RequestError for what is out of range."""
    for name, least in _LEAST.items():
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise RequestError(f"{name}={value!r} is out of range: an integer, {least} or more")
    if config.kv_dtype not in KV_BYTES:
        raise RequestError(f"kv_dtype={config.kv_dtype!r} is unknown: choose from {', '.join(KV_BYTES)}")
    if config.max_context_len > spec.max_context_len:
        raise RequestError(
            f"max_context_len={config.max_context_len} exceeds the model's own limit of {spec.max_context_len} tokens"
        )
    return replace(
        config,
        max_context_len=config.max_context_len or spec.max_context_len,
        num_threads=config.num_threads or usable_cores(),
    )


def keep_compiled_steps() -> None:
    """Compiled steps go to the cache directory, so that a second start does not compile."""
    directory = cache_directory() / "xla"
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        return
    import jax

    # A full disk costs only compile time, and jax would warn about each step.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    update: Callable[[str, object], None] = jax.config.update
    update("jax_compilation_cache_dir", str(directory))
    update("jax_persistent_cache_min_compile_time_secs", 0.0)
    update("jax_persistent_cache_min_entry_size_bytes", -1)
