"""`LLM`: many prompts in, finished answers or vectors out. The engine runs on the caller's thread."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count
from numbers import Integral
from typing import TYPE_CHECKING, Any

from strop.core.config import EngineConfig
from strop.core.errors import RequestError
from strop.core.request import (
    CompletionOutput,
    Delta,
    EmbeddingRequestOutput,
    Request,
    RequestOutput,
    SamplingParams,
)
from strop.engine.embedder import Embedder, Text
from strop.engine.engine import Engine
from strop.engine.loading import Runner, load_model
from strop.engine.text import Prompt, StreamDetokenizer, must_abort, prepare_prompt
from strop.formats.sentence_transformers import PoolingKind

if TYPE_CHECKING:  # llguidance is imported when a request first needs it
    from strop.engine.grammar_check import GrammarChecker

Prompts = Prompt | Sequence[Prompt]


class LLM:
    """A model ready to answer.

    >>> llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf")
    >>> llm.generate(["Once upon a time"], SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(
        self, model: str, config: EngineConfig | None = None, *, runner: Runner = "auto", **settings: Any
    ) -> None:
        """Loads `model`: a GGUF file, a Hugging Face folder, an artifact, or a Hub id.

        Args:
            config: engine settings; or pass its fields as keywords.
            runner: "generate" text, or "pooling": make vectors of texts (`embed`). "auto" pools if the model is an
                encoder or comes with the files of sentence-transformers.

        Raises:
            FormatError, UnsupportedError, CapacityError: see strop.core.errors.
        """
        if config is not None and settings:
            raise RequestError(f"give either config or its fields ({', '.join(settings)}), not both")
        loaded, config = load_model(model, config or EngineConfig(**settings), runner=runner)
        self._engine = Engine(loaded, config) if loaded.pooling is None else None
        self._embedder = Embedder(loaded, config) if loaded.pooling is not None else None
        self._ids = count()

    @property
    def engine(self) -> Engine:
        """What generates. RequestError if the model was loaded to pool."""
        if self._engine is None:
            can = "an encoder writes no text" if not self.embedder.spec.causal else "load it with runner='generate'"
            raise RequestError(f"this LLM makes vectors of texts: call embed() ({can})")
        return self._engine

    @property
    def embedder(self) -> Embedder:
        """What makes vectors. RequestError if the model was loaded to generate."""
        if self._embedder is None:
            raise RequestError("this LLM generates text: load it with runner='pooling' to make vectors of texts")
        return self._embedder

    def generate(
        self, prompts: Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is text, a list of token ids, or a list of chat messages.

        Raises:
            RequestError: a prompt or its parameters are impossible; then nothing was generated.
        """
        requests, texts = self._requests(prompts, sampling_params)
        outputs = {
            request.request_id: RequestOutput(
                request.request_id,
                text,
                list(request.prompt_token_ids),
                [CompletionOutput(index) for index in range(request.params.n)],
            )
            for request, text in zip(requests, texts, strict=True)
        }
        pieces: dict[tuple[str, int], list[str]] = {}
        for delta in self._run(requests):
            result = outputs[delta.request_id]
            choice = result.outputs[delta.index]
            pieces.setdefault((delta.request_id, delta.index), []).append(delta.text)
            choice.token_ids += delta.token_ids
            if delta.logprobs:
                choice.logprobs = choice.logprobs or []
                choice.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                choice.text = "".join(pieces.pop((delta.request_id, delta.index)))
            if delta.prompt_logprobs:
                result.prompt_logprobs = [None, *delta.prompt_logprobs]
            result.num_cached_tokens = max(result.num_cached_tokens, delta.num_cached_tokens)
        return list(outputs.values())

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        **template: Any,
    ) -> RequestOutput:
        """The answer to one conversation, through the model's chat template.

        `template` is what the template takes: `tools` (JSON schemas), `documents`, `chat_template` (instead of the
        model's), or a name of its own, such as enable_thinking=False.
        """
        token_ids = prepare_prompt(self.engine.tokenizer, messages, vocab_size=self.engine.spec.vocab_size, **template)
        return self.generate([token_ids], sampling_params)[0]

    def embed(
        self,
        prompts: Text | Iterable[Text],
        *,
        pooling: PoolingKind | None = None,
        normalize: bool | None = None,
        truncate: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each text (or its token ids), in order, as sentence-transformers would make it.

        See strop.engine.embedder: `Embedder.embed` yields them one by one, for more texts than fit in memory.

        Raises:
            RequestError: the LLM generates, or a text is empty or too long.
        """
        texts: Iterable[Any] = [prompts] if _is_one(prompts) else prompts
        return list(self.embedder.embed(texts, pooling=pooling, normalize=normalize, truncate=truncate))

    def stream(
        self, prompts: Prompts, sampling_params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """Deltas of all prompts as they come; a delta's `request_id` is its prompt's position, as text."""
        requests, _ = self._requests(prompts, sampling_params, ids=map(str, count()))
        yield from self._run(requests)

    @cached_property
    def _grammar_checker(self) -> "GrammarChecker":
        from strop.engine.grammar_check import GrammarChecker

        return GrammarChecker(self.engine.tokenizer, self.engine.spec.vocab_size)

    def _requests(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None,
        ids: Iterator[str] | None = None,
    ) -> tuple[list[Request], list[str | None]]:
        listed: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(listed)
        if len(params) != len(listed):
            raise RequestError(f"{len(params)} sampling_params for {len(listed)} prompts: give one, or one for each")
        for wanted in {own.structured_outputs for own in params}:
            if wanted is not None:
                self._grammar_checker.check(wanted)
        ids = ids or (f"request-{i}" for i in self._ids)
        requests = [
            Request(
                request_id,
                prepare_prompt(self.engine.tokenizer, prompt, vocab_size=self.engine.spec.vocab_size),
                own,
            )
            for request_id, prompt, own in zip(ids, listed, params, strict=False)
        ]
        return requests, [prompt if isinstance(prompt, str) else None for prompt in listed]

    def _run(self, requests: Sequence[Request]) -> Iterator[Delta]:
        engine = self.engine
        if engine.has_unfinished:
            raise RequestError("this LLM is answering already: exhaust or close() the stream first, or use AsyncEngine")
        added: list[str] = []
        try:
            for request in requests:
                engine.add(request)
                added.append(request.request_id)
            texts = {r.request_id: StreamDetokenizer(engine.tokenizer, r.params) for r in requests}
            while engine.has_unfinished:
                for event in engine.step():
                    delta = texts[event.request_id].push(event)
                    if delta is None:
                        continue
                    if must_abort(event, delta):
                        engine.abort(event.request_id, event.index)
                    yield delta
        finally:  # also when the reader stops early
            for request_id in added:
                engine.abort(request_id)


def _is_one(prompts: Any) -> bool:
    """Whether `prompts` is a single prompt: text, token ids, or one conversation."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        return isinstance(prompts, str)
    return len(prompts) > 0 and isinstance(prompts[0], Integral | Mapping)
