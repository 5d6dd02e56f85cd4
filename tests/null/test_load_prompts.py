"""Prompts have the wanted length, share what they should, and nothing else."""

import asyncio

import pytest

from strop.bench.serve.prompts import CountedText, CountedWords, Prompt, PromptMaker, TokenIds

NUM_EXTRA = 3


def num_tokens(text: str) -> int:
    """Of a tokenizer that cuts words into pieces of four letters."""
    return sum(-(-len(word) // 4) for word in text.split())


def counted() -> CountedText:
    async def count(text: str) -> int:
        await asyncio.sleep(0)
        return num_tokens(text)

    return CountedText(count, NUM_EXTRA)


def made(maker: PromptMaker, length: int, num_shared: int, num_prompts: int) -> list[Prompt]:
    async def make() -> list[Prompt]:
        return await asyncio.gather(*(maker.make(length, num_shared, f"{i}") for i in range(num_prompts)))

    return asyncio.run(make())


@pytest.mark.parametrize(("length", "num_shared"), [(4, 0), (17, 0), (128, 0), (128, 64), (1000, 900), (40, 36)])
def test_text_has_the_length_that_the_server_counts(length: int, num_shared: int) -> None:
    prompts = [str(prompt) for prompt in made(counted(), length, num_shared, 24)]
    assert {num_tokens(prompt) for prompt in prompts} == {length - NUM_EXTRA}
    words = [prompt.split() for prompt in prompts]
    assert num_shared == 0 or len({tuple(some[: num_shared // 3]) for some in words}) == 1
    assert length < 40 or num_shared == 36 or len(set(prompts)) == 24


def test_two_prompts_begin_with_different_words() -> None:
    for prompts in (made(counted(), 128, 0, 200), made(CountedWords(1.3, 2), 128, 0, 200)):
        assert len({tuple(str(prompt).split()[:16]) for prompt in prompts}) == 200
    assert len({tuple(prompt[:2]) for prompt in made(TokenIds(), 128, 0, 200)}) == 200


def test_seeds_repeat() -> None:
    for maker in (TokenIds(), CountedWords(1.3, 2)):
        assert made(maker, 64, 8, 4) == made(maker, 64, 8, 4)


def test_token_ids_and_words_share_their_beginning() -> None:
    ids = made(TokenIds(), 64, 40, 8)
    assert {len(prompt) for prompt in ids} == {64}
    assert len({tuple(prompt[:40]) for prompt in ids}) == 1
    texts = [str(prompt).split() for prompt in made(CountedWords(2.0, 4), 64, 40, 8)]
    assert {len(words) for words in texts} == {30}
    assert len({tuple(words[:20]) for words in texts}) == 1
    assert len({tuple(words[20:]) for words in texts}) == 8
