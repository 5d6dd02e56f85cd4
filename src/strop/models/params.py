"""ModelSpec -> the one inventory of parameters: flat paths, shapes, and axes in the glossary's letters.

Matrices are [out, in], as checkpoints store them.
"""

from dataclasses import dataclass

from strop.core.errors import UnsupportedError
from strop.models.spec import LayerSpec, ModelSpec

MAX_DIM = 1 << 24
MAX_HEAD_DIM = 1 << 12
MAX_LAYERS = 1 << 12


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """One parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """One letter, or product of letters, per axis: ("N*H", "D")."""


def inventory(spec: ModelSpec) -> dict[str, ParamInfo]:
    """Every parameter of the model, in the order of its use: embed, layers.{i}.*, final_norm, head (if untied)."""
    params = {"embed": ParamInfo((spec.vocab_size, spec.model_dim), ("V", "D"))}
    for i, layer in enumerate(spec.layers):
        params |= {f"layers.{i}.{role}": info for role, info in _layer(layer, spec.model_dim).items()}
    params["final_norm"] = ParamInfo((spec.model_dim,), ("D",))
    if not spec.tied_embeddings:
        params["head"] = ParamInfo((spec.vocab_size, spec.model_dim), ("V", "D"))
    return params


def _layer(layer: LayerSpec, model_dim: int) -> dict[str, ParamInfo]:
    attention, mlp = layer.attention, layer.mlp
    sizes = {
        "D": model_dim,
        "F": mlp.ffn_dim,
        "N*H": attention.num_heads * attention.head_dim,
        "K*H": attention.num_kv_heads * attention.head_dim,
    }
    axes: dict[str, tuple[str, ...]] = {
        "attention_norm": ("D",),
        "q": ("N*H", "D"),
        "k": ("K*H", "D"),
        "v": ("K*H", "D"),
    }
    if attention.qkv_bias:
        axes |= {"q_bias": ("N*H",), "k_bias": ("K*H",), "v_bias": ("K*H",)}
    axes["o"] = ("D", "N*H")
    if attention.out_bias:
        axes["o_bias"] = ("D",)
    axes |= {"mlp_norm": ("D",), "gate": ("F", "D"), "up": ("F", "D"), "down": ("D", "F")}
    if mlp.bias:
        axes |= {"gate_bias": ("F",), "up_bias": ("F",), "down_bias": ("D",)}
    return {role: ParamInfo(tuple(sizes[letter] for letter in letters), letters) for role, letters in axes.items()}


def check_spec(spec: ModelSpec) -> ModelSpec:
    """Returns the spec if its numbers can be a model. Raises UnsupportedError that names the first that cannot."""

    def require(ok: bool, name: str, value: object, accepted: str) -> None:
        if not ok:
            raise UnsupportedError(f"the model says {name}={value!r}; accepted is {accepted}: check its config")

    def dim(name: str, value: int) -> None:
        require(1 <= value <= MAX_DIM, name, value, f"1 to {MAX_DIM}")

    dim("model_dim", spec.model_dim)
    dim("vocab_size", spec.vocab_size)
    dim("max_context_len", spec.max_context_len)
    require(1 <= spec.num_layers <= MAX_LAYERS, "num_layers", spec.num_layers, f"1 to {MAX_LAYERS}")
    for layer in dict.fromkeys(spec.layers):
        attention = layer.attention
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            dim(name, getattr(attention, name))
        require(attention.head_dim <= MAX_HEAD_DIM, "head_dim", attention.head_dim, f"1 to {MAX_HEAD_DIM}")
        dim("num_heads * head_dim", attention.num_heads * attention.head_dim)
        dim("ffn_dim", layer.mlp.ffn_dim)
        require(
            attention.num_heads % attention.num_kv_heads == 0,
            "num_kv_heads",
            attention.num_kv_heads,
            f"a divisor of num_heads={attention.num_heads}",
        )
        require(0 < attention.scale < 1e6, "attention scale", attention.scale, "a finite number above 0")
        require(attention.window_len is None or attention.window_len >= 1, "window", attention.window_len, "1 or more")
        for norm in (layer.norm, spec.final_norm):
            require(0 < norm.eps < 1, "norm eps", norm.eps, "above 0, below 1")
        if rope := attention.rope:
            require(0 < rope.theta < 1e30, "rope theta", rope.theta, "a finite number above 0")
            halves = 2 <= rope.rotary_dim <= attention.head_dim and rope.rotary_dim % 2 == 0
            require(halves, "rotary_dim", rope.rotary_dim, f"even, at most head_dim={attention.head_dim}")
            scales = rope.inv_freq_scale
            if scales is not None:
                fits = len(scales) == rope.rotary_dim // 2 and all(0 < scale < 1e6 for scale in scales)
                require(fits, "rope scaling", scales, f"{rope.rotary_dim // 2} finite numbers above 0")
    return spec
