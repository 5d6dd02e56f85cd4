"""`strop run MODEL PROMPT`: one streamed answer and a line that says how fast it came."""

import json
import sys
import time
from typing import Any

import click

from strop.cli.verb import start_up
from strop.core.config import GIB, EngineConfig
from strop.core.errors import RequestError, StropError
from strop.core.request import SamplingParams

_START = time.perf_counter()


@click.command("run")
@click.argument("model")
@click.argument("prompt")
@click.option("--max-tokens", default=256, help="Tokens to generate at most; 0 means up to the context's end.")
@click.option("--temperature", default=0.0, help="0 picks the most probable token.")
@click.option("--top-k", default=0, help="Keep the k most probable tokens; 0 keeps all.")
@click.option("--top-p", default=1.0, help="Keep the smallest set of tokens with this probability.")
@click.option("--min-p", default=0.0, help="Drop tokens below this share of the most probable one.")
@click.option("--seed", type=int, help="Makes a sampled answer repeatable.")
@click.option("--repetition-penalty", default=1.0, help="Above 1 discourages tokens already seen.")
@click.option("--stop", multiple=True, help="Ends the answer before this text; may be repeated.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text: no chat template.")
@click.option("--system", help="System message for the chat template.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the end of the answer.")
@click.option("--context", default=0, help="Longest prompt + answer in tokens; 0 means the model's limit.")
@click.option("--memory", default=0.0, help="Memory limit in GiB; 0 means what is available.")
@click.option("--threads", default=0, help="Threads that compute; 0 means the usable cores.")
@click.option("--json", "json_line", is_flag=True, help="End with one JSON line instead of a summary.")
def command(
    model: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    repetition_penalty: float,
    stop: tuple[str, ...],
    raw: bool,
    system: str | None,
    ignore_eos: bool,
    context: int,
    memory: float,
    threads: int,
    json_line: bool,
) -> None:
    """Answers one prompt.

    MODEL is a GGUF file, a Hugging Face folder, an artifact folder, or a Hub id. PROMPT '-' reads standard input. Text
    goes to standard output, everything else to standard error.
    """
    if max_tokens < 0:
        raise RequestError(f"--max-tokens {max_tokens} is out of range: 1 or more, or 0 for up to the context's end")
    params = SamplingParams(
        max_tokens=max_tokens or None,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
        ignore_eos=ignore_eos,
    )
    if not 0 <= memory < 1e9:
        raise RequestError(f"--memory {memory} is out of range: give GiB, or 0 for what is available")
    config = EngineConfig(max_num_seqs=1, max_context_len=context, memory_bytes=int(memory * GIB), num_threads=threads)
    text = _standard_input() if prompt == "-" else prompt
    if not text:
        raise RequestError("the prompt is empty: give some text, or '-' to read standard input")
    with start_up():
        from strop.engine.loading import load_model
        from strop.engine.text import StreamDetokenizer, prepare_prompt

        loaded, config = load_model(
            model, config, on_plan=lambda plan: print(plan.describe(), file=sys.stderr), chat=not raw
        )
        from strop.engine.engine import Engine

        engine = Engine(loaded, config)
    messages = [{"role": "system", "content": system}] if system else []
    is_chat = not raw and engine.tokenizer.chat_template is not None
    prepared: Any = [*messages, {"role": "user", "content": text}] if is_chat else text
    token_ids = prepare_prompt(engine.tokenizer, prepared, vocab_size=engine.spec.vocab_size)
    answer = _Answer(engine, StreamDetokenizer(engine.tokenizer, params))
    answer.stream(token_ids, params, echo=not json_line)
    if json_line:
        print(json.dumps(answer.as_json()))
    else:
        print(answer.summary(), file=sys.stderr)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the prompt on standard input is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


class _Answer:
    """One streamed answer and its timings."""

    def __init__(self, engine: Any, texts: Any) -> None:
        self._engine, self._texts = engine, texts
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.num_prompt_tokens = 0
        self.ready_s = self.first_s = self.end_s = 0.0

    def stream(self, token_ids: tuple[int, ...], params: SamplingParams, *, echo: bool) -> None:
        from strop.core.request import Request
        from strop.engine.text import must_abort

        engine = self._engine
        self.num_prompt_tokens = len(token_ids)
        self.ready_s = time.perf_counter()
        engine.add(Request("run", token_ids, params))
        while engine.has_unfinished:
            for event in engine.step():
                self.first_s = self.first_s or time.perf_counter()
                delta = self._texts.push(event)
                if must_abort(event, delta):
                    engine.abort("run")
                self.text += delta.text
                self.token_ids += delta.token_ids
                self.finish_reason = delta.finish_reason
                if delta.finish_reason == "abort":
                    raise StropError(str(delta.stop_reason))
                if echo:
                    print(delta.text, end="", flush=True)
        self.end_s = time.perf_counter()
        if echo:
            print(flush=True)  # before anything on standard error

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens after the first, over the time they took."""
        return (len(self.token_ids) - 1) / max(self.end_s - self.first_s, 1e-9)

    def share_of_limit(self) -> float:
        """Measured tokens/s over what reading the weights and the cache once per token allows here."""
        from strop.machine.probe import read_bandwidth_bytes_per_s

        memory = self._engine.memory
        context_len = self.num_prompt_tokens + len(self.token_ids) // 2
        step_bytes = memory.weight_bytes + memory.visible_bytes(context_len)
        return self.tokens_per_s * step_bytes / read_bandwidth_bytes_per_s(step_bytes)

    def summary(self) -> str:
        share = f", {self.share_of_limit():.0%} of this machine's limit" if len(self.token_ids) > 8 else ""
        return (
            f"[{len(self.token_ids)} tokens, {self.tokens_per_s:.1f} tokens/s{share}; first token "
            f"{(self.first_s - self.ready_s) * 1e3:.0f} ms after the prompt, "
            f"{self.first_s - _START:.2f} s after the start]"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": len(self.token_ids),
                "total_tokens": self.num_prompt_tokens + len(self.token_ids),
            },
            "timings": {
                "start_to_first_token_s": self.first_s - _START,
                "ttft_s": self.first_s - self.ready_s,
                "tokens_per_s": self.tokens_per_s,
                "total_s": self.end_s - _START,
            },
        }
