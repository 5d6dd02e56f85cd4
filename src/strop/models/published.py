"""Networks that were published without weights, found by name. No jax.

PaLM: Chowdhery et al. 2022, with the dimensions of Pope et al. 2022 (Table D.1 and the code released with it).
MT-NLG: Smith et al. 2022; Table D.1.
"""

import difflib
import math
from dataclasses import replace

from strop.core.errors import UnsupportedError
from strop.models.params import inventory
from strop.models.spec import Attention, LayerSpec, Mlp, ModelSpec, Norm, Rope

_CONTEXT_LEN = 2048


def _palm(num_layers: int, model_dim: int, num_heads: int) -> ModelSpec:
    norm = Norm("layer", 1e-6)  # no bias anywhere in the network
    rope = Rope(theta=10000.0, rotary_dim=256)
    attention = Attention(num_heads, num_kv_heads=1, head_dim=256, scale=256**-0.5, rope=rope)
    layer = LayerSpec(attention, Mlp(4 * model_dim, "silu"), norm, None, parallel=True)
    return ModelSpec(model_dim, 256_128, (layer,) * num_layers, norm, True, _CONTEXT_LEN)


def _mt_nlg(num_layers: int, model_dim: int, num_heads: int) -> ModelSpec:
    norm = Norm("layer", 1e-5, bias=True)
    head_dim = model_dim // num_heads
    attention = Attention(num_heads, num_heads, head_dim, head_dim**-0.5, rope=None, qkv_bias=True, out_bias=True)
    layer = LayerSpec(attention, Mlp(4 * model_dim, "gelu_tanh", gated=False, bias=True), norm, norm)
    return ModelSpec(model_dim, 51_200, (layer,) * num_layers, norm, True, _CONTEXT_LEN, num_positions=_CONTEXT_LEN)


PUBLISHED: dict[str, ModelSpec] = {
    "palm-8b": _palm(32, 4096, 16),
    "palm-62b": _palm(64, 8192, 32),
    "palm-540b": _palm(118, 18432, 48),
    "mt-nlg-530b": _mt_nlg(105, 20480, 128),
}


def published_spec(name: str) -> ModelSpec:
    """The network called `palm-8b`, `palm-62b`, `palm-540b` or `mt-nlg-530b`.

    Raises:
        UnsupportedError: no such name; the nearest is named.
    """
    if name not in PUBLISHED:
        raise UnsupportedError(unpublished(name))
    return PUBLISHED[name]


def unpublished(name: str) -> str:
    """That no published network is called so, and which is nearly."""
    near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"no published model is called {name!r:.80}{hint}: known are {', '.join(PUBLISHED)}"


def with_heads(spec: ModelSpec, num_heads: int) -> ModelSpec:
    """The same network with query heads of zeros added, so that a mesh divides them.

    Raises:
        UnsupportedError: fewer heads than some layer has, or heads that its key and value heads do not divide.
    """
    for layer in dict.fromkeys(spec.layers):
        attention = layer.attention
        if num_heads < attention.num_heads or num_heads % attention.num_kv_heads:
            raise UnsupportedError(
                f"num_heads={num_heads} cannot pad {attention.num_heads} heads over {attention.num_kv_heads} key and "
                f"value heads: give a multiple of {attention.num_kv_heads} from {attention.num_heads}"
            )
    return _with_attention(spec, num_heads=num_heads)


def as_multihead(spec: ModelSpec, head_dim: int) -> ModelSpec:
    """The same network with a key and value head for every query head, as Pope et al. compare it (section 4.2)."""
    layers = {layer: layer.attention.num_heads for layer in spec.layers}
    made = {
        layer: replace(
            layer,
            attention=replace(
                layer.attention, num_kv_heads=num_heads, head_dim=head_dim, scale=head_dim**-0.5, rope=None
            ),
        )
        for layer, num_heads in layers.items()
    }
    return replace(spec, layers=tuple(made[layer] for layer in spec.layers))


def as_serial(spec: ModelSpec) -> ModelSpec:
    """The same network with the MLP after the attention, each with a norm of its own."""
    made = {
        layer: replace(layer, parallel=False, mlp_norm=layer.mlp_norm or layer.attention_norm)
        for layer in dict.fromkeys(spec.layers)
    }
    return replace(spec, layers=tuple(made[layer] for layer in spec.layers))


def _with_attention(spec: ModelSpec, *, num_heads: int) -> ModelSpec:
    made = {
        layer: replace(layer, attention=replace(layer.attention, num_heads=num_heads))
        for layer in dict.fromkeys(spec.layers)
    }
    return replace(spec, layers=tuple(made[layer] for layer in spec.layers))


def num_parameters(spec: ModelSpec) -> int:
    """Numbers in all matrices: the parameters that a token is multiplied with, and the embedding."""
    shapes = (info.shape for path, info in inventory(spec).items() if path != "positions" and len(info.shape) > 1)
    return sum(map(math.prod, shapes))
