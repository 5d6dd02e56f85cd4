"""What the routes share: the model's text side, the engine, the queue and the counters."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, ParamSpec, TypeVar

from strop import __version__
from strop.core.errors import EngineDownError
from strop.core.request import SamplingParams
from strop.engine.grammar_check import GrammarChecker
from strop.engine.messages import ModelFacts
from strop.engine.text import Prompt, prepare_prompt
from strop.formats.chat_templates import TOOL_USE
from strop.formats.tokenizer import Tokenizer
from strop.serve.admission import Admission
from strop.serve.engine_client import EngineClient
from strop.serve.metrics import Metrics
from strop.serve.openai.exchange import Asked, Served
from strop.serve.openai.reasoning import think_tags
from strop.serve.settings import ServeConfig
from strop.serve.tool_calls import ToolSupport, tool_format

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Service:
    """Lives as long as the server; belongs to its event loop."""

    def __init__(self, config: ServeConfig, tokenizer: Tokenizer, client: EngineClient) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.client = client
        self._served: tuple[ModelFacts, Served] | None = None
        self.is_draining = False
        """Whether the server is about to end."""
        self.admission = Admission(config.max_queued_requests, config.max_queued_tokens)
        self.metrics = Metrics(config.model_names[0], client, self.admission, config.price_per_hour)
        # Two, so that one long text does not hold up all others; more would take the engine's cores.
        self._threads = ThreadPoolExecutor(2, "strop-text")

    async def prepare(self, asked: Asked) -> tuple[int, ...]:
        """The prompt's token ids, once it is clear that the engine can do what is asked. Raises RequestError."""
        await self.check_shape(asked.params)
        return await self.token_ids(asked.prompt, asked.template)

    async def check_shape(self, params: SamplingParams) -> None:
        """Raises RequestError if the engine cannot enforce the shape that the answer is to have."""
        if params.structured_outputs is not None:
            await self.in_thread(self._grammars.check, params.structured_outputs)

    async def token_ids(self, prompt: Prompt, template: dict[str, Any], add_special: bool = True) -> tuple[int, ...]:
        """Of a text, of messages, or as they are. Raises RequestError."""
        if isinstance(prompt, str) and not add_special:
            return tuple(await self.in_thread(self.tokenizer.encode, prompt, add_special=False))
        vocab_size = self.facts.vocab_size
        return await self.in_thread(prepare_prompt, self.tokenizer, prompt, vocab_size=vocab_size, **template)

    @property
    def served(self) -> Served:
        """What requests may ask of the engine that runs. Raises EngineDownError if there is none."""
        facts = self.facts
        if self._served is None or self._served[0] is not facts:
            self._served = facts, self._describe(facts)
            self.admission.expect(facts.expected)
        return self._served[1]

    def _describe(self, facts: ModelFacts) -> Served:
        tokenizer = self.tokenizer
        templates = tokenizer.chat_templates
        special_tokens = [tokenizer.token_bytes(i).decode(errors="replace") for i in tokenizer.special_ids]
        return Served(
            self.config.model_names,
            int(time.time()),
            facts.max_request_tokens,
            tokenizer,
            ToolSupport(tool_format(templates.get(TOOL_USE, tokenizer.chat_template), special_tokens)),
            tokenizer.chat_template or "",
            think_tags(tokenizer.chat_template or "", special_tokens) if self.config.splits_thoughts else None,
            facts.embedding_len,
            system_fingerprint=f"strop-{__version__}-{facts.isa}",
        )

    @cached_property
    def _grammars(self) -> GrammarChecker:
        return GrammarChecker(self.tokenizer, self.facts.vocab_size)

    @property
    def facts(self) -> ModelFacts:
        """Of the engine that runs. Raises EngineDownError if there is none."""
        if self.client.facts is None:
            raise EngineDownError(f"{self.client.trouble}: try again in a few seconds")
        return self.client.facts

    @property
    def trouble(self) -> str | None:
        """Why no request should be sent here now; None if all is well."""
        return "the server is about to end" if self.is_draining else self.client.trouble

    async def in_thread(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """What `function` returns, computed beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    def close(self) -> None:
        """Ends the threads and helpers."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if "_grammars" in vars(self):
            self._grammars.close()
