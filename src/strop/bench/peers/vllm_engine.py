"""vLLM's CPU build, in its own interpreter (see worker_main.py)."""

import os
from importlib import import_module
from typing import Any

_TOP = 256  # most probable tokens that fidelity looks at


def load(weights: str, num_threads: int, flags: dict[str, Any]) -> "VllmEngine":
    """bf16, prefix caching off, threads bound one to a core."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return VllmEngine(weights, flags)


class VllmEngine:
    """`LLM` on token ids."""

    def __init__(self, weights: str, flags: dict[str, Any]) -> None:
        vllm = self._vllm = import_module("vllm")
        self._llm = vllm.LLM(
            weights,
            dtype="bfloat16",
            enforce_eager=bool(flags.get("eager")),
            enable_prefix_caching=False,
            max_model_len=4096,
            max_logprobs=_TOP,
        )
        self.vocab_size = self._llm.llm_engine.model_config.get_vocab_size()

    def describe(self) -> dict[str, str]:
        """Version, and the instruction sets torch computes with."""
        torch = import_module("torch")
        return {
            "version": self._vllm.__version__,
            "isa": f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}",
        }

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        """Greedy, past any end of sequence."""
        params = self._vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        for output in outputs:
            if len(output.outputs[0].token_ids) != num_tokens:
                raise RuntimeError(f"asked for {num_tokens} tokens, got {len(output.outputs[0].token_ids)}")

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        """The most probable tokens after each position; the last one's are unknown and repeat those before."""
        import numpy as np

        params = self._vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=_TOP, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
        rows = [sorted(row.items(), key=lambda item: item[1].rank or 0)[:_TOP] for row in output.prompt_logprobs[1:]]
        rows.append(rows[-1])
        return {
            "token_ids": np.array([[token for token, _ in row] for row in rows], np.int32),
            "logprobs": np.array([[entry.logprob for _, entry in row] for row in rows], np.float32),
        }
