"""Concurrent streams over one engine: equal to LLM's answers, cancelled without a trace, told of every failure."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from strop.core.errors import RequestError, StropError
from strop.core.request import Request, SamplingParams
from strop.engine.async_engine import AsyncEngine
from strop.engine.engine import Engine
from strop.engine.step import CompiledModel

PROMPTS = ["hello", "world", "é", "wor" * 9, "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
PARAMS = [GREEDY, SamplingParams(temperature=1, seed=3, n=3, max_tokens=20, stop=("e",), logprobs=2)]


async def collect(engine: AsyncEngine, prompt: Any, params: SamplingParams) -> dict[int, tuple[str, list[int], str]]:
    choices: dict[int, tuple[str, list[int], Any]] = {}
    async for delta in engine.generate(prompt, params):
        text, token_ids, _ = choices.get(delta.index, ("", [], None))
        choices[delta.index] = (text + delta.text, token_ids + list(delta.token_ids), delta.finish_reason)
    return choices


async def until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 30
    while engine.has_unfinished and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
    assert not engine.has_unfinished
    assert engine.scheduler.groups.pools[0].num_free == engine.config.num_blocks - 1


def test_concurrent_streams_equal_lone_ones(new_engine: Callable[..., Engine]) -> None:
    async def lone() -> list[Any]:
        answers = []
        for i, prompt in enumerate(PROMPTS):
            with AsyncEngine(new_engine()) as engine:
                answers.append(await collect(engine, prompt, PARAMS[i % 2]))
        return answers

    async def together() -> list[Any]:
        with AsyncEngine(new_engine()) as engine:
            streams = [collect(engine, prompt, PARAMS[i % 2]) for i, prompt in enumerate(PROMPTS)]
            answers = await asyncio.gather(*streams)
            await until_idle(engine.engine)
            return answers

    assert asyncio.run(together()) == asyncio.run(lone())


def test_cancelled_and_abandoned_streams_free_their_blocks(new_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        with AsyncEngine(new_engine()) as engine:
            expected = await collect(engine, "hello", GREEDY)
            tasks = [asyncio.create_task(collect(engine, prompt, LONG)) for prompt in PROMPTS]
            abandoned = engine.generate("world", LONG)
            await anext(abandoned)
            await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await abandoned.aclose()
            await until_idle(engine.engine)
            assert await collect(engine, "hello", GREEDY) == expected

    asyncio.run(main())


def test_errors_reach_only_their_caller(new_engine: Callable[..., Engine]) -> None:
    async def main() -> None:
        with AsyncEngine(new_engine()) as engine:
            good = asyncio.create_task(collect(engine, "hello", GREEDY))
            for prompt, params, named in [
                ("", GREEDY, "empty"),
                ([5, 300], GREEDY, "300"),
                ("x" * 200, GREEDY, "context"),
                ("x", SamplingParams(stop_token_ids=(999,)), "999"),
            ]:
                with pytest.raises(RequestError, match=named):
                    await collect(engine, prompt, params)
            with pytest.raises(RequestError, match="None"):
                await collect(engine, "x", SamplingParams(stop_token_ids=(None,)))  # type: ignore[arg-type]
            assert len((await good)[0][1]) == 30
            await until_idle(engine.engine)

    asyncio.run(main())


def test_a_failing_engine_tells_every_stream(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("injected")

    async def main() -> None:
        with AsyncEngine(new_engine()) as engine:
            expected = await collect(engine, "hello", GREEDY)
            with monkeypatch.context() as patch:
                patch.setattr(CompiledModel, "step", fail)
                streams = [collect(engine, prompt, GREEDY) for prompt in PROMPTS]
                results = await asyncio.gather(*streams, return_exceptions=True)
            assert all(isinstance(result, StropError) for result in results)
            await until_idle(engine.engine)
            assert await collect(engine, "hello", GREEDY) == expected

    asyncio.run(main())


def test_closing(new_engine: Callable[..., Engine]) -> None:
    def slow_engine() -> Engine:
        engine = new_engine()
        step = engine.step
        engine.step = lambda: time.sleep(0.02) or step()  # type: ignore[method-assign]
        return engine  # whose answer of 100 tokens cannot be complete before it is closed

    async def main() -> None:
        engine = AsyncEngine(slow_engine())
        stream = engine.generate("hello", LONG)
        await anext(stream)
        engine.close()
        engine.close()
        with pytest.raises(StropError, match="closed"):
            async for _ in stream:
                pass
        with pytest.raises(StropError, match="closed"):
            await collect(engine, "hello", GREEDY)
        await until_idle(engine.engine)

    asyncio.run(main())


class SlowTokenizer:
    """Holds up prompts with many w's until `release`; notes the texts it was given, and the prompts the engine got."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        self.release, self.seen, self.added = threading.Event(), list[str](), list[tuple[int, ...]]()
        self.encode, add = engine.tokenizer.encode, engine.add

        def slow_encode(text: str, *args: Any, **options: Any) -> list[int]:
            self.seen.append(text)
            if text.count("w") > 5:
                assert self.release.wait(20), "nobody could release it: the event loop was held up"
            return self.encode(text, *args, **options)

        def noting_add(request: Request) -> None:
            self.added.append(request.prompt_token_ids)
            add(request)

        patch.setattr(engine.tokenizer, "encode", slow_encode)
        patch.setattr(engine, "add", noting_add)

    async def is_at(self, text: str) -> None:
        while text not in self.seen:
            await asyncio.sleep(0.001)


SLOW = "w" * 9


def test_a_slow_prompt_delays_no_running_stream(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with AsyncEngine(new_engine()) as engine:
            expected = [await collect(engine, prompt, GREEDY) for prompt in ("hello", SLOW, "world")]
            slow = SlowTokenizer(engine.engine, monkeypatch)
            running = engine.generate("hello", GREEDY)
            text = (await anext(running)).text
            late = [asyncio.create_task(collect(engine, prompt, GREEDY)) for prompt in (SLOW, "world")]
            await slow.is_at(SLOW)
            async for delta in running:
                text += delta.text
            assert text == expected[0][0][0]
            slow.release.set()
            assert await asyncio.gather(*late) == expected[1:]
            assert slow.added == [tuple(slow.encode(prompt)) for prompt in ("hello", SLOW, "world")]

    asyncio.run(main())


def test_a_stream_cancelled_before_its_prompt_is_ready_never_reaches_the_engine(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with AsyncEngine(new_engine()) as engine:
            slow = SlowTokenizer(engine.engine, monkeypatch)
            tasks = [asyncio.create_task(collect(engine, prompt, GREEDY)) for prompt in (SLOW, "x")]
            await slow.is_at(SLOW)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [asyncio.CancelledError] * 2
            slow.release.set()
            assert await collect(engine, "hello", GREEDY)
            assert slow.seen == [SLOW, "hello"]
            assert slow.added == [tuple(slow.encode("hello"))]

    asyncio.run(main())


def test_closing_while_prompts_are_being_prepared(
    new_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        engine = AsyncEngine(new_engine())
        slow = SlowTokenizer(engine.engine, monkeypatch)
        tasks = [asyncio.create_task(collect(engine, prompt, GREEDY)) for prompt in (SLOW, "x")]
        await slow.is_at(SLOW)
        engine.close()
        slow.release.set()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, StropError)
            assert "closed" in str(result)
        assert slow.seen == [SLOW]
        assert slow.added == []

    asyncio.run(main())
