"""Wrong requests are refused by name where they are made; NumPy's numbers are numbers."""

from typing import Any

import numpy as np
import pytest
from tiny_tokenizer import tiny_metadata

from strop.core.errors import RequestError
from strop.core.request import Request, SamplingParams, StructuredOutputsParams
from strop.engine.text import prepare_prompt
from strop.formats.gguf_tokenizer import tokenizer_from_gguf


@pytest.mark.parametrize(
    ("field", "value", "shown", "accepted"),
    [
        ("n", True, "n=True has type bool", "an integer from 1 to 128"),
        ("n", None, "n=None has type NoneType", "an integer from 1 to 128"),
        ("n", 129, "n=129 is out of range", "from 1 to 128"),
        ("max_tokens", 1.5, "max_tokens=1.5 has type float", "1 or more, or None"),
        ("max_tokens", 2.0, "max_tokens=2.0 has type float", "integer"),
        ("max_tokens", "5", "max_tokens='5' has type str", "integer"),
        ("min_tokens", None, "min_tokens=None", "0 or more"),
        ("temperature", "hot", "temperature='hot' has type str", "a finite number, 0 or more"),
        ("temperature", True, "temperature=True has type bool", "number"),
        ("temperature", None, "temperature=None has type NoneType", "number"),
        ("temperature", 1j, "temperature=1j has type complex", "number"),
        ("temperature", np.float16("nan"), "temperature=nan is out of range", "finite"),
        ("top_k", 1.0, "top_k=1.0 has type float", "0 (keep all) or more"),
        ("top_p", [1], "top_p=[1] has type list", "at most 1"),
        ("min_p", float("nan"), "min_p=nan is out of range", "from 0 to 1"),
        ("seed", 1.2, "seed=1.2 has type float", "None"),
        ("seed", 2**64, f"seed={2**64} is out of range", "64 bits"),
        ("repetition_penalty", "1", "repetition_penalty='1' has type str", "above 0"),
        ("presence_penalty", np.array([1.0, 2.0]), "has type ndarray", "number"),
        ("frequency_penalty", -1e30, "frequency_penalty=-1e+30 is out of range", "finite"),
        ("logprobs", True, "logprobs=True has type bool", "from 0 to 20, or None"),
        ("ignore_eos", 1, "ignore_eos=1 has type int", "True or False"),
        ("skip_special_tokens", "no", "skip_special_tokens='no' has type str", "True or False"),
        ("stop", 5, "stop=5 has type int", "a list of texts"),
        ("stop", b"x", "stop=b'x' has type bytes", "text"),
        ("stop", ["a", 5], "stop[1]=5 has type int", "text"),
        ("stop", "", "stop[0]='' is out of range", "empty"),
        ("stop_token_ids", 5, "stop_token_ids=5 has type int", "a list of token ids"),
        ("stop_token_ids", "12", "stop_token_ids='12' has type str", "a list of token ids"),
        ("stop_token_ids", [1, "2"], "stop_token_ids[1]='2' has type str", "integer"),
        ("stop_token_ids", [True], "stop_token_ids[0]=True has type bool", "integer"),
        ("logit_bias", {"5": 1.0}, "logit_bias key='5' has type str", "token ids (integers)"),
        ("logit_bias", {5: "x"}, "logit_bias[5]='x' has type str", "finite numbers"),
        ("logit_bias", {5: float("-inf")}, "logit_bias[5]=-inf is out of range", "finite"),
        ("logit_bias", [(5, 1.0)], "logit_bias=[(5, 1.0)] has type list", "a map"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_accepted(field: str, value: Any, shown: str, accepted: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert field in str(caught.value)
    assert shown in str(caught.value)
    assert accepted in str(caught.value)


def test_a_long_value_is_cut() -> None:
    for name in ("max_tokens", "temperature", "seed"):
        with pytest.raises(RequestError, match=rf"{name}=\.\.\. is out of range"):
            SamplingParams(**{name: 10**5000})  # too many digits for repr
    with pytest.raises(RequestError, match=r"temperature='x+\.\.\. has type str") as caught:
        SamplingParams(temperature="x" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_numbers_of_any_library_become_plain_ones() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        max_tokens=np.int32(7),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        top_p=1,
        seed=np.uint64(2**64 - 1),  # type: ignore[arg-type]
        presence_penalty=np.float16(1),  # type: ignore[arg-type]
        logprobs=np.uint8(3),  # type: ignore[arg-type]
        logit_bias={np.int64(4): np.float32(-1.5), 5: 2},  # type: ignore[dict-item]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
    )
    plain = SamplingParams(
        n=2,
        max_tokens=7,
        temperature=0.5,
        top_p=1.0,
        seed=2**64 - 1,
        presence_penalty=1.0,
        logprobs=3,
        logit_bias={4: -1.5, 5: 2.0},
        stop_token_ids=(3, 4),
    )
    assert repr(params) == repr(plain)


def test_one_stop_string_or_many_or_none() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["ab", "c"]).stop == ("ab", "c")  # type: ignore[arg-type]
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]


def test_a_caller_that_changes_its_map_changes_no_request() -> None:
    biases = {1: 2.0}
    params = SamplingParams(logit_bias=biases)
    biases[1] = float("nan")
    assert params.logit_bias == {1: 2.0}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((7, (1,)), "request_id=7 has type int: give text"),
        (("r", "text"), "prompt_token_ids='text' has type str: give a list of token ids"),
        (("r", 5), "prompt_token_ids=5 has type int"),
        (("r", (1, 2.5)), "prompt_token_ids[1]=2.5 has type float"),
        (("r", (1, True)), "prompt_token_ids[1]=True has type bool"),
        (("r", (1,), {"n": 2}), "params={'n': 2} has type dict: give a SamplingParams"),
    ],
)
def test_a_wrong_request_is_named(arguments: tuple[Any, ...], shown: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request(*arguments)
    assert shown in str(caught.value)


def test_a_prompt_of_numpy_ids() -> None:
    ids = Request("r", np.array([3, 4])).prompt_token_ids  # type: ignore[arg-type]
    assert ids == (3, 4)
    assert {type(token_id) for token_id in ids} == {int}
    ids = prepare_prompt(tokenizer_from_gguf(tiny_metadata()), [np.int64(3), 4])  # type: ignore[list-item]
    assert ids == (3, 4)
    assert {type(token_id) for token_id in ids} == {int}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "nothing"),
        ({"json": "{}", "regex": "a"}, "json and regex"),
        ({"json": 3}, "json=3"),
        ({"json_object": "yes"}, "json_object='yes'"),
        ({"regex": b"a"}, "regex"),
        ({"choice": [""]}, r"choice\[0\]"),
    ],
)
def test_a_shape_is_one_of_known_kinds(given: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        StructuredOutputsParams(**given)


def test_a_schema_is_kept_as_text() -> None:
    assert StructuredOutputsParams(json={"type": "object"}).json == '{"type": "object"}'
    assert StructuredOutputsParams(json=False).json == "false"
    with pytest.raises(RequestError, match="structured_outputs="):
        SamplingParams(structured_outputs={"json": {}})  # type: ignore[arg-type]
