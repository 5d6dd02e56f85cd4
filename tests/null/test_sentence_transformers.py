"""How a model pools, as sentence-transformers' files say it: old and new spellings, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import MAX_SEQ_LENGTH, sentence_transformer

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.sentence_transformers import Pooling, read_pooling

POOLING = "1_Pooling/config.json"
SETTINGS = "config_sentence_transformers.json"
LIMITS = "sentence_bert_config.json"


def modules(*kinds: str) -> list[dict[str, str]]:
    paths = {"Pooling": "1_Pooling"}
    return [{"path": paths.get(kind, ""), "type": f"sentence_transformers.models.{kind}"} for kind in kinds]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Pooling("mean", True, MAX_SEQ_LENGTH)),
        ({"modules.json": modules("Transformer", "Pooling")}, Pooling("mean", False, MAX_SEQ_LENGTH)),
        ({POOLING: {"pooling_mode_cls_token": True, "include_prompt": True}}, Pooling("cls", True, MAX_SEQ_LENGTH)),
        ({POOLING: {"pooling_mode": "lasttoken"}}, Pooling("last", True, MAX_SEQ_LENGTH)),
        ({POOLING: {"pooling_mode": ["max"]}}, Pooling("max", True, MAX_SEQ_LENGTH)),
        ({LIMITS: None, "tokenizer_config.json": {"model_max_length": 24}}, Pooling("mean", True, 24)),
        ({LIMITS: None, "tokenizer_config.json": {"model_max_length": 1e30}}, Pooling("mean", True, 1 << 40)),
        ({LIMITS: None}, Pooling("mean", True, None)),
        (
            {LIMITS: None, "sentence_roberta_config.json": {"max_seq_length": 9, "do_lower_case": True}},
            Pooling("mean", True, 9, lowercase=True),
        ),
        (
            {SETTINGS: {"prompts": {"query": "ask: "}, "default_prompt_name": "query"}},
            Pooling("mean", True, MAX_SEQ_LENGTH, prompt="ask: "),
        ),
        (
            {SETTINGS: {"prompts": {"query": "ask: "}, "default_prompt_name": None}},
            Pooling("mean", True, MAX_SEQ_LENGTH),
        ),
        ({"modules.json": None}, None),
    ],
)
def test_what_the_files_say(tmp_path: Path, files: dict[str, Any], expected: Pooling | None) -> None:
    assert read_pooling(sentence_transformer(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, UnsupportedError, "Pooling, Dense"),
        ({"modules.json": modules("CLIPModel")}, UnsupportedError, "CLIPModel"),
        ({"modules.json": []}, UnsupportedError, "modules none"),
        ({"modules.json": "{"}, FormatError, "modules.json"),
        ({"modules.json": "[1]"}, FormatError, "modules.json"),
        ({"modules.json": "[" * 100_000}, FormatError, "modules.json"),
        ({"modules.json": " " * 2_000_000}, FormatError, "larger than"),
        ({"modules.json": [{"path": "../other", "type": "Transformer"}]}, FormatError, "leads out"),
        ({"modules.json": [{"path": "/etc", "type": "Transformer"}]}, FormatError, "leads out"),
        ({"modules.json": [{"path": 1, "type": "Transformer"}]}, FormatError, "no type and path"),
        ({POOLING: None}, FormatError, "missing"),
        ({POOLING: {}}, UnsupportedError, "pools by"),
        ({POOLING: {"pooling_mode": "weightedmean"}}, UnsupportedError, "weightedmean"),
        ({POOLING: {"pooling_mode": ["mean", "max"]}}, UnsupportedError, "'mean', 'max'"),
        ({POOLING: {"pooling_mode": [{}]}}, UnsupportedError, "pools by"),
        ({LIMITS: {"max_seq_length": "long"}}, FormatError, "max_seq_length='long'"),
        ({LIMITS: {"max_seq_length": -1}}, FormatError, "max_seq_length=-1"),
        ({LIMITS: {"transformer_task": "fill-mask"}}, UnsupportedError, "fill-mask"),
        ({SETTINGS: {"prompts": {}, "default_prompt_name": "query"}}, FormatError, "'query'"),
        (
            {
                POOLING: {"pooling_mode": "mean", "include_prompt": False},
                SETTINGS: {"prompts": {"q": "ask: "}, "default_prompt_name": "q"},
            },
            UnsupportedError,
            "include_prompt",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_pooling(sentence_transformer(tmp_path, files))
