"""A tiny BERT with a vocabulary of letters, as sentence-transformers saves it."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

BERT = Path(__file__).parents[1] / "golden" / "bert-minilm"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = string.ascii_lowercase
VOCAB = (*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), *".,01")
CLS, SEP = VOCAB.index("[CLS]"), VOCAB.index("[SEP]")
MAX_SEQ_LENGTH = 40


def tiny_encoder(folder: Path) -> Path:
    """The model with its vocab.txt: all that a bare BERT has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(BERT / name, folder)
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return folder


def sentence_transformer(folder: Path, files: dict[str, Any] | None = None) -> Path:
    """The files that say how it pools (mean, to length 1), some of them replaced by `files`: JSON, or None for none."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    written = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": MAX_SEQ_LENGTH, "do_lower_case": False},
        "1_Pooling/config.json": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        **(files or {}),
    }
    for name, content in written.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder
