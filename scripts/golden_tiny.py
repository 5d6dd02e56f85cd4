"""Make one folder of tests/golden for a tiny random model, and check that nothing in it is idle or ambiguous."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_variant import Variant
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

MIN_GAP = 1e-3
"""Least distance of the two best logits at a greedy step; float32 evaluation orders differ by less than 1e-4."""

MIN_ROUTER_GAP = 0.02
"""Least distance of the router logits of the last expert chosen and the next: other precisions mostly choose alike."""

TOLERANCE = 1e-5
"""Most by which the cache, fused attention or float64 may move an output."""

MIN_EFFECT = 1e-4
"""Least movement of some output when a parameter or a config key is ignored."""

SEED = 2
NUM_TOKENS, NUM_GREEDY = 40, 8

UNSEEN = re.compile(
    r".*_size|num_.*|n_.*|head_dim|.*_token_id|(original_)?max_position_embeddings|tie_word_embeddings|"
    r"sliding_window_pattern"
)
"""Config keys that the tensors' shapes check, bounds, and ids that no output depends on."""


def make_tiny(variant: Variant, folder: Path) -> None:
    """Write config.json, config_legacy.json, the safetensors and expected.npz of one variant."""
    rng = np.random.default_rng([SEED, *variant.name.encode()])
    config = AutoConfig.for_model(variant.family.model_type, **given_config(variant))
    auto = AutoModel if variant.family.encoder else AutoModelForCausalLM
    dtype = getattr(torch, variant.dtype)
    plain = {"attn_implementation": variant.attention, "experts_implementation": "eager"}
    original = auto.from_config(config, dtype=torch.float32, **plain).eval()
    randomise(original, variant, rng, dtype)
    deepcopy(original).to(dtype).save_pretrained(folder, max_shard_size=variant.shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    publish(variant, folder, config.num_hidden_layers)
    legacy = legacy_config(json.loads((folder / "config.json").read_text()), variant)
    (folder / "config_legacy.json").write_text(json.dumps(legacy, indent=2, sort_keys=True) + "\n")

    def load(**kwargs: Any) -> Any:
        arguments = {"dtype": torch.float32, **plain, **kwargs}
        loaded, info = auto.from_pretrained(folder, output_loading_info=True, **arguments)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise SystemExit(f"{variant.name}: the stored names do not load: {info}")
        return loaded.eval()

    model = load()
    tokens, continuations, gap = draw_tokens(model, variant, config.vocab_size, rng)
    batch = torch.from_numpy(tokens).long()
    outputs = evaluate(model, batch)
    for name, other in (
        ("the model saved", original),
        ("config_legacy.json", load(config=AutoConfig.for_model(**deepcopy(legacy)))),
    ):
        if not torch.equal(outputs, evaluate(other, batch)):
            raise SystemExit(f"{variant.name}: {name} means something else than the folder with config.json")
    if variant.family.encoder:
        np.savez(folder / "expected.npz", tokens=tokens, hidden=outputs.numpy())
    else:
        np.savez(folder / "expected.npz", tokens=tokens, logits=outputs.numpy(), greedy=continuations)
    check_nothing_idle(variant, model, batch)

    others = {"float64": evaluate(load(dtype=torch.float64), batch)}
    if model._supports_sdpa:
        others["sdpa"] = evaluate(load(attn_implementation="sdpa"), batch)
    # Dynamic frequencies follow the length, and cached keys keep those of their time.
    if not variant.family.encoder and (variant.rope or {}).get("rope_type") != "dynamic":
        others["cache"] = logits_through_cache(model, batch)
    distances = {name: float((other.double() - outputs.double()).abs().max()) for name, other in others.items()}
    if max(distances.values()) > TOLERANCE:
        raise SystemExit(f"{variant.name}: another way to compute the outputs moves them too far: {distances}")
    moved = ", ".join(f"{value:.1e} to {name}" for name, value in distances.items())
    print(f"{variant.name:26} max |output| {outputs.abs().max():5.2f}  min gap {gap:.4f}  max difference {moved}")


def given_config(variant: Variant) -> dict[str, Any]:
    """The keys that the variant gives, rotary ones included, and the defaults of all variants."""
    given = {"tie_word_embeddings": False, **variant.config}
    default = AutoConfig.for_model(variant.family.model_type)
    if hasattr(default, "max_position_embeddings") and "n_positions" not in given:
        given = {"max_position_embeddings": 64, **given}
    return {**given, "rope_parameters": variant.rope} if variant.rope else given


def randomise(model: Any, variant: Variant, rng: np.random.Generator, dtype: torch.dtype) -> None:
    """Fill every parameter with values of dtype, so that logits are O(1) and no bias or norm weight is idle."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for name, parameter in sorted(model.named_parameters()):
        values = rng.standard_normal(tuple(parameter.shape))
        if name.endswith("bias"):
            values = 0.3 * values
        elif name in embeddings:
            values = 0.125 * values
        elif is_norm(name, parameter):
            values = variant.family.idle_norm + 0.2 * values
        elif parameter.ndim > 1:
            values /= np.sqrt(parameter.shape[-2 if name.endswith(variant.family.input_major) else -1])
        parameter.copy_(torch.from_numpy(values).float().to(dtype))


def is_norm(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 1 and not name.endswith(("bias", "sinks"))


def publish(variant: Variant, folder: Path, num_layers: int) -> None:
    """Give the stored tensors the names, and add the buffers, of the family's published checkpoints."""
    if not variant.renamed and not variant.extras:
        return
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for pattern, replacement in variant.renamed:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    for name, values in variant.extras.items():
        tensor = tensors[values] if isinstance(values, str) else torch.from_numpy(np.array(values))
        for layer in range(num_layers if "{layer}" in name else 1):
            tensors[name.format(layer=layer)] = tensor.clone()
    save_file(tensors, path, metadata={"format": "pt"})


def legacy_config(config: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """The same config as checkpoints older than transformers 5 spell it (rope_theta, rope_scaling, torch_dtype)."""
    legacy = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    if variant.rope:
        legacy |= legacy_rope(config, variant.family.rope_type_key)
    legacy["torch_dtype"] = config["dtype"]
    without = {key: value for key, value in legacy.items() if key != "head_dim"}
    if getattr(AutoConfig.for_model(**deepcopy(without)), "head_dim", None) == legacy.get("head_dim", 0):
        legacy = without
    if config.get("use_sliding_window") is False:
        # Old Qwen2 files give a window and turn it off beside it.
        legacy["sliding_window"] = 4
    if config["tie_word_embeddings"] and AutoConfig.for_model(config["model_type"]).tie_word_embeddings:
        del legacy["tie_word_embeddings"]
    for key, published in variant.family.legacy.items():
        if key in legacy:
            value = legacy.pop(key)
            legacy |= {published: value} if published else {}
    legacy |= variant.legacy
    for key in [key for key, value in variant.legacy.items() if value is None]:
        del legacy[key]
    legacy["transformers_version"] = "4.40.0"
    return legacy


def legacy_rope(config: dict[str, Any], rope_type_key: str) -> dict[str, Any]:
    """The rotary keys beside the others: rope_theta, rope_scaling, and those of a part or of local layers."""
    rope, legacy = dict(config["rope_parameters"]), {}
    if "full_attention" in rope:
        legacy["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            legacy[key] = rope.pop(key)
    if "original_max_position_embeddings" in config:
        rope.pop("original_max_position_embeddings", None)
    if rope["rope_type"] not in ("default", "llama3"):
        rope[rope_type_key] = rope.pop("rope_type")
    return {**legacy, "rope_scaling": None if rope == {"rope_type": "default"} else rope}


def evaluate(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Logits of every position without a cache, or an encoder's last hidden state."""
    forget(model)
    output = model(batch, use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


def forget(model: Any) -> None:
    """Dynamic rotary frequencies of a long sequence stay until a short one comes."""
    model(torch.zeros((1, 1), dtype=torch.long), use_cache=False)


def draw_tokens(
    model: Any, variant: Variant, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, Any, float]:
    """Two rows of tokens and their greedy continuations, drawn until no step is near a tie."""
    while True:
        tokens = rng.integers(0, vocab_size, size=(2, NUM_TOKENS), dtype=np.int32)
        if variant.family.encoder:
            return tokens, None, 0.0
        if router_gap(model, tokens) < MIN_ROUTER_GAP:
            continue
        continuations, gaps = zip(*(greedy(model, row.tolist(), NUM_GREEDY) for row in tokens), strict=True)
        sequences = np.concatenate([tokens, np.array(continuations, np.int32)], axis=1)
        if min(gaps) < MIN_GAP or router_gap(model, sequences) < MIN_ROUTER_GAP:
            continue
        best = evaluate(model, torch.from_numpy(sequences).long()).argmax(-1)
        if np.array_equal(best[:, NUM_TOKENS - 1 : -1], sequences[:, NUM_TOKENS:]):
            return tokens, sequences[:, NUM_TOKENS:], min(gaps)


def router_gap(model: Any, tokens: np.ndarray) -> float:
    """The least distance of the last chosen expert's logit to the next one's; infinity without experts."""
    gaps = [np.inf]

    def collect(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        best = output[0].topk(router.top_k + 1).values
        gaps.append(float((best[:, -2] - best[:, -1]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    handles = [router.register_forward_hook(collect) for router in routers]
    evaluate(model, torch.from_numpy(tokens).long())
    for handle in handles:
        handle.remove()
    return min(gaps)


def logits_through_cache(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """25 tokens at once, then one at a time across any window's edge."""
    forget(model)
    output = model(batch[:, :25], use_cache=True)
    pieces = [output.logits]
    for i in range(25, NUM_TOKENS):
        output = model(batch[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def greedy(model: Any, tokens: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy continuation through the cache, end-of-sequence ignored, and the least gap of the two best logits."""
    generated: list[int] = []
    gaps: list[float] = []
    cache, step = None, tokens
    forget(model)
    for _ in range(num_tokens):
        output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        values, ids = output.logits[0, -1].topk(2)
        generated.append(int(ids[0]))
        gaps.append(float(values[0] - values[1]))
        cache, step = output.past_key_values, generated[-1:]
    return generated, min(gaps)


# --- nothing may be idle --------------------------------------------------------------------------------------------


def check_nothing_idle(variant: Variant, model: Any, batch: torch.Tensor) -> None:
    """Exit if a parameter, an expert or a config key could be ignored without moving an output."""
    outputs = evaluate(model, batch)
    idle = []
    for name, parameter in model.named_parameters():
        # A stack of experts: each alone.
        for part in parameter if parameter.ndim == 3 or "_proj_bias" in name else [parameter]:
            kept = part.clone()
            part.fill_(variant.family.idle_norm if is_norm(name, part) else 0.0)
            if (evaluate(model, batch) - outputs).abs().max() < MIN_EFFECT:
                idle.append(name)
            part.copy_(kept)
    for key, changed in without_each_key(variant):
        if not_moved(model, variant, changed, batch, outputs):
            idle.append(key)
    unexpected = {name for name in idle if not name.endswith(variant.idle or ("no name",))}
    if unexpected:
        raise SystemExit(f"{variant.name}: nothing shows when these are ignored: {sorted(unexpected)}")


def without_each_key(variant: Variant) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each config key that says something else than the family's default, and the config without it."""
    given, default = given_config(variant), AutoConfig.for_model(variant.family.model_type)
    for key, value in given.items():
        if not UNSEEN.fullmatch(key) and key != "rope_parameters" and value != getattr(default, key, None):
            yield key, {other: given[other] for other in given if other != key}
    rope = variant.rope or {}
    for layer_type in [key for key in rope if key.endswith("_attention")] or [None]:
        part = rope[layer_type] if layer_type else rope
        for key, value in part.items():
            if value != "default" and not UNSEEN.fullmatch(key):
                other = {**part, key: another(value)}
                yield key, {**given, "rope_parameters": {**rope, layer_type: other} if layer_type else other}


def another(value: Any) -> Any:
    """A legal value of the same kind."""
    if isinstance(value, str):
        return "default"
    if isinstance(value, list):
        return value[::-1]
    if isinstance(value, bool):
        return not value
    return 4 * value if value > 1 else value / 2


def not_moved(model: Any, variant: Variant, config: dict[str, Any], batch: torch.Tensor, outputs: torch.Tensor) -> bool:
    auto = AutoModel if variant.family.encoder else AutoModelForCausalLM
    try:
        other = auto.from_config(AutoConfig.for_model(variant.family.model_type, **deepcopy(config))).eval()
        other.load_state_dict(model.state_dict())
        return float((evaluate(other, batch) - outputs).abs().max()) < MIN_EFFECT
    except (RuntimeError, StrictDataclassError):
        # Other tensors or other shapes show by themselves.
        return False
