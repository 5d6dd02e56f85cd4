"""Folders and configs passed by mistake: the message says what they are and what to do."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.checkpoint import open_checkpoint
from strop.models.reader import load_spec

T5 = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, "model_type": "t5", "d_model": 512}
BART = {"architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True, "model_type": "bart"}
WHISPER = {"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True, "num_mel_bins": 80}
LLAVA = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"depth": 2}, "text_config": {}}
QWEN_AUDIO = {"architectures": ["Qwen2AudioForConditionalGeneration"], "audio_config": {"d_model": 8}}
VIT = {"architectures": ["ViTForImageClassification"], "image_size": 224, "num_channels": 3}
CLASSIFIER = {"architectures": ["DebertaForTokenClassification"], "model_type": "deberta"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5, r"an encoder-decoder \(T5ForConditionalGeneration\).*decoder-only"),
        (BART, r"an encoder-decoder \(BartFor"),
        (T5 | {"architectures": None}, r"an encoder-decoder \(t5\)"),
        (WHISPER, r"a speech recogniser \(WhisperFor"),
        (LLAVA, r"also sees \(LlavaForConditionalGeneration\).*GGUF"),
        (QWEN_AUDIO, r"also hears \(Qwen2Audio"),
        (VIT, r"an image model \(ViT"),
        (CLASSIFIER, r"a head for TokenClassification \(Deberta.*ForCausalLM"),
    ],
)
def test_configs_of_other_kinds(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"shared.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=words):
        load_spec(checkpoint)


def lay_out(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "LoRA adapter.*merge_and_unload"),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "LoRA adapter.*merge_and_unload"),
        (["model_index.json", "unet/config.json", "vae/config.json"], "diffusion pipeline"),
        (["params.json", "consolidated.safetensors", "tokenizer.model.v3"], "own layout.*Hugging Face's layout"),
        (["config.json", "pytorch_model-00001-of-00002.bin"], "only pickled weights.*safe_serialization"),
        (["config.json", "model.onnx"], "weights for ONNX only"),
        (["config.json", "openvino_model.xml", "openvino_model.bin"], "weights for OpenVINO only"),
        (["config.json", "tf_model.h5"], "weights for TensorFlow only"),
        (["config.json", "flax_model.msgpack"], "weights for Flax only"),
        (["tokenizer.json", "tokenizer_config.json"], "only a tokenizer"),
        (["snapshots/0123/config.json", "refs/main", "blobs/a"], "Hub's cache keeps a model.*snapshots/0123"),
    ],
)
def test_folders_of_other_kinds(names: list[str], words: str, tmp_path: Path) -> None:
    lay_out(tmp_path, names)
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(tmp_path)


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    shards = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for i in (0, 2):
        save_file({f"w{i}": np.ones(2, np.float32)}, tmp_path / shards[i])
    with pytest.raises(FormatError, match=f"2 of the 4 shards .* missing: '{shards[1]}', '{shards[3]}'; download"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match=f"shards \\('{shards[0]}', '{shards[2]}'\\) but no model.safetensors.index"):
        open_checkpoint(tmp_path)
