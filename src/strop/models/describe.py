"""A ModelSpec in words."""

from collections.abc import Collection, Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from strop.models.spec import Attention, LayerSpec, ModelSpec, Rope


def describe_spec(spec: ModelSpec) -> list[tuple[str, str]]:
    """(what, in words) of the network: its size, then each kind of layer. Whatever is not the default is named."""
    head = "output head shared with the embedding" if spec.tied_embeddings else "output head of its own"
    others = _settings(spec, {"model_dim", "vocab_size", "layers", "tied_embeddings", "max_context_len", "causal"})
    rows = [
        (
            "network",
            "" if spec.causal else "an encoder: tokens see the whole text; `strop embed` makes vectors with it",
        ),
        ("layers", f"{spec.num_layers}"),
        ("model dim", f"{spec.model_dim:,}"),
        ("vocabulary", f"{spec.vocab_size:,} tokens, {head if spec.causal else 'no output head'}"),
        ("context", f"{spec.max_context_len:,} tokens"),
        ("also", ", ".join(others)),
    ]
    kinds: dict[LayerSpec, list[int]] = {}
    for i, layer in enumerate(spec.layers):
        kinds.setdefault(layer, []).append(i)
    for layer, places in kinds.items():
        name = "every layer" if len(kinds) == 1 else f"layer{'s' * (len(places) > 1)} {ranges(places)}"
        rows += [(name, _attention(layer.attention)), ("", ", ".join(_settings(layer, {"attention"})))]
    return rows


def _attention(attention: Attention) -> str:
    window = "the whole context" if attention.window_len is None else f"a window of {attention.window_len:,} tokens"
    parts = [
        f"{attention.num_heads} query heads on {attention.num_kv_heads} key-value heads of {attention.head_dim} dims",
        f"sees {window}",
        "no rope" if attention.rope is None else _rope(attention.rope, attention.head_dim),
        *_settings(attention, {"num_heads", "num_kv_heads", "head_dim", "window_len", "rope", "scale"}),
    ]
    if abs(attention.scale * attention.head_dim**0.5 - 1) > 1e-6:
        parts.append(f"scale={attention.scale:.6g}")
    return ", ".join(parts)


def _rope(rope: Rope, head_dim: int) -> str:
    part = "" if rope.rotary_dim == head_dim else f" on {rope.rotary_dim} dims"
    if rope.inv_freq_scale is None:
        scaling = ""
    elif len(set(rope.inv_freq_scale)) == 1:
        scaling = f", positions scaled by {rope.inv_freq_scale[0]:.6g}"
    else:
        scaling = f", frequencies scaled by {min(rope.inv_freq_scale):.6g} to {max(rope.inv_freq_scale):.6g}"
    others = _settings(rope, {"theta", "rotary_dim", "inv_freq_scale"})
    return ", ".join([f"rope theta {rope.theta:,.6g}{part}{scaling}", *others])


def _settings(part: Any, told: Collection[str]) -> list[str]:
    """`name=value` of the fields that have no default or differ from it, without those `told` already."""
    found = []
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name in told or value is None or (field.default is not MISSING and value == field.default):
            continue
        if is_dataclass(value):
            found.append(f"{field.name}({', '.join(_settings(value, ()))})")
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            found.append(field.name if value is True else f"{field.name}={shown}")
    return found


def ranges(numbers: Iterable[int]) -> str:
    """`0-4, 6` of ascending numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
