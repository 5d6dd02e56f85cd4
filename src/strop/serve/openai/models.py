"""/v1/models."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from strop.serve.openai.exchange import Served, encode


class ModelCard(Struct, kw_only=True):
    """A name that requests may give."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "strop"
    max_model_len: Annotated[int, Meta(description="tokens of prompt and answer together")]


class ModelList(Struct):
    """All names."""

    data: list[ModelCard]
    object: Literal["list"] = "list"


def models_body(served: Served) -> bytes:
    """Of GET /v1/models."""
    return encode(ModelList([_card(served, name) for name in served.names]))


def model_body(served: Served, name: str) -> bytes:
    """Of GET /v1/models/NAME; names may have slashes. ApiError (404) for an unknown one."""
    served.check_name(name)
    return encode(_card(served, name))


def _card(served: Served, name: str) -> ModelCard:
    return ModelCard(id=name, created=served.created_s, max_model_len=served.context_len)
