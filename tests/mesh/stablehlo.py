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
    """By each device, in all iterations of the loops around it."""


def collectives(text: str) -> list[Found]:
    """All of them, in order. Fails for one outside the main function, which may be called several times."""
    main_end = text.find("func.func private")
    loops = [_loop(text, match.start()) for match in re.finditer(r"stablehlo\.while\(", text)]
    found = []
    for op in _OP.finditer(text):
        assert main_end < 0 or op.start() < main_end, "a collective in a private function"
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
        trips = math.prod(count for begin, end, count in loops if begin <= op.start() < end)
        found.append(Found(kind, k, sent * trips))
    return found


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
