"""Checkpoint tensor name <-> parameter path, per family, as data. `{i}` is the layer, `{e}` the expert or head."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_WITHOUT_SUFFIX = ("sinks",)


@dataclass(frozen=True, slots=True)
class NameMap:
    """How one family's checkpoints of one kind name their tensors.

    A tensor that several parameters name holds their rows one after the other, in the inventory's order.
    """

    names: Mapping[str, str]
    """Parameter path -> tensor name, both with `{i}` for the layer and `{e}` for the expert or head.

    A part of a name may have alternatives: `layers.{i}.old|new.weight`."""
    ignored: tuple[str, ...] = ()
    """Ends of names, as regular expressions, of tensors that carry nothing the spec does not say already."""
    prefix: str = ""
    """Of all names but the head's; a checkpoint of the bare network lacks it."""
    adjacent_rotary_pairs: bool = False
    """Whether rows of q and k are stored so that rotated pairs are adjacent; Strop keeps them half a head apart."""
    transposed: tuple[str, ...] = ()
    """The same of tensors that are stored [in, out]."""
    alternating_gates: bool = False
    """Whether rows of gate and up alternate in a tensor that has them both."""
    qkv_by_group: bool = False
    """Whether a tensor with q, k and v has them by kv head: its queries, its key, its value."""

    def tensor_name(self, path: str) -> str:
        """The checkpoint's name for a parameter path."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
        numbered = re.sub(r"(experts|heads)\.\d+", r"\1.{e}", re.sub(r"layers\.\d+", "layers.{i}", path))
        pattern = self.names[numbered]
        for letter, number in zip(("{i}", "{e}"), numbers, strict=False):
            pattern = pattern.replace(letter, number)
        return pattern

    def is_ignored(self, tensor_name: str) -> bool:
        """Whether a tensor that the inventory does not ask for is harmless."""
        return any(re.search(f"{pattern}$", tensor_name) for pattern in self.ignored)

    def is_transposed(self, tensor_name: str) -> bool:
        """Whether a matrix is stored [in, out]."""
        return any(re.search(f"{pattern}$", tensor_name) for pattern in self.transposed)

    def with_layers(self, **stems: str) -> "NameMap":
        """The same with other stems in the layers, by role; those of experts begin with `experts_`."""
        layer = self.names["layers.{i}.q"].partition("{i}.")[0] + "{i}."
        paths = {
            "layers.{i}." + re.sub("^experts_", "experts.{e}.", role): layer + stem for role, stem in stems.items()
        }
        return replace(self, names={**self.names, **_with_biases(paths)})

    def with_stacks(self, **names: str) -> "NameMap":
        """The same with other names of tensors, by role, that hold a parameter of all experts of a layer; those of
        biases end in `_bias`."""
        layer = self.names["layers.{i}.q"].partition("{i}.")[0] + "{i}."
        paths = {"layers.{i}.experts.{e}." + role: layer + name for role, name in names.items()}
        biases = {f"{path}_bias": f"{name}_bias" for path, name in paths.items()}
        return replace(self, names={**self.names, **paths, **biases})

    def with_alternatives(self, endings: Mapping[str, str]) -> "NameMap":
        """The same with ends of names that stand for several."""
        names = dict(self.names)
        for path, name in names.items():
            for ending, alternatives in endings.items():
                if name.endswith(ending):
                    names[path] = name.removesuffix(ending) + alternatives
        return replace(self, names=names)

    def with_adjacent_pairs(self) -> "NameMap":
        """The same of checkpoints whose rotated pairs are adjacent."""
        return replace(self, adjacent_rotary_pairs=True)

    def for_tensors(self, tensor_names: Mapping[str, object]) -> "NameMap":
        """The names that these tensors have: of alternatives the first, and no prefix if none has it."""
        bare = not any(name.startswith(self.prefix) for name in tensor_names)

        def choose(pattern: str) -> str:
            pattern = pattern.removeprefix(self.prefix) if bare else pattern
            if "|" not in pattern:
                return pattern
            before, choices, after = re.split(r"([^.]*\|[^.]*)", pattern)
            names = [before + choice + after for choice in choices.split("|")]
            return next((name for name in names if name.replace("{i}", "0") in tensor_names), names[-1])

        return replace(self, names={path: choose(name) for path, name in self.names.items()})


def _with_biases(stems: Mapping[str, str]) -> dict[str, str]:
    """Stems of names -> names of weights and of biases."""
    names = {}
    for path, stem in stems.items():
        names[path] = stem if path.endswith(_WITHOUT_SUFFIX) else f"{stem}.weight"
        names[f"{path}_bias"] = f"{stem}.bias"
    return names


def name_map(
    *,
    embed: str,
    layer: str,
    layers: Mapping[str, str],
    prefix: str = "",
    head: str = "lm_head",
    others: Mapping[str, str],
    **how: Any,
) -> NameMap:
    """A NameMap from stems: a weight is the stem with ".weight", a bias with ".bias".

    Args:
        embed, others: stems below `prefix`, the others by parameter.
        layer: stem of a layer, with `{i}`.
        layers: role -> stem below the layer's; several roles with one stem share a tensor.
        head: stem of the head.
        how: other fields of NameMap.
    """
    stems = {path: prefix + stem for path, stem in {"embed": embed, **others}.items()}
    stems |= {"layers.{i}." + role: f"{prefix}{layer}.{stem}" for role, stem in layers.items()}
    return NameMap(_with_biases(stems | {"head": head}), prefix=prefix, **how)


LLAMA_LAYERS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
LLAMA_NAMES = name_map(
    prefix="model.",
    embed="embed_tokens",
    layer="layers.{i}",
    layers=LLAMA_LAYERS,
    others={"final_norm": "norm"},
    ignored=(r"rotary_emb\.inv_freq",),
)
"""Most families since Llama."""
LLAMA_EXPERTS_NAMES = LLAMA_NAMES.with_layers(
    router="mlp.gate", **{f"experts_{role}": f"mlp.experts.{{e}}.{role}_proj" for role in ("gate", "up", "down")}
)

GGUF_NAMES = name_map(
    embed="token_embd",
    others={
        "positions": "position_embd",
        "token_types": "token_types",
        "embedding_norm": "token_embd_norm",
        "final_norm": "output_norm",
    },
    head="output",
    layer="blk.{i}",
    layers={
        "attention_norm": "attn_norm",
        "q": "attn_qkv|attn_q",
        "k": "attn_qkv|attn_k",
        "v": "attn_qkv|attn_v",
        "q_norm": "attn_q_norm",
        "k_norm": "attn_k_norm",
        "heads.{e}.q_norm": "attn_q_norm",
        "heads.{e}.k_norm": "attn_k_norm",
        "sinks": "attn_sinks.weight",
        "o": "attn_output",
        "attention_out_norm": "post_attention_norm",
        "mlp_norm": "ffn_norm",
        "router": "ffn_gate_inp",
        "experts.{e}.gate": "ffn_gate_up_exps|ffn_gate_exps",
        "experts.{e}.up": "ffn_gate_up_exps|ffn_up_exps",
        "experts.{e}.down": "ffn_down_exps",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
        "mlp_out_norm": "post_ffw_norm",
    },
    ignored=("attn_rot_embd", r"rope_freqs\.weight", r"rope_factors_(long|short)\.weight"),
)
"""GGUF has one set of names; files may join queries, keys and values, and the gates of experts with the other half."""
