"""Does Strop's greedy answer agree with llama.cpp's on the same GGUF file?

    python scripts/greedy_agreement.py MODEL.gguf [--peers DIR] [--tokens 32] [--margin 0.05]

Ten prompts are answered by Strop; llama.cpp then scores each answer token given the same tokens before it, so that
every position is compared and not only those up to a first difference. A token that is not llama.cpp's best is forgiven
if its logit is within `margin` of the best. Ends with 1 if one is not.

llama.cpp's program is scripts/llama_logits.cpp, built as it says, beside those of `strop bench --against llama.cpp`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from strop import LLM, SamplingParams
from strop.bench.peers import TopLogprobs, default_directory, find_peers, make_adapter
from strop.machine.cores import usable_cores

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "The Industrial Revolution began in",
    '{"name": "Alice", "age": 31}\n{"name": "Bob", "age": 27}\n{"name":',
    "Water boils at 100 degrees Celsius because",
    "Café menu — prix fixe: crème brûlée 🍮, thé vert (緑茶), 12 €.\nTranslation:",
    "Q: Why is the sky blue?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "The quick brown fox",
)
WINDOW_LEN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, default=default_directory())
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--margin", type=float, default=0.05)
    arguments = parser.parse_args()
    llm = LLM(str(arguments.model), max_context_len=WINDOW_LEN, max_num_seqs=1)
    outputs = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True))
    windows = np.zeros((len(outputs), WINDOW_LEN), np.int32)  # what follows an answer does not change its scores
    for window, output in zip(windows, outputs, strict=True):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        window[: len(tokens)] = tokens
    (spec,) = (spec for spec in find_peers(["llama.cpp"], arguments.peers, arguments.model) if spec.weights is not None)
    peer = make_adapter(spec, arguments.model, usable_cores(), default_directory())
    num_wrong = num_forgiven = 0
    for output, logits in zip(outputs, peer.logits(windows, one_by_one=False), strict=True):
        assert not isinstance(logits, TopLogprobs)
        answer, first = output.outputs[0].token_ids, len(output.prompt_token_ids) - 1
        behind = [float(row.max() - row[token]) for row, token in zip(logits[first:], answer, strict=False)]
        num_forgiven += sum(0 < gap <= arguments.margin for gap in behind)
        num_wrong += sum(gap > arguments.margin for gap in behind)
        print(f"{max(behind):.4f} behind at most: {output.outputs[0].text[:60]!r}")
    total = len(outputs) * arguments.tokens
    print(
        f"{total - num_forgiven - num_wrong} of {total} tokens are llama.cpp's, {num_forgiven} within the margin of it,"
    )
    print(f"{num_wrong} are not")
    sys.exit(num_wrong > 0)


if __name__ == "__main__":
    main()
