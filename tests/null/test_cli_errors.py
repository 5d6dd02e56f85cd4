"""An error on the command line names the flag that was typed, not the field behind it."""

from dataclasses import fields

import click
import pytest

from strop.cli import bench, chat, run, serve, verb
from strop.core.config import EngineConfig
from strop.core.errors import CapacityError, FormatError

RUN, BENCH, SERVE = (verb.flags_of(one.command) for one in (run, bench, serve))


@pytest.mark.parametrize(
    ("flags", "message", "shown"),
    [
        (RUN, "max_context_len=500 exceeds the limit", "--context 500 exceeds the limit"),
        (RUN, "shorten it or raise max_context_len", "shorten it or raise --context"),
        (RUN, "lower max_tokens or shorten it, or", "lower --max-tokens or shorten it, or"),
        (RUN, "num_threads=-1 is out of range", "--threads -1 is out of range"),
        (RUN, "the memory of seed and stop: raise memory_bytes", "the memory of seed and stop: raise --memory"),
        (RUN, "seed=5, stop[0]='' and top_p=2", "--seed 5, --stop '' and --top-p 2"),
        (RUN, "lower max_num_seqs", "lower max_num_seqs"),
        (BENCH, "lower max_num_seqs", "lower --batches"),
        (SERVE, "lower max_num_seqs", "lower --max-seqs"),
        (RUN, "no such file /a/max_tokens/top_k.gguf", "no such file /a/max_tokens/top_k.gguf"),
        (RUN, "'max_tokens' my_top_k top_k_more x.top_k", "'max_tokens' my_top_k top_k_more x.top_k"),
    ],
)
def test_fields_become_flags(flags: dict[str, str], message: str, shown: str) -> None:
    assert verb.in_flags(message, flags) == shown


def test_every_renamed_field_and_flag_exists() -> None:
    assert verb._OPTIONS_OF_FIELD.keys() <= {field.name for field in fields(EngineConfig)}
    named = {f"--{name.replace('_', '-')}" for names in verb._OPTIONS_OF_FIELD.values() for name in names}
    assert named <= {*RUN.values(), *BENCH.values(), *SERVE.values()}


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--temperature", "-1"], "strop: --temperature -1.0 is out of range"),
        (["--top-p", "2"], "strop: --top-p 2.0 is out of range"),
        (["--stop", ""], "strop: --stop '' is out of range"),
        (["--repetition-penalty", "nan"], "strop: --repetition-penalty nan is out of range"),
        (["--max-tokens", "-1"], "strop: --max-tokens -1 is out of range: 1 or more, or 0"),
    ],
)
def test_run_names_its_flags(options: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        verb.run_verb(run.command, ["none.gguf", "hello", *options])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith(shown)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--raw", "--system", "Be brief."], "strop: --raw takes the prompt as it is"),
        (["--template", "none.jinja"], "strop: --template none.jinja cannot be read (No such file"),
    ],
)
def test_run_refuses_what_it_would_not_use(options: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verb.run_verb(run.command, ["none.gguf", "hello", *options])
    assert capsys.readouterr().err.startswith(shown)


def test_chat_names_flags_and_its_own_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verb.run_verb(chat.command, ["none.gguf", "--top-p", "2"])
    assert capsys.readouterr().err.startswith("strop: --top-p 2.0 is out of range")
    message = chat._in_words_of_chat("lower max_tokens or raise max_context_len; top_p=2.0")
    assert message == "lower max_tokens or raise --context; top_p=2.0"


def test_run_and_chat_share_their_options() -> None:
    def described(command: click.Command) -> set[tuple[str | None, str | None]]:
        return {(param.name, param.help) for param in command.params if isinstance(param, click.Option)}

    own = ("raw", "json_line", "coordinator", "num_processes", "process_id", "join_timeout")
    assert described(run.command) - described(chat.command) == {
        (param.name, param.help)
        for param in run.command.params
        if param.name in own  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize(("error", "shown"), [(CapacityError, "--context 5"), (FormatError, "max_context_len=5")])
def test_only_errors_about_the_request_are_translated(
    error: type[Exception], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    @click.option("--context")
    def fail(context: int) -> None:
        raise error("max_context_len=5")

    with pytest.raises(SystemExit):
        verb.run_verb(fail, [])
    assert capsys.readouterr().err == f"strop: {shown}\n"
