"""The page at `/` in a real browser, against a real server with the real model."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, find_chromium
from http_client import ask
from server_process import ServerProcess, metric, wait_for, wait_until_idle

from strop.serve.keys import new_key

READY = "document.getElementById('state').textContent === 'ready'"
TURNS = "JSON.parse(sessionStorage.getItem('strop.turns') ?? '[]')"
PROMPT = "Tell me about the sea, and then about mountains."
ENDLESS = "Count from one to ten thousand, and leave nothing out."
"""The greedy answer goes on to the context's end."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("needs a Chromium: `make browser` installs Debian's")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """open_page(url, **media): the page, loaded."""
    pages = []

    def open_at(url: str, **media: str) -> Page:
        page = browser.page(**media)
        page.resize(1280, 860)
        page.open(f"{url}/")
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()


@pytest.fixture
def page(open_page: Callable[..., Page], server_url: str) -> Page:
    page = open_page(server_url)
    page.wait_for(READY)
    return page


def set_parameters(page: Page, **parameters: object) -> None:
    for name, value in parameters.items():
        page.evaluate(f"document.querySelector('[name={name}]').value = {json.dumps(str(value))}")


def send(page: Page, text: str) -> None:
    page.evaluate("document.getElementById('prompt').focus()")
    page.type(text)
    page.press("Enter")


def answered(page: Page, number: int = 1) -> str:
    """The answer, when so many are complete."""
    page.wait_for(f"document.querySelectorAll('.answer:not([aria-busy]) .note:not(:empty)').length === {number}")
    content: str = page.evaluate(f"{TURNS}.at(-1).content")
    return content


def focused(page: Page) -> str:
    name: str = page.evaluate(
        "document.activeElement.id || document.activeElement.name || document.activeElement.innerText"
    )
    return name


def test_it_is_quiet_and_stays_at_home(page: Page, server_url: str) -> None:
    card = ask(server_url, "/status").json["card"]
    assert page.evaluate("document.getElementById('memory').innerText") == card["memory"]
    assert f"Kernels\n{card['isa']}" in page.evaluate("document.getElementById('card').innerText")
    send(page, "Hello")
    page.wait_for("document.querySelector('.answer .text').innerText")
    page.press("Escape")
    assert page.complaints == []
    assert len(page.requests) > 8
    assert all(url.startswith(f"{server_url}/") for url in page.requests)
    assert page.evaluate("document.cookie + localStorage.length") == "0"


def test_files_are_asked_about_and_not_sent_twice(server_url: str) -> None:
    first = ask(server_url, "/")
    assert first.status == 200 and first.headers["content-type"] == "text/html; charset=utf-8"
    assert first.headers["content-security-policy"].startswith("default-src 'self';")
    assert first.headers["cache-control"] == "no-cache"
    again = ask(server_url, "/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")
    assert ask(server_url, "/web/../settings.py").status == 404
    assert ask(server_url, "/web/app.py").status == 404


def test_an_answer_streams_and_is_the_apis(page: Page, server_url: str) -> None:
    set_parameters(page, temperature=0.9, seed=11, max_completion_tokens=60, system="You are a sailor.")
    page.evaluate(
        """
        window.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector(".answer .text").innerText))
          .observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true });
        """
    )
    send(page, PROMPT)
    content = answered(page)
    messages = [{"role": "system", "content": "You are a sailor."}, {"role": "user", "content": PROMPT}]
    body = {"model": "smollm2", "messages": messages, "temperature": 0.9, "seed": 11, "max_completion_tokens": 60}
    reply = ask(server_url, "/v1/chat/completions", body).json
    assert content == reply["choices"][0]["message"]["content"]
    assert page.evaluate("seen.size") > 5
    note = page.evaluate("document.querySelector('.note').innerText")
    assert f"{reply['usage']['completion_tokens']} tokens · " in note and " a second · first after " in note
    assert f"prompt {reply['usage']['prompt_tokens']}" in note
    text = page.evaluate("document.querySelector('.answer .text').innerText.replace(/[\\s#*`.\\d-]+/g, '')")
    assert set(text) <= set(content) and len(text) > 40


def test_thoughts_are_shown_apart(open_page: Callable[..., Page], thinking_url: str) -> None:
    page = open_page(thinking_url)
    page.wait_for(READY)
    set_parameters(page, temperature=0, max_completion_tokens=12)
    send(page, PROMPT)
    assert answered(page) == ""
    assert page.evaluate("document.querySelector('.thoughts').open")
    body = {"model": "smollm2", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12}
    message = ask(thinking_url, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert page.evaluate("document.querySelector('.thoughts p').textContent") == message["reasoning_content"]
    assert page.evaluate(f"{TURNS}.at(-1).thoughts") == message["reasoning_content"]


def test_the_conversation_goes_on_and_can_be_changed(page: Page, server_url: str) -> None:
    set_parameters(page, temperature=0, max_completion_tokens=12)
    send(page, "Name a river.")
    first = answered(page)
    send(page, "And another one?")
    second = answered(page, 2)
    messages = [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And another one?"},
    ]
    body = {"model": "smollm2", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    assert second == ask(server_url, "/v1/chat/completions", body).json["choices"][0]["message"]["content"]
    assert "cut off at the token limit" in page.evaluate("document.body.innerText")

    page.evaluate("[...document.querySelectorAll('button')].findLast((button) => button.innerText === 'Again').click()")
    page.wait_for("document.querySelector('.answer[aria-busy]') || document.querySelectorAll('.note').length === 2")
    assert answered(page, 2) == second and page.evaluate(f"{TURNS}.length") == 4

    page.evaluate("document.querySelectorAll('.question button')[1].click()")
    assert page.evaluate("document.getElementById('prompt').value") == "And another one?"
    assert page.evaluate("document.querySelectorAll('article').length") == 2

    page.reload()  # by accident
    page.wait_for(f"document.querySelectorAll('article').length === 2 && {READY}")
    assert page.evaluate("document.querySelector('[name=max_completion_tokens]').value") == ""  # was set by no person
    page.evaluate("document.getElementById('clear').click()")
    assert page.evaluate(f"document.querySelectorAll('article').length + {TURNS}.length") == 0
    assert page.complaints == []


def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_there(page: Page, server_url: str) -> None:
    set_parameters(page, temperature=0, max_completion_tokens=1900)
    send(page, ENDLESS)
    page.wait_for("document.querySelector('.answer .text').innerText.length > 20")
    page.reload()
    page.wait_for(READY)
    wait_until_idle(server_url)
    assert page.evaluate("document.querySelector('.note').innerText") == "stopped"
    assert len(page.evaluate("document.querySelector('.answer .text').innerText")) > 20
    assert (
        page.evaluate("[...document.querySelectorAll('.bar button')].map((button) => button.innerText)")[-1] == "Again"
    )


def test_stop_stops_the_engine(page: Page, server_url: str) -> None:
    cancelled = metric(server_url, "strop:requests_cancelled_total")
    set_parameters(page, temperature=0, max_completion_tokens=1900)
    send(page, ENDLESS)
    page.wait_for("document.querySelector('.answer .text').innerText.length > 20")
    assert metric(server_url, "vllm:num_requests_running") == 1
    assert page.evaluate("document.getElementById('action').innerText") == "Stop"
    page.evaluate("document.getElementById('action').click()")
    wait_for(lambda: metric(server_url, "vllm:num_requests_running") == 0, "the engine to stop", timeout_s=10)
    wait_until_idle(server_url)
    assert metric(server_url, "strop:requests_cancelled_total") == cancelled + 1
    assert page.evaluate("document.querySelector('.note').innerText") == "stopped"
    assert page.evaluate("document.getElementById('action').innerText") == "Send"
    kept = page.evaluate(f"{TURNS}[1].content")
    assert kept and page.evaluate("document.querySelector('.answer').getAttribute('aria-busy')") is None


def test_keys_are_enough(page: Page) -> None:
    assert focused(page) == "prompt"
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert page.evaluate("document.getElementById('prompt').value") == "one\ntwo"
    page.press("Tab")
    assert focused(page) == "action"
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Tab")
    page.press("Tab")
    if focused(page) == "system":  # the panel itself takes part where it scrolls
        page.press("Tab")
    names = []
    for _ in range(4):
        names.append(focused(page))
        page.press("Tab")
    assert "temperature" in names and "max_completion_tokens" in names
    page.press("Tab", shift=True)

    set_parameters(page, temperature=0)
    page.evaluate("document.getElementById('prompt').value = ''")
    send(page, ENDLESS)
    page.wait_for("document.querySelector('.answer[aria-busy] .text').innerText")
    assert focused(page) == "prompt"
    page.press("Escape")
    page.wait_for("document.querySelector('.note').innerText === 'stopped'")
    assert page.evaluate("document.getElementById('announcer').innerText") == "Answer: stopped"
    page.press("Tab", shift=True)
    assert focused(page) == "Again"
    page.press("Enter")
    page.wait_for("document.querySelector('.answer').innerText !== '' && document.activeElement.id === 'prompt'")
    page.press("Escape")
    page.wait_for("!document.querySelector('.answer[aria-busy]')")
    fields = "[...document.querySelectorAll('button, input, textarea')]"
    nameless = f"{fields}.filter((field) => !field.labels?.length && !field.innerText)"
    assert page.evaluate(f"{nameless}.map((field) => field.outerHTML)") == []


def test_what_the_server_refuses_is_said_where_the_answer_would_be(page: Page) -> None:
    set_parameters(page, max_completion_tokens=1_000_000)
    send(page, "Hello")
    error = page.wait_for("document.querySelector('.answer .error').innerText")
    assert "1000000" in error or "1,000,000" in error
    set_parameters(page, max_completion_tokens=0)
    send(page, "Hello again")
    assert focused(page) == "max_completion_tokens"  # never sent: the browser says what is wrong
    assert page.evaluate("document.querySelectorAll('.question').length") == 1
    set_parameters(page, max_completion_tokens=5, temperature=0)
    send(page, "")
    answered(page)
    assert page.evaluate("document.querySelectorAll('.question').length") == 2


def test_a_key_is_asked_for_and_a_wrong_one_explained(
    open_page: Callable[..., Page], serve_smollm2: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    key = new_key(tmp_path / "keys", "ada")
    with serve_smollm2("--api-keys", tmp_path / "keys") as server:
        server.ready()
        assert server.ask("/status").status == 401
        page = open_page(server.url)
        page.wait_for("document.getElementById('key-dialog').open")
        assert focused(page) == "key"
        assert page.evaluate("document.getElementById('key-error').innerText") == ""
        page.type("sk-mistyped")
        page.press("Enter")
        page.wait_for("document.getElementById('key-error').innerText.includes('does not know this key')")
        assert page.evaluate("document.getElementById('state').innerText") == "no valid key"
        page.evaluate("document.getElementById('key').value = ''")
        page.type(key)
        page.press("Enter")
        page.wait_for(READY)
        assert not page.evaluate("document.getElementById('key-dialog').open")
        assert page.evaluate("sessionStorage.getItem('strop.key')") == key
        assert page.evaluate("document.cookie + localStorage.length") == "0"
        set_parameters(page, max_completion_tokens=5)
        send(page, "Hello")
        answered(page)

        os.kill(server.engine_pid, signal.SIGSTOP)
        page.wait_for("document.getElementById('state').innerText.includes('silent')", 20)
        os.kill(server.engine_pid, signal.SIGCONT)
        page.wait_for(READY, 20)
        server.process.kill()
        page.wait_for("document.getElementById('state').innerText.includes('does not answer')", 20)


HOSTILE = """\
<img src=x onerror=alert(1)> **bold <b>x</b>** `a<b>` [link](javascript:alert(1)) ![i](https://x.test/i.png)

# <script>alert(2)</script>

- one
  - <i>two</i>

```html
<u>three</u>
```

| a | <s>b</s> |
|---|---|
| c | d |
"""


def test_text_stays_text(page: Page) -> None:
    text, tags = page.evaluate(
        f"""
        (async () => {{
          const {{ showMarkdown }} = await import("/web/markdown.js");
          const element = document.createElement("div");
          document.body.append(element);
          showMarkdown(element, {json.dumps(HOSTILE)});
          return [element.textContent, [...element.querySelectorAll("*")].map((inner) => inner.localName)];
        }})()
        """
    )
    known = {"code", "div", "h3", "li", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
    assert set(tags) == known
    for part in ("<img src=x onerror=alert(1)>", "bold <b>x</b>", "a<b>", "![i](https://x.test/i.png)"):
        assert part in text
    for part in ("<script>alert(2)</script>", "<i>two</i>", "<u>three</u>", "<s>b</s>"):
        assert part in text
    assert page.complaints == []


def test_blocks_that_are_as_before_keep_their_elements(page: Page) -> None:
    assert page.evaluate(
        r"""
        (async () => {
          const { showMarkdown } = await import("/web/markdown.js");
          const element = document.createElement("div");
          showMarkdown(element, "one\n\ntwo");
          const [first, second] = element.children;
          showMarkdown(element, "one\n\ntwo and more\n\n- three");
          const { children } = element;
          return children.length === 3 && children[0] === first && children[1] !== second;
        })()
        """
    )


def test_events_may_be_cut_anywhere(page: Page) -> None:
    text = 'data: {"a": "é🙂"}\n\n: waiting\n\ndata: second\r\n\r\ndata: [DONE]\n\n'
    got = page.evaluate(
        f"""
        (async () => {{
          const {{ eventData }} = await import("/web/server.js");
          const found = [];
          const stream = new ReadableStream({{
            start(sink) {{
              for (const byte of new TextEncoder().encode({json.dumps(text)})) sink.enqueue(new Uint8Array([byte]));
              sink.close();
            }},
          }});
          for await (const data of eventData(stream)) found.push(data);
          return found;
        }})()
        """
    )
    assert got == ['{"a": "é🙂"}', "second", "[DONE]"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_either_light_and_at_any_width(
    open_page: Callable[..., Page], server_url: str, scheme: str, tmp_path: Path
) -> None:
    page = open_page(server_url, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    page.wait_for(READY)
    set_parameters(page, max_completion_tokens=30)
    send(page, PROMPT)
    answered(page)
    pairs: list[Any] = page.evaluate(
        "[...document.querySelectorAll('#prompt, .question .text, .answer p, .note, dt, dd, #state, h2 small, .top')]"
        ".map((e) => [e.className || e.id || e.localName, getComputedStyle(e).color, background(e)]);"
        "function background(e) { const color = getComputedStyle(e).backgroundColor;"
        "return color === 'rgba(0, 0, 0, 0)' && e.parentElement ? background(e.parentElement) : color; }"
    )
    assert len(pairs) > 20
    faint = [(name, *colors) for name, *colors in pairs if contrast(*colors) < 4.5]  # WCAG 2.2, AA
    assert faint == []
    assert (luminance(pairs[0][2]) > 0.5) == (scheme == "light")
    assert page.evaluate("getComputedStyle(document.querySelector('button')).transitionDuration") == "0s"
    for width, height in ((1440, 900), (800, 600), (390, 844), (320, 568)):
        page.resize(width, height)
        page.screenshot(tmp_path / f"{scheme}-{width}.png")
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
        )
        if width < 900:
            assert page.evaluate("!document.getElementById('plots').checkVisibility()")
            page.evaluate("document.getElementById('toggle').click()")
            assert page.evaluate("document.getElementById('plots').checkVisibility()")
            assert page.evaluate("document.getElementById('side').scrollWidth <= innerWidth")
            page.evaluate("document.getElementById('toggle').click()")


def test_plots_show_what_happens(page: Page) -> None:
    set_parameters(page, max_completion_tokens=120, temperature=0)
    send(page, "Count slowly from one to one hundred.")
    answered(page)
    labels = "[...document.querySelectorAll('figure svg')].map((e) => e.getAttribute('aria-label'))"
    page.wait_for(f"{labels}.some((label) => /^ITL: median [\\d.]+ ms/.test(label))")
    page.wait_for("[...document.querySelectorAll('.line-0')].every((e) => !e.getAttribute('d').includes('NaN'))")
    throughput = "document.querySelector('figure .line-0').getAttribute('d')"
    page.wait_for(f"new Set({throughput}.match(/,[\\d.]+/g)).size > 1")


def luminance(color: str) -> float:
    """Relative, of WCAG."""
    parts = [int(part) / 255 for part in color.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)
