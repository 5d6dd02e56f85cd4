"""Rotary positions from a config: theta, the rotated part of a head, and the ways to stretch a context.

Formulas as transformers has them (modeling_rope_utils.py); each becomes one multiplier per frequency.
"""

import math
from collections.abc import Callable, Mapping

from strop.core.errors import UnsupportedError
from strop.models.config import Config
from strop.models.spec import Rope


def rope(
    config: Config,
    *,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    is_scaled: bool = True,
) -> Rope:
    """Rotary positions from `rope_theta` and `rope_scaling`, or `rope_parameters` that joins them (transformers 5).

    Args:
        layer_type: key in `rope_parameters` where layers differ.
        theta_key: where older configs keep this rope's theta.
        is_scaled: whether `rope_scaling` of older configs applies to it.
    """
    config.get("original_max_position_embeddings")  # may be there without a scaling
    scaling = _scaling(config, layer_type, is_scaled)
    theta = _agreed(config, theta_key, scaling, "rope_theta", 10000.0)
    partial = _agreed(config, "partial_rotary_factor", scaling, "partial_rotary_factor", 1.0)
    dim = int(config.head_dim * partial)
    if config.is_gguf:
        dim = config.integer("rotary_dim", dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    scaling.require("type", kind, None)
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise scaling.refuse("rope_type" if scaling.has("rope_type") else "type", " or ".join(map(repr, _SCALINGS)))
    made = _SCALINGS[kind](scaling, config, theta, dim)
    scaling.refuse_the_rest(f"those of rope_type={kind!r}")
    return made


def _agreed(config: Config, key: str, scaling: Config, inner: str, default: float) -> float:
    """A number that may stand in the config, in the scaling, or in both."""
    if not scaling.has(inner):
        return config.number(key, default)
    value = scaling.number(inner)
    if config.name(key) in config.values and config.number(key, value) != value:
        raise config.refuse(key, f"the same number as {scaling.where}{inner}, {value}")
    return value


def _scaling(config: Config, layer_type: str | None, is_scaled: bool) -> Config:
    old, new = config.table("rope_scaling"), config.table("rope_parameters")
    if layer_type is not None and isinstance(new.get(layer_type), dict):
        return Config(new[layer_type], where=f"rope_parameters.{layer_type}.")
    if old and new and dict(new) | dict(old) != dict(new):
        raise config.refuse("rope_scaling", "the same numbers as in rope_parameters")
    key = "rope_parameters" if new else "rope_scaling"
    return Config((new or old) if is_scaled else {}, where=f"{key}.")


def _default(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    return Rope(theta, dim)


def _linear(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    return Rope(theta, dim, (1.0 / scaling.number("factor"),) * (dim // 2))


def _dynamic(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    """Changes nothing up to `max_position_embeddings`, which bounds our contexts."""
    scaling.number("factor")
    scaling.get("original_max_position_embeddings")
    return Rope(theta, dim)


def _factors(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    """What GGUF's converter makes of llama3 scaling: a divisor per frequency."""
    factor = scaling.number("factor", 1.0)
    return Rope(theta, dim, tuple(1.0 / (item * factor) for item in scaling.numbers("factors", dim // 2)))


def _llama3(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    """Wavelengths above original / low_freq_factor slow down by `factor`, those below original / high_freq_factor stay,
    and those between are blended."""
    factor = scaling.number("factor")
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    original = _original_context_len(scaling, config)
    if not low < high:
        raise UnsupportedError(
            f"the model's config has low_freq_factor={low} and high_freq_factor={high}; accepted is the first below the"
            " second: check the config"
        )

    def scale(i: int) -> float:
        wavelength = 2 * math.pi * theta ** (2 * i / dim)
        blend = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        return (1 - blend) / factor + blend

    return Rope(theta, dim, tuple(map(scale, range(dim // 2))))


def _yarn(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    """Peng et al. 2023: frequencies that turn often in the original context stay, the slow ones are interpolated."""
    original = _original_context_len(scaling, config)
    factor = scaling.number("factor", config.integer("max_position_embeddings") / original)
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    if theta <= 1:
        raise config.refuse("rope_theta", "a number above 1, for yarn")

    def place(num_turns: float) -> float:
        return dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = place(fast), place(slow)
    if scaling.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    length = (last - first) or 0.001
    interpolated = [min(1.0, max(0.0, (i - first) / length)) for i in range(dim // 2)]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = mscale(1.0)
    if scaling.has("mscale") and scaling.has("mscale_all_dim"):
        amplitude = mscale(scaling.number("mscale")) / mscale(scaling.number("mscale_all_dim"))
    amplitude = scaling.number("attention_factor", amplitude)
    return Rope(theta, dim, tuple(part / factor + 1 - part for part in interpolated), amplitude)


def _longrope(scaling: Config, config: Config, theta: float, dim: int) -> Rope:
    """Ding et al. 2024: a divisor per frequency, searched; others beyond the original context."""
    original = _original_context_len(scaling, config)
    short, long = (scaling.numbers(f"{side}_factor", dim // 2) for side in ("short", "long"))
    factor = scaling.number("factor", config.integer("max_position_embeddings") / original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    amplitude = scaling.number("attention_factor", amplitude)
    scales = [tuple(1.0 / item for item in side) for side in (short, long)]
    return Rope(theta, dim, scales[0], amplitude, scales[1], original)


def _original_context_len(scaling: Config, config: Config) -> int:
    """As the scaling says it, or, which wins, the config around it."""
    inner = scaling.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    return config.integer("original_max_position_embeddings", inner)


_SCALINGS: Mapping[str, Callable[[Config, Config, float, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
    "factors": _factors,
}
