"""Chat templates: what Hugging Face templates use works, and a hostile one costs a request, never the program."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from strop.core.config import MIB
from strop.core.errors import CapacityError, FormatError, RequestError
from strop.formats.template import TemplateRenderer, replace_surrogates

MESSAGES = [{"role": "user", "content": "<b> & 'é' 😀"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer(timeout_s=20, max_output_bytes=1 * MIB)
    yield renderer
    renderer.close()


def render(renderer: TemplateRenderer, template: str) -> str:
    return renderer.render(template, {"messages": MESSAGES, "add_generation_prompt": True})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].role }}: {{ messages[0]['content'] }}", "user: <b> & 'é' 😀"),
        ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
        ("{{ {'b': 1, 'a': '<'} | tojson(indent=1, sort_keys=true) }}", '{\n "a": "<",\n "b": 1\n}'),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny"),
        (
            "{% for i in [0, 1, 2, 3, 4] %}{% if i == 1 %}{% continue %}{% endif %}"
            "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "023",
        ),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("a{% generation %}b{{ messages | length }}{% endgeneration %}c", "ab1c"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ strftime_now('%d') | length }}", "2"),
        ("{{ 'a b' | wordwrap(1) }} {{ ['x'] | pprint }} {{ '<b>x</b>' | striptags }}", "a\nb ['x'] x"),
        ("{{ tools is none }}{{ tools is defined }}", "FalseFalse"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ messages[::-1] | length }}", "bx1"),
        ("{{ '%s-%d' | format('x', 3) }}{{ '{}!'.format('y') }}", "x-3y!"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ f('<') }}", "[1][<]"),
        ("", ""),
        ("\ud83d\ude00 \udc80", "😀 \ufffd"),
    ],
)
def test_what_templates_use(renderer: TemplateRenderer, template: str, text: str) -> None:
    assert render(renderer, template) == text


def test_broken_utf8_in_messages_is_replaced(renderer: TemplateRenderer) -> None:
    messages = [{"role": "user", "content": "a\udc80b"}]
    assert renderer.render("{{ messages[0].content }}", {"messages": messages}) == "a\ufffdb"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() | length }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__.sys.modules }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages | map(attribute='__class__') | list | first }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ '{m.__class__.__init__.__globals__}'.format_map({'m': messages}) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(messages) }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
        "{{ ((1).real.__class__, (messages | attr('append')))[1](1) }}",
        "{{ messages.append(1) }}{{ messages | length }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ messages[0].clear() }}",
        "{{ lipsum(n=3) }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ namespace.__init__.__globals__.sys.modules }}",
        "{{ namespace(__class__=messages).x }}",
        "{% set ns = namespace() %}{% set ns.__call__ = raise_exception %}{{ ns() }}",
        "{{ dict.mro() }}{{ dict.__subclasses__() }}",
        "{{ messages | attr('append') | attr('__self__') }}",
        "{{ (messages | first | attr('items')).__func__ }}",
        "{{ ['{0.__class__}'] | map('format', messages) | list }}",
        "{{ '%(x)s' | format(x=messages.__class__) }}",
        "{{ (messages | groupby('__class__'))[0][0] }}",
        "{{ messages | selectattr('__class__') | map(attribute='__class__') | first }}",
        "{{ self._TemplateReference__context.environment.loader }}",
        "{{ loop.__class__ }}{% for x in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
        "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
        "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{% set x = (messages | map('string')) %}{{ x.gi_frame.f_globals }}",
        "{% from '/etc/passwd' import x %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'x' %}",
    ],
)
def test_escapes_from_the_sandbox_give_nothing(renderer: TemplateRenderer, template: str) -> None:
    try:
        text = render(renderer, template)
    except RequestError:
        return
    assert not any(sign in text for sign in ("class", "object", "module", "function", "root:", "uid="))
    assert text.strip() in ("", "0")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{{ 'a' * 10**9 }}", "too much memory"),
        ("{{ [0] * 10**9 }}", "too much memory"),
        ("{{ 'x' | center(10**10) }}", "too much memory"),
        ("{{ 'x'.ljust(10**10) | length }}", "too much memory"),
        ("{{ [1] | tojson(indent=10**10) }}", "too much memory"),
        ("{{ strftime_now('%c' * 10**8) }}", "too much memory"),
        ("{{ raise_exception('x' * 10**9) }}", "too much memory"),
        ("{{ raise_exception('x' * 10**6) }}", "refuses these messages: x{500}$"),
        (
            "{{ '%1000000000s' | format('x') }}{{ '%9999999999s' | format('x') }}",
            "too much memory|too long|longer than",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than 1048576 bytes"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "too much memory",
        ),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recurses too deeply"),
        ("{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "recurses too deeply"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nope }}", "nope"),
    ],
)
def test_hostile_and_failing_templates_cost_one_request(
    renderer: TemplateRenderer, template: str, message: str
) -> None:
    with pytest.raises((RequestError, FormatError), match=message):
        render(renderer, template)
    assert render(renderer, "{{ messages | length }}") == "1"


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'a }}", "{% for x in y %}", "{% endfor %}", "{% unknown %}"])
def test_templates_that_do_not_parse_name_the_line(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(FormatError, match="the chat template does not parse, line 2: "):
        render(renderer, "first line\n" + template)


@pytest.mark.parametrize("depth", [1000, 200_000])
def test_deep_nesting_is_survived(renderer: TemplateRenderer, depth: int) -> None:
    with pytest.raises((RequestError, FormatError)):
        render(renderer, "{{" + "(" * depth + "1" + ")" * depth + "}}")
    assert render(renderer, "ok") == "ok"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 8) > 0 }}",
        "{{ ('a' * 99999) | replace('a', 'a' * 999) | urlize | wordcount }}",
    ],
)
def test_endless_templates_are_killed(template: str) -> None:
    renderer = TemplateRenderer(timeout_s=0.2)
    try:
        renderer.start()
        with pytest.raises(RequestError, match=r"took longer than 0\.2 s"):
            render(renderer, template)
        renderer.timeout_s = 20
        assert render(renderer, "ok") == "ok"
    finally:
        renderer.close()


def test_the_memory_limit_is_the_helpers_own() -> None:
    template = "{{ ('x' * (320 * 2**20)) | length }}"
    for memory_bytes, fits in ((256 * MIB, False), (1024 * MIB, True)):
        renderer = TemplateRenderer(timeout_s=60, memory_bytes=memory_bytes)
        try:
            if fits:
                assert render(renderer, template) == str(320 * MIB)
                continue
            with pytest.raises(RequestError, match="too much memory"):
                render(renderer, template)
        finally:
            renderer.close()


@pytest.mark.skipif(not os.path.exists("/proc/self/limits"), reason="needs Linux's /proc")
def test_outside_the_sandbox_there_is_nothing_to_open(renderer: TemplateRenderer) -> None:
    render(renderer, "{{ strftime_now('%c') }}")
    assert renderer._helper is not None
    with open(f"/proc/{renderer._helper._process.pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert (limits["Max open files"], limits["Max file size"], limits["Max core file size"]) == ("3", "0", "0")


def test_an_interrupt_is_not_for_the_helper(renderer: TemplateRenderer) -> None:
    render(renderer, "ok")
    assert renderer._helper is not None
    assert os.getpgid(renderer._helper._process.pid) != os.getpgid(0)


def test_a_template_keeps_nothing_from_one_rendering_to_the_next(renderer: TemplateRenderer) -> None:
    template = "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + messages | length %}{{ ns.n }}{{ x }}{% set x = 1 %}"
    assert render(renderer, template) == render(renderer, template) == "1"


def test_data_that_is_not_plain_is_refused(renderer: TemplateRenderer) -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (object(), 2**70, nested):
        with pytest.raises(RequestError):
            renderer.render("{{ x | string | length }}", {"x": value})
    assert render(renderer, "ok") == "ok"


def test_threads_share_one_helper(renderer: TemplateRenderer) -> None:
    answers: dict[int, str] = {}

    def work(number: int) -> None:
        answers[number] = renderer.render("{{ n }}" * 50, {"n": number})

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) * 50 for number in range(8)}


def test_a_helper_that_died_is_replaced(renderer: TemplateRenderer) -> None:
    render(renderer, "ok")
    assert renderer._helper is not None
    renderer._helper._process.kill()
    renderer._helper._process.wait()
    assert render(renderer, "ok") == "ok"


def test_a_helper_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    renderer = TemplateRenderer()
    with pytest.raises(CapacityError, match="did not start"):
        renderer.render("x", {})
    renderer.close()


def test_the_helper_sees_no_secrets_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    renderer = TemplateRenderer(timeout_s=20)
    renderer.render("x", {})
    assert renderer._helper is not None
    process = renderer._helper._process
    if os.path.exists(f"/proc/{process.pid}/environ"):
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            assert b"hunter2" not in file.read()
    del renderer
    assert process.poll() is not None


def test_neither_side_loads_heavy_modules() -> None:
    for module in ("strop.formats.template", "strop.formats.template_worker"):
        code = f"import sys, {module}; print([m for m in ('jax', 'numpy', 'tokenizers') if m in sys.modules])"
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_replace_surrogates() -> None:
    assert replace_surrogates("plain") == "plain"
    assert replace_surrogates("é\udcff\ud83d\ude00\ud83d") == "é\ufffd😀\ufffd"
