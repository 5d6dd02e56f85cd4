"""The commands of a chat: lines that begin with `/`."""

from collections.abc import Callable
from pathlib import Path

from strop.cli.chat_session import ChatSession
from strop.core.errors import RequestError


def run_command(session: ChatSession, line: str) -> str:
    """Does what `line` says and returns what to tell the user. RequestError where that is impossible."""
    name, _, argument = line.partition(" ")
    if name not in COMMANDS:
        raise RequestError(
            f"there is no command {name}: choose from {', '.join(COMMANDS)}; to send a message that begins with /, "
            "begin it with //"
        )
    return COMMANDS[name][1](session, argument.strip())


def _help(session: ChatSession, argument: str) -> str:
    lines = [f"{name + ' ' + arguments:24}{what}" for name, (arguments, _, what) in COMMANDS.items()]
    keys = "Ctrl-C stops an answer and keeps the chat; Ctrl-D leaves. // begins a message that begins with /."
    return "\n".join([*lines, keys])


def _save(session: ChatSession, argument: str) -> str:
    path = _file("/save", argument)
    session.conversation.save(path, session.model_name)
    return f"saved {len(session.conversation.messages)} messages in {path}"


def _load(session: ChatSession, argument: str) -> str:
    path = _file("/load", argument)
    session.conversation.load(path)
    return f"loaded {len(session.conversation.messages)} messages from {path}"


def _params(session: ChatSession, argument: str) -> str:
    if not argument:
        return session.params()
    name, equals, text = argument.partition("=")
    if not equals:
        raise RequestError(f"/params {argument} is not accepted: give name=value, or nothing to see all")
    session.set_param(name.strip(), text.strip())
    return f"{name.strip()}={text.strip()}"


def _stats(session: ChatSession, argument: str) -> str:
    return session.stats()


def _reset(session: ChatSession, argument: str) -> str:
    session.conversation.reset()
    return "the chat begins anew; the system message stays"


def _forget(session: ChatSession, argument: str) -> str:
    if not (argument.isascii() and argument.isdecimal() and len(argument) < 10):
        raise RequestError(f"/forget {argument} is not accepted: give the number of oldest turns to drop")
    dropped = session.conversation.forget(int(argument))
    return f"dropped {dropped} turns; {session.conversation.num_turns} are left"


def _system(session: ChatSession, argument: str) -> str:
    conversation = session.conversation
    if argument:
        conversation.system = None if argument == "-" else argument
    return f"system: {conversation.system}" if conversation.system else "no system message of yours"


def _file(command: str, argument: str) -> Path:
    path = Path(argument).expanduser()
    if not path.name:
        raise RequestError(f"{command} {argument} is not accepted: name a file")
    return path


COMMANDS: dict[str, tuple[str, Callable[[ChatSession, str], str], str]] = {
    "/save": ("FILE", _save, "write the messages as JSON"),
    "/load": ("FILE", _load, "go on from messages that /save wrote"),
    "/params": ("[NAME=VALUE]", _params, "show or set sampling parameters; NAME= sets it as at the start"),
    "/stats": ("", _stats, "speed of the last answer, tokens in the chat"),
    "/system": ("[TEXT]", _system, "show or set the system message; - removes it"),
    "/forget": ("N", _forget, "drop the N oldest turns"),
    "/reset": ("", _reset, "drop all turns"),
    "/help": ("", _help, "this list"),
}
