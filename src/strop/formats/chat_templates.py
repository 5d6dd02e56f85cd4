"""The chat templates a model brings: one, or several by name (`default`, `tool_use`, `rag`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from strop.core.config import MIB
from strop.core.errors import FormatError, RequestError

DEFAULT, TOOL_USE = "default", "tool_use"

MAX_TEMPLATE_BYTES = 4 * MIB
_MAX_TEMPLATES = 64
_GGUF_KEY = "tokenizer.chat_template"


def templates_of_folder(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, of a Hugging Face folder whose tokenizer_config.json holds `config`.

    Files win over the config: chat_template.jinja is the default, additional_chat_templates/NAME.jinja the others.
    chat_template.json (of a processor) counts where nothing else gives a default. FormatError for a damaged one.
    """
    templates = _of_config(config.get("chat_template"))
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if len(more) > _MAX_TEMPLATES:
        raise FormatError(f"additional_chat_templates has {len(more)} templates: {_MAX_TEMPLATES} at most are read")
    templates |= {path.stem: read_template(path) for path in more}
    jinja, processor = folder / "chat_template.jinja", folder / "chat_template.json"
    if jinja.is_file():
        templates[DEFAULT] = read_template(jinja)
    elif DEFAULT not in templates and processor.is_file():
        try:
            templates |= _of_config(msgspec.json.decode(read_template(processor))["chat_template"])
        except (msgspec.DecodeError, RecursionError, LookupError, TypeError):
            raise FormatError('chat_template.json must hold {"chat_template": ...}; fetch the model again') from None
    return templates


def templates_of_gguf(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name, from `tokenizer.chat_template` and `tokenizer.chat_template.NAME`. FormatError if no texts."""
    names = {key: key.removeprefix(_GGUF_KEY).removeprefix(".") for key in metadata if key.startswith(_GGUF_KEY + ".")}
    templates = {}
    for key, name in {_GGUF_KEY: DEFAULT, **names}.items():
        value = metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{key} must be of type str, not {type(value).__name__}; fetch the file again")
        if value is not None:
            templates[name] = value
    return templates


def template_for(templates: Mapping[str, str], variables: Mapping[str, Any]) -> str:
    """The template to render with `variables`: with tools the `tool_use` one if there is one, else the default.

    RequestError where there is none, or where it never looks at the tools or documents it is given: a model would
    answer without them.
    """
    name = TOOL_USE if variables.get("tools") is not None and TOOL_USE in templates else DEFAULT
    template = templates.get(name)
    if template is None:
        named = f" by default, only {', '.join(map(repr, templates))}" if templates else ""
        raise RequestError(
            f"this model has no chat template{named}: give one (chat_template, or --template FILE), use an instruct "
            "model, or send a plain prompt"
        )
    for given in ("tools", "documents"):
        if variables.get(given) and given not in template:
            raise RequestError(
                f"this model's chat template has no place for {given}: use a model that knows {given}, or give a "
                "template that does (chat_template, or --template FILE)"
            )
    return template


def read_template(path: Path) -> str:
    """The text in a file. FormatError if it is too large or not UTF-8, OSError if it cannot be read."""
    with path.open("rb") as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise FormatError(f"{path} is larger than a chat template's {MAX_TEMPLATE_BYTES} bytes; check the file")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); check the file") from None


def _of_config(value: Any) -> dict[str, str]:
    """`chat_template` of a config: a text, or a list of {"name": ..., "template": ...}."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
    else:
        named = {} if value is None else {DEFAULT: value}
    templates = {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    if templates != named:
        raise FormatError(
            "tokenizer_config.json: chat_template must be a text or a list of named texts; fetch the model again"
        )
    return templates
