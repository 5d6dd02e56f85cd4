"""What reaches a terminal, and what Ctrl-C does there and elsewhere."""

import signal

import pytest

from strop.cli.terminal import Terminal


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    text = "a\x1b]0;title\x07\tb\r\n\x9b2Jé😀\x7f"
    terminal.write(text)
    assert capsys.readouterr().out == text  # through a pipe every character
    terminal._shows_answers = True
    terminal.write(text)
    assert capsys.readouterr().out == "a]0;title\tb\n2Jé😀"


def test_an_interrupt_at_a_terminal_is_a_wish_first_and_an_order_then(request: pytest.FixtureRequest) -> None:
    terminal = Terminal()
    terminal.is_interactive = True
    before = signal.getsignal(signal.SIGINT)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    python = signal.default_int_handler
    signal.signal(signal.SIGINT, python)  # a shell's background jobs inherit that they ignore Ctrl-C
    with terminal.interrupts() as is_stopped:
        assert not is_stopped()
        signal.raise_signal(signal.SIGINT)
        assert is_stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is python
    terminal.is_interactive = False
    with terminal.interrupts() as is_stopped, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not is_stopped()
