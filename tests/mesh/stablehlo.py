"""The collectives in a lowered program's text, with the bytes that each device sends in them."""

import math
import re
from typing import NamedTuple

_BITS = {"f32": 32, "bf16": 16, "f16": 16, "i32": 32, "ui32": 32, "i8": 8, "ui8": 8, "i1": 8}
_KINDS = "all_gather|reduce_scatter|all_reduce|all_to_all|collective_permute|collective_broadcast"
_OP = re.compile(rf'"stablehlo\.({_KINDS})"')
_GROUPS = re.compile(r"replica_groups = dense<.*?> : tensor<\d+x(\d+)xi64>")
_TYPES = re.compile(r"\}> (?:\(\{.*?\}\) )?: \(tensor<([^>]*)>\) -> tensor<([^>]*)>", re.DOTALL)


class Found(NamedTuple):
    """One collective."""

    kind: str
    num_devices: int
    """2 for a permutation, which is between pairs."""
    bytes_sent: int
    """By each device, however often it runs."""


def collectives(text: str) -> list[Found]:
    """All of them, in the order of the text."""
    found = []
    for op in _OP.finditer(text):
        types = _TYPES.search(text, op.start())
        assert types is not None
        given, made = map(_num_bytes, types.groups())
        kind, k = op[1], 2
        if kind != "collective_permute":
            groups = _GROUPS.search(text, op.start())
            assert groups is not None
            k = int(groups[1])
        sent = {
            "all_gather": given * (k - 1),
            "reduce_scatter": made * (k - 1),
            "all_reduce": -(-2 * given * (k - 1) // k),
            "all_to_all": given * (k - 1) // k,
            "collective_permute": given,
        }[kind]
        found.append(Found(kind, k, sent * _num_runs(text, op.start())))
    return found


def _num_runs(text: str, at: int) -> int:
    """How often a place in the text runs: the trips of the loops around it times the calls of its function."""
    function = list(re.finditer(r"func\.func \w+ @(\w+)", text[:at]))[-1]
    num_calls = 1
    if function[1] != "main":
        num_calls = sum(_num_runs(text, call.start()) for call in re.finditer(rf"call @{function[1]}\(", text))
    loops = [_loop(text, loop.start()) for loop in re.finditer(r"stablehlo\.while\(", text[:at])]
    return num_calls * math.prod(trips for begin, end, trips in loops if begin <= at < end)


def _loop(text: str, begin: int) -> tuple[int, int, int]:
    """Where the body of a loop that counts from 0 begins and ends, and how often it runs."""
    condition = _block(text, text.index("cond {", begin))
    body = _block(text, text.index("do {", condition[1]))
    limits = re.findall(r"stablehlo\.constant dense<(\d+)> : tensor<i32>", text[slice(*condition)])
    assert len(limits) == 1 and "LT" in text[slice(*condition)], text[slice(*condition)]
    return *body, int(limits[0])


def _block(text: str, at: int) -> tuple[int, int]:
    """From the first brace to its counterpart."""
    begin = end = text.index("{", at)
    depth = 0
    while True:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
        if depth == 0:
            return begin, end


def _num_bytes(tensor_type: str) -> int:
    *dims, element = tensor_type.split("x")
    return math.prod(map(int, dims)) * _BITS[element] // 8
