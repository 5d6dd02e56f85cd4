"""Writes docs/api.md: what becomes of each field of a request.

usage: python scripts/api_docs.py
"""

from collections.abc import Iterator
from pathlib import Path

from strop.serve.openai.fields import Caps, Rule, fields_of
from strop.serve.openai.openapi import ENDPOINTS, Endpoint

TARGET = Path(__file__).resolve().parent.parent / "docs" / "api.md"

_HEAD = """# The HTTP API

Made by `make docs` from the types that requests are decoded with; a test checks that it is current.

Each field is *honoured*, has *no effect*, or is *refused*: then only `null` is taken, and anything else is answered
with 400 and the field's name. A field that is not listed is refused in the same way. `null` means that a field is left
out. Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. Limits are the server's defaults.

Where clients expect more than one answer could give:

- Messages are text; parts of a content become lines of one text.
- Structured answers follow their schema whether or not `strict` is set. A keyword that cannot be enforced is refused.
- With tools and a JSON shape (`response_format`, `text.format`) an answer is calls or JSON of that shape, never both.
- A call that is cut off (`length`, a stop string) leaves what came of its arguments, and no part of its markup.
- What a model thinks before it answers is split off: see [Thoughts](serving.md#thoughts).
- `stop` takes more texts than OpenAI's 4. A token that only ends an answer has no log probability in the reply.
- A prompt that does not fit the context with `max_tokens` after it is refused (`context_length_exceeded`), never cut.
- A token that is no whole text is spelled `bytes:\\xf0\\x9f` in log probabilities; probability 0 is -9999.0.
- `/v1/responses` stores nothing: replies say `"store": false`, and conversations are sent whole.
"""

_OUTCOMES = {"honoured": "honoured", "ignored": "no effect", "refused": "**refused**"}


def render() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *(line for endpoint in ENDPOINTS for line in _endpoint(endpoint))])


def _endpoint(endpoint: Endpoint) -> Iterator[str]:
    yield f"## POST {endpoint.path}\n"
    yield f"{endpoint.about[0].upper()}{endpoint.about[1:]}.\n"
    yield "| field | | |\n|---|---|---|"
    fields = fields_of(endpoint.request)
    order = ("honoured", "ignored", "refused")
    for name, rule in sorted(fields.rules.items(), key=lambda entry: order.index(entry[1].kind)):
        word = "or" if any(other.startswith(f"{name}.") for other in fields.rules) else "only"
        yield f"| `{name}` | {_OUTCOMES[rule.kind]} | {_remark(rule, fields.accepted.get(name, ()), word)} |"
    yield ""


def _remark(rule: Rule, accepted: tuple[object, ...], word: str) -> str:
    """`word` is for the values of a text, which a field of other kinds may be, too."""
    remarks = [rule.about] if rule.about else []
    if accepted:
        remarks.append(f"{word} " + ", ".join(f"`{str(value).lower()}`" for value in accepted))
    if rule.cap is not None:
        unit = " bytes" if rule.cap.endswith("_bytes") else ""
        remarks.append(f"at most {getattr(Caps(), rule.cap)}{unit}")
    return "; ".join(remarks)


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
