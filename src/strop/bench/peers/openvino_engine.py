"""OpenVINO GenAI, in its own interpreter (see worker_main.py)."""

from importlib import import_module
from typing import Any


def load(weights: str, num_threads: int, flags: dict[str, Any]) -> "OpenVinoEngine":
    """One of its three ways to generate: SDPA, PA (paged attention), or continuous batching."""
    return OpenVinoEngine(weights, num_threads, str(flags["mode"]))


class OpenVinoEngine:
    """`LLMPipeline` or `ContinuousBatchingPipeline` on token ids."""

    def __init__(self, weights: str, num_threads: int, mode: str) -> None:
        self._openvino, self._genai = import_module("openvino"), import_module("openvino_genai")
        self._weights, self._num_threads = weights, num_threads
        self._batching = mode == "batching"
        if self._batching:
            scheduler = self._genai.SchedulerConfig()
            scheduler.cache_size, scheduler.max_num_batched_tokens = 1, 2048
            scheduler.enable_prefix_caching = False
            self._pipe = self._genai.ContinuousBatchingPipeline(
                weights, scheduler, "CPU", {"INFERENCE_NUM_THREADS": num_threads}
            )
        else:
            self._pipe = self._genai.LLMPipeline(
                weights, "CPU", INFERENCE_NUM_THREADS=num_threads, ATTENTION_BACKEND=mode
            )
        self.vocab_size = len(self._pipe.get_tokenizer().get_vocab())
        self._compiled: Any = None

    def describe(self) -> dict[str, str]:
        """Version, and what the CPU plugin says it can do."""
        capabilities = self._openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {"version": self._genai.__version__, "isa": " ".join(map(str, capabilities))}

    def generate(self, prompts: list[list[int]], num_tokens: int) -> None:
        """Greedy, past any end of sequence."""
        import numpy as np

        config = self._genai.GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True, do_sample=False
        )
        ids = np.array(prompts, np.int64)
        if self._batching:
            tensors = [self._openvino.Tensor(row[None]) for row in ids]
            lengths = [len(r.m_generation_ids[0]) for r in self._pipe.generate(tensors, [config] * len(prompts))]
        else:
            mask = self._openvino.Tensor(np.ones_like(ids))
            inputs = self._genai.TokenizedInputs(self._openvino.Tensor(ids), mask)
            lengths = [len(tokens) for tokens in self._pipe.generate(inputs, config).tokens]
        if lengths != [num_tokens] * len(prompts):
            raise RuntimeError(f"asked for {num_tokens} tokens each, got {lengths}")

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        """All logits of one window, from the same network run directly."""
        import numpy as np

        if self._compiled is None:
            core = self._openvino.Core()
            settings = {"INFERENCE_NUM_THREADS": self._num_threads}
            self._compiled = core.compile_model(f"{self._weights}/openvino_model.xml", "CPU", settings)
        request = self._compiled.create_infer_request()
        ids = np.array([tokens], np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self._compiled.inputs for name in port.get_names()}
        request.infer({name: value for name, value in inputs.items() if name in names})
        return {"logits": np.asarray(request.get_tensor("logits").data[0], np.float32)}
