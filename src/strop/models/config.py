"""A foreign config, read with care: each key is handled, known to be harmless, or refused by name.

Families ask for keys by the names that most configs in transformers use; `names` translates them to the file's own, so
that one family reads an old config, a new one, and the metadata of a GGUF file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from strop.core.errors import UnsupportedError
from strop.models.params import MAX_DIM, MAX_EXPERTS, MAX_HEAD_DIM, MAX_LAYERS
from strop.models.spec import Activation, Attention, Experts, LayerSpec, Mlp, ModelSpec, Norm, Rope

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Config:
    """A config's values, and which of its keys were looked at."""

    def __init__(
        self,
        values: Mapping[str, Any],
        names: Mapping[str, str | tuple[str, ...]] | None = None,
        defaults: Mapping[str, Any] | None = None,
        *,
        where: str = "",
        is_gguf: bool = False,
    ) -> None:
        """A config.

        Args:
            names: what the file calls a key, one name or several, where that is not the key itself.
            defaults: for keys that are absent; one that is null takes the default of whoever asks.
            where: what to say before a key.
        """
        self.values, self.where, self.is_gguf = values, where, is_gguf
        self.seen: set[str] = set()
        self._names, self._defaults = names or {}, defaults or {}

    def name(self, key: str) -> str:
        """What the file calls a key: of several names the first that it has."""
        names = self._names.get(key, key)
        names = (names,) if isinstance(names, str) else names
        return next((name for name in names if name in self.values), names[0])

    def has(self, key: str) -> bool:
        """Whether the key, or a default for it, is there and not null."""
        self.seen.add(self.name(key))
        return self.values.get(self.name(key), self._defaults.get(key)) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value; a default if the key is absent, and `default` if that is null too."""
        name = self.name(key)
        self.seen.add(name)
        value = self.values.get(name, self._defaults.get(key))
        return default if value is None else value

    def refuse(self, key: str, accepted: str) -> UnsupportedError:
        """The error for a key that asks for what Strop does not do."""
        return refusal(self.values, self.name(key), accepted, is_gguf=self.is_gguf, where=self.where)

    def integer(self, key: str, default: int | None = None, most: int = MAX_DIM) -> int:
        """An integer from 1 to `most`."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self.refuse(key, f"an integer from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.refuse(key, "a finite number above 0")
        return float(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """`length` finite numbers above 0."""
        value = self.get(key)
        if (
            not isinstance(value, (list, tuple))
            or len(value) != length
            or not all(_is_positive(item) for item in value)
        ):
            raise self.refuse(key, f"{length} finite numbers above 0")
        return tuple(float(item) for item in value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """An object, empty if it is absent."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object or null")
        return value

    def require(self, key: str, *accepted: Any) -> None:
        """Refuses any value but these, if the key is there."""
        name = self.name(key)
        self.seen.add(name)
        if name in self.values and not any(_same(self.values[name], value) for value in accepted):
            raise self.refuse(key, " or ".join("null" if value is None else repr(value) for value in accepted))

    def refuse_the_rest(self, accepted: str) -> None:
        """Refuses the first key that nobody looked at."""
        for key in self.values:
            if key not in self.seen:
                raise refusal(self.values, key, accepted, is_gguf=self.is_gguf, where=self.where)

    # --- what families have in common ---------------------------------------------------------------------------------

    @property
    def model_dim(self) -> int:
        """D."""
        return self.integer("hidden_size")

    @property
    def num_layers(self) -> int:
        """L."""
        return self.integer("num_hidden_layers", most=MAX_LAYERS)

    @property
    def head_dim(self) -> int:
        """H: `head_dim`, or else an equal share of the model's dimensions."""
        num_heads = self.integer("num_attention_heads")
        if not self.has("head_dim") and self.model_dim % num_heads:
            raise self.refuse("num_attention_heads", f"a divisor of {self.name('hidden_size')}={self.model_dim}")
        return self.integer("head_dim", self.model_dim // num_heads, MAX_HEAD_DIM)

    def attention(self, rope: Rope | None, **more: Any) -> Attention:
        """Attention with scores scaled by H^-1/2; `more` are fields of Attention."""
        num_heads, head_dim = self.integer("num_attention_heads"), self.head_dim
        num_kv_heads = self.integer("num_key_value_heads", num_heads)
        fields = {"num_kv_heads": num_kv_heads, "scale": head_dim**-0.5, "rope": rope}
        return Attention(num_heads=num_heads, head_dim=head_dim, **(fields | more))

    def mlp(self, ffn_dim: int | None = None, **more: Any) -> Mlp:
        """The MLP of width `intermediate_size`, or `ffn_dim` if the config does not say, with activation `hidden_act`;
        `more` are fields of Mlp."""
        name = self.get("hidden_act", "silu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            raise self.refuse("hidden_act", " or ".join(map(repr, _ACTIVATIONS)))
        return Mlp(self.integer("intermediate_size", ffn_dim), _ACTIVATIONS[name], **more)

    def experts(self, *, normalise: bool, router_bias: bool = False) -> Experts:
        """A mixture of `num_experts`, `num_experts_per_tok` of them active."""
        self.seen |= {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}  # for training only
        num_experts = self.integer("num_experts", most=MAX_EXPERTS)
        return Experts(num_experts, self.integer("num_experts_per_tok", most=MAX_EXPERTS), normalise, router_bias)

    def rms_norm(self, **more: Any) -> Norm:
        """A norm by the root of the mean square; `more` are fields of Norm."""
        return Norm("rms", self.number("rms_norm_eps", 1e-6), **more)

    def layer_norm(self, **more: Any) -> Norm:
        """A norm by mean and deviation, with a bias unless `more` says otherwise."""
        return Norm("layer", self.number("layer_norm_eps", 1e-5), **({"bias": True} | more))

    def windows(self, slides: Callable[[int], bool]) -> list[int | None]:
        """The window of each layer: `sliding_window` where `layer_types` says so, or, without them, `slides(layer)`."""
        kinds, num_layers = self.get("layer_types"), self.num_layers
        known = ("full_attention", "sliding_attention")
        if kinds is None:
            kinds = [known[bool(slides(i))] for i in range(num_layers)]
        elif not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise self.refuse("layer_types", f"{num_layers} of 'full_attention' or 'sliding_attention'")
        self.get("sliding_window")
        if known[1] not in kinds:
            return [None] * num_layers
        window_len = self.integer("sliding_window")
        return [window_len if kind == known[1] else None for kind in kinds]

    def no_windows(self, why: str = "") -> None:
        """Refuses layers with a window."""
        if "sliding_attention" in self.get("layer_types", []):
            raise self.refuse("layer_types", f"'full_attention' in every layer{why}")
        self.windows(lambda layer: False)

    def model(self, layers: Sequence[LayerSpec], final_norm: Norm | None, **more: Any) -> ModelSpec:
        """The network of these layers, its head of its own unless the config ties it to the embedding; `more` are
        fields of ModelSpec."""
        return ModelSpec(
            model_dim=self.model_dim,
            vocab_size=self.integer("vocab_size"),
            layers=tuple(layers),
            final_norm=final_norm,
            tied_embeddings=self.flag("tie_word_embeddings", False),
            max_context_len=self.integer("max_position_embeddings"),
            **more,
        )


def refusal(
    values: Mapping[str, Any], key: str, accepted: str, *, is_gguf: bool = False, where: str = ""
) -> UnsupportedError:
    """The error for one key of a config that asks for what Strop does not do."""
    shown = repr(values.get(key))
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    found = f"has {where}{key}={shown}" if key in values else f"lacks {where}{key}"
    what = "the GGUF file" if is_gguf else "the model's config"
    return UnsupportedError(f"{what} {found}; accepted is {accepted}: Strop cannot run it faithfully")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def _same(left: Any, right: Any) -> bool:
    """Equality that keeps true and 1 apart."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
