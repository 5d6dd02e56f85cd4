"""/v1/embeddings."""

import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta, Struct

from strop.core.request import EmbeddingRequestOutput
from strop.serve.openai.completions import Texts, texts_of
from strop.serve.openai.errors import ApiError
from strop.serve.openai.exchange import Served, encode
from strop.serve.openai.fields import decode, honoured, ignored


class EmbeddingsRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Texts to embed."""

    model: Annotated[str, honoured("a name of the served model; others get 404")]
    input: Annotated[str | Texts, honoured("a text, its token ids, or a list of either; none is ever cut")]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, honoured("base64 is of little-endian float32; float is the default")
    ] = None
    dimensions: Annotated[
        Annotated[int, Meta(ge=1, lt=2**31)] | None,
        honoured("the model's own, or fewer of a model that was trained for it (Matryoshka), normalised again"),
    ] = None
    user: Annotated[str | None, ignored("")] = None


class Embedding(Struct):
    """The vector of one text."""

    index: int
    embedding: Annotated[list[float] | str, Meta(description="numbers, or base64 of little-endian float32")]
    object: Literal["embedding"] = "embedding"


class EmbeddingsUsage(Struct):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(Struct):
    """The vectors, in the order of the texts."""

    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage
    object: Literal["list"] = "list"


class EmbeddingsExchange:
    """What to embed, and the reply."""

    def __init__(self, request: EmbeddingsRequest, inputs: "Sequence[str | tuple[int, ...]]") -> None:
        self.inputs = inputs
        """Texts or token ids, for Embedder.embed(..., truncate=False)."""
        self._request = request

    def reply(self, outputs: Sequence[EmbeddingRequestOutput]) -> bytes:
        """The body, from the vectors of `inputs`."""
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        data = [Embedding(i, self._spelled(output.outputs.embedding)) for i, output in enumerate(outputs)]
        return encode(Embeddings(data, self._request.model, EmbeddingsUsage(num_tokens, num_tokens)))

    def _spelled(self, vector: list[float]) -> list[float] | str:
        size = self._request.dimensions
        if size is not None and size < len(vector):
            head = np.asarray(vector[:size], np.float32)
            vector = (head / max(np.linalg.norm(head), np.float32(1e-12))).tolist()
        if self._request.encoding_format == "base64":
            return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
        return vector


def parse(body: bytes, served: Served) -> EmbeddingsExchange:
    """The exchange for a request's body. ApiError for one that is refused."""
    request = decode(body, EmbeddingsRequest, served.caps)
    served.check_name(request.model)
    if served.embedding_len is None:
        raise ApiError("this server's model generates text; start one with a model that embeds", param="model")
    size = request.dimensions
    if size is not None and size != served.embedding_len:
        if size > served.embedding_len:
            raise ApiError(f"dimensions={size}: this model's vectors have {served.embedding_len}", param="dimensions")
        if not served.embeddings_may_be_cut:
            raise ApiError(
                f"dimensions={size}: this model's vectors have {served.embedding_len} numbers, and are not known to"
                " keep their meaning when they are cut; leave dimensions out",
                param="dimensions",
            )
    return EmbeddingsExchange(request, texts_of(request.input, "input", served.caps.inputs))
