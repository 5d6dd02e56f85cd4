"""ModelSpec -> the one inventory of parameters: flat paths, shapes, and axes in the glossary's letters.

Matrices are [out, in], as checkpoints store them.
"""

from dataclasses import dataclass

from strop.core.errors import UnsupportedError
from strop.models.spec import LayerSpec, ModelSpec, Norm

MAX_DIM = 1 << 24
MAX_HEAD_DIM = 1 << 12
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 12


@dataclass(frozen=True, slots=True)
class ParamInfo:
    """One parameter."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """One letter, or product of letters, per axis: ("N*H", "D")."""


def inventory(spec: ModelSpec) -> dict[str, ParamInfo]:
    """Every parameter of the model, in the order of its use: embed, layers.{i}.*, final_norm, head (if untied)."""
    sizes = {"D": spec.model_dim, "V": spec.vocab_size, "P": spec.num_positions, "U": spec.num_token_types}
    params: dict[str, tuple[str, ...]] = {"embed": ("V", "D")}
    if spec.num_positions:
        params["positions"] = ("P", "D")
    if spec.num_token_types:
        params["token_types"] = ("U", "D")
    params |= _norm("embedding_norm", spec.embedding_norm)
    found = {path: _info(axes, sizes) for path, axes in params.items()}
    for i, layer in enumerate(spec.layers):
        found |= {f"layers.{i}.{role}": info for role, info in _layer(layer, sizes).items()}
    params = _norm("final_norm", spec.final_norm)
    if spec.causal and not spec.tied_embeddings:
        params["head"] = ("V", "D")
    if spec.head_bias:
        params["head_bias"] = ("V",)
    return found | {path: _info(axes, sizes) for path, axes in params.items()}


def _info(axes: tuple[str, ...], sizes: dict[str, int]) -> ParamInfo:
    return ParamInfo(tuple(sizes[letter] for letter in axes), axes)


def _norm(role: str, norm: Norm | None, axis: str = "D") -> dict[str, tuple[str, ...]]:
    if norm is None:
        return {}
    return {role: (axis,), f"{role}_bias": (axis,)} if norm.bias else {role: (axis,)}


def _layer(layer: LayerSpec, model_sizes: dict[str, int]) -> dict[str, ParamInfo]:
    attention, mlp, experts = layer.attention, layer.mlp, layer.experts
    sizes = model_sizes | {
        "F": mlp.ffn_dim,
        "E": experts.num_experts if experts else 0,
        "H": attention.head_dim,
        "N": attention.num_heads,
        "N*H": attention.num_heads * attention.head_dim,
        "K*H": attention.num_kv_heads * attention.head_dim,
    }
    axes = _norm("attention_norm", layer.attention_norm) | {"q": ("N*H", "D"), "k": ("K*H", "D"), "v": ("K*H", "D")}
    if attention.qkv_bias:
        axes |= {"q_bias": ("N*H",), "k_bias": ("K*H",), "v_bias": ("K*H",)}
    if qk_norm := attention.qk_norm:
        for role, num_heads, joined in (
            ("q_norm", attention.num_heads, "N*H"),
            ("k_norm", attention.num_kv_heads, "K*H"),
        ):
            match qk_norm.over:
                case "head":
                    axes |= _norm(role, qk_norm.norm, "H")
                case "each_head":
                    for head in range(num_heads):
                        axes |= _norm(f"heads.{head}.{role}", qk_norm.norm, "H")
                case "all_heads":
                    axes |= _norm(role, qk_norm.norm, joined)
    if attention.sinks:
        axes["sinks"] = ("N",)
    axes["o"] = ("D", "N*H")
    if attention.out_bias:
        axes["o_bias"] = ("D",)
    axes |= _norm("attention_out_norm", layer.attention_out_norm) | _norm("mlp_norm", layer.mlp_norm)
    matrices = {"up": ("F", "D"), "down": ("D", "F")}
    biases = {"up_bias": ("F",), "down_bias": ("D",)}
    if mlp.gated:
        matrices, biases = {"gate": ("F", "D")} | matrices, {"gate_bias": ("F",)} | biases
    mlp_axes = matrices | (biases if mlp.bias else {})
    if experts:
        axes["router"] = ("E", "D")
        if experts.router_bias:
            axes["router_bias"] = ("E",)
        for role, letters in mlp_axes.items():  # role by role, as files keep them
            axes |= {f"experts.{e}.{role}": letters for e in range(experts.num_experts)}
    else:
        axes |= mlp_axes
    axes |= _norm("mlp_out_norm", layer.mlp_out_norm)
    return {role: _info(letters, sizes) for role, letters in axes.items()}


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
        if experts := layer.experts:
            active, most = experts.num_active, experts.num_experts
            require(1 <= most <= MAX_EXPERTS, "num_experts", most, f"1 to {MAX_EXPERTS}")
            require(1 <= active <= most, "experts per token", active, f"1 to {most}")
        require(
            attention.num_heads % attention.num_kv_heads == 0,
            "num_kv_heads",
            attention.num_kv_heads,
            f"a divisor of num_heads={attention.num_heads}",
        )
        require(0 < attention.scale < 1e6, "attention scale", attention.scale, "a finite number above 0")
        require(attention.window_len is None or attention.window_len >= 1, "window", attention.window_len, "1 or more")
        norms = (layer.attention_norm, layer.mlp_norm, layer.attention_out_norm, layer.mlp_out_norm)
        qk_norm = None if attention.qk_norm is None else attention.qk_norm.norm
        for norm in (*norms, spec.embedding_norm, spec.final_norm, qk_norm):
            if norm is not None:
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
