"""The memory plan against what a process really takes, with the cache filled to the last page."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from strop.core.config import MIB

_FILL = """
import json, sys
from strop.core.request import SamplingParams
from strop.llm import LLM
from strop.machine.memory import peak_rss_bytes

settings = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], **settings)
num_seqs, max_context_len = settings["max_num_seqs"], settings["max_context_len"]
prompts = [[5 + i + j % 1000 for j in range(max_context_len - 2)] for i in range(num_seqs)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
assert all(len(output.outputs[0].token_ids) == 2 for output in outputs)
memory = llm.engine.memory
assert memory.cache_bytes >= num_seqs * max_context_len * memory.cache_bytes_per_token
print(json.dumps([memory.total_bytes, peak_rss_bytes()]))
"""


_WINDOWED = {"max_num_seqs": 8, "max_context_len": 2048}
_ALL_LAYERS_BYTES = 8 * 2048 * 12 * 2 * 16 * 128 * 2  # if every layer kept every token


@pytest.fixture
def windowed_path(tmp_path: Path) -> Path:
    """A folder with 12 narrow layers with wide heads, of which 10 see 128 tokens."""
    dims = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 1024, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 12}
    windows = {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 2}
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}
    config |= {"max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": True, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | dims | heads | windows))
    shapes = {"model.embed_tokens.weight": (1024, 64), "model.norm.weight": (64,)}
    for i in range(12):
        layer = {f"self_attn.{part}_proj.weight": (2048, 64) for part in "qkv"}
        layer |= {f"self_attn.{part}_proj.bias": (2048,) for part in "qkv"} | {"self_attn.o_proj.weight": (64, 2048)}
        layer |= {"mlp.gate_proj.weight": (96, 64), "mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96)}
        layer |= {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    tensors = {name: 0.1 * rng.standard_normal(shape) for name, shape in shapes.items()}
    save_file({name: tensor.astype(bfloat16) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    words = [*sorted(ByteLevel.alphabet()), *(f"word{i}" for i in range(256, 1024))]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_windowed_layers_take_what_was_printed(environment: dict[str, str], windowed_path: Path) -> None:
    planned, peak = fill(windowed_path, _WINDOWED, environment | {"STROP_CACHE": str(windowed_path / "cache")})
    assert planned < 0.6 * _ALL_LAYERS_BYTES
    assert peak < 1.1 * planned + 250 * MIB
    assert peak > 0.9 * planned - 250 * MIB


def fill(model: Path, settings: dict[str, int], environment: dict[str, str]) -> tuple[int, int]:
    """Bytes that were planned for the whole process, and its peak."""
    process = subprocess.run(
        [sys.executable, "-c", _FILL, str(model), json.dumps(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    planned, peak = json.loads(process.stdout)
    return planned, peak


@pytest.mark.parametrize(
    ("settings", "environment_changes"),
    [
        ({"max_num_seqs": 8, "max_context_len": 1024}, {}),
        ({"max_num_seqs": 1, "max_context_len": 512, "block_len": 512, "max_step_tokens": 256}, {"STROP_NATIVE": "0"}),
    ],
    ids=["native, packing", "xla"],
)
def test_peak_is_what_was_printed(
    settings: dict[str, int],
    environment_changes: dict[str, str],
    environment: dict[str, str],
    smollm2_path: Path,
    tmp_path: Path,
) -> None:
    planned, peak = fill(smollm2_path, settings, environment | environment_changes | {"STROP_CACHE": str(tmp_path)})
    assert peak < 1.1 * planned + 250 * MIB
    assert peak > 0.9 * planned - 250 * MIB
