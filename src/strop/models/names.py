"""Checkpoint tensor name <-> parameter path, per family, as data. `{i}` stands for the layer."""

import re
from dataclasses import dataclass

_HF = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{i}.attention_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.q": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.k": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.v": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.q_bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.k_bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.v_bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.o": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.o_bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.up": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.down": "model.layers.{i}.mlp.down_proj.weight",
    "layers.{i}.gate_bias": "model.layers.{i}.mlp.gate_proj.bias",
    "layers.{i}.up_bias": "model.layers.{i}.mlp.up_proj.bias",
    "layers.{i}.down_bias": "model.layers.{i}.mlp.down_proj.bias",
}

_GGUF = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers.{i}.attention_norm": "blk.{i}.attn_norm.weight",
    "layers.{i}.q": "blk.{i}.attn_q.weight",
    "layers.{i}.k": "blk.{i}.attn_k.weight",
    "layers.{i}.v": "blk.{i}.attn_v.weight",
    "layers.{i}.q_bias": "blk.{i}.attn_q.bias",
    "layers.{i}.k_bias": "blk.{i}.attn_k.bias",
    "layers.{i}.v_bias": "blk.{i}.attn_v.bias",
    "layers.{i}.o": "blk.{i}.attn_output.weight",
    "layers.{i}.o_bias": "blk.{i}.attn_output.bias",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm.weight",
    "layers.{i}.gate": "blk.{i}.ffn_gate.weight",
    "layers.{i}.up": "blk.{i}.ffn_up.weight",
    "layers.{i}.down": "blk.{i}.ffn_down.weight",
    "layers.{i}.gate_bias": "blk.{i}.ffn_gate.bias",
    "layers.{i}.up_bias": "blk.{i}.ffn_up.bias",
    "layers.{i}.down_bias": "blk.{i}.ffn_down.bias",
}

_HF_FREQUENCIES = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
_GGUF_FREQUENCIES = (r"rope_freqs\.weight", r"blk\.\d+\.attn_rot_embd")


@dataclass(frozen=True, slots=True)
class NameMap:
    """How one family's checkpoints of one kind name their tensors.

    A tensor that several parameters name holds their rows one after the other, in the inventory's order.
    """

    names: dict[str, str]
    """Parameter path -> tensor name, both with `{i}` for the layer and `{e}` for the expert."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that carry nothing the spec does not say already."""
    adjacent_rotary_pairs: bool = False
    """Whether rows of q and k are stored so that rotated pairs are adjacent; Strop keeps them half a head apart."""
    transposed: tuple[str, ...] = ()
    """Regular expressions of tensors that are stored [in, out]."""
    qkv_by_group: bool = False
    """Whether a tensor with q, k and v has them by kv head: its queries, its key, its value."""

    def tensor_name(self, path: str) -> str:
        """The checkpoint's name for a parameter path."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
        pattern = self.names[re.sub(r"experts\.\d+", "experts.{e}", re.sub(r"layers\.\d+", "layers.{i}", path))]
        for letter, number in zip(("{i}", "{e}"), numbers, strict=False):
            pattern = pattern.replace(letter, number)
        return pattern

    def is_ignored(self, tensor_name: str) -> bool:
        """Whether a tensor that the inventory does not ask for is harmless."""
        return any(re.fullmatch(pattern, tensor_name) for pattern in self.ignored)

    def is_transposed(self, tensor_name: str) -> bool:
        """Whether a matrix is stored [in, out]."""
        return any(re.fullmatch(pattern, tensor_name) for pattern in self.transposed)


HF_NAMES = {
    "llama": NameMap(_HF, _HF_FREQUENCIES),
    "qwen2": NameMap(_HF, _HF_FREQUENCIES),
}
GGUF_NAMES = {
    "llama": NameMap(_GGUF, _GGUF_FREQUENCIES, adjacent_rotary_pairs=True),
    "qwen2": NameMap(_GGUF, _GGUF_FREQUENCIES),
}
