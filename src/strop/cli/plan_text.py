"""A plan in words and tables."""

from strop.cli.output import size
from strop.machine.catalog import THIS
from strop.plan.candidate import Candidate
from strop.plan.explain import explain
from strop.plan.latency import Placed
from strop.plan.search import Plan, describe, milliseconds

LEFT_ALIGNED = frozenset({"", "mesh", "weights", "prompts", "prompt layout", "decode layout", "binds"})
"""Columns of the frontier."""

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def number(value: float) -> str:
    """Of a few digits, without an exponent where people read it."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def chosen_facts(plan: Plan) -> list[tuple[str, str]]:
    """What to run, and what to expect of it."""
    one, traffic = plan.chosen, plan.wish.traffic
    rate = "" if traffic.rate_per_s is None else f", {traffic.rate_per_s:.4g} requests/s"
    network = one.model.network
    padding = ""
    if (heads := max(layer.attention.num_heads for layer in plan.wish.spec.layers)) != network.num_heads:
        padding = f"; query heads padded from {heads} to {network.num_heads}"
    context = one.longest_context_tokens
    own = plan.wish.spec.max_context_len
    return [
        ("traffic", f"{traffic.input_tokens:,} tokens in, {traffic.output_tokens:,} out{rate}"),
        ("run", f"{describe(one)}; {_copies(one, plan)}"),
        ("prompts", _prompts(one)),
        ("decode", f"{_layout(one, one.decode.placed)}{padding}"),
        ("TTFT", f"{milliseconds(one.ttft_s)} from when its turn comes"),
        ("ITL", f"{milliseconds(one.itl_s)} in the mean, {milliseconds(one.max_itl_s)} at most; step alone "
                f"{milliseconds(one.decode.seconds)}"),
        ("E2E", milliseconds(one.e2e_s)),
        ("throughput", f"{number(60 * one.requests_per_s)} requests/min, "
                       f"{number(one.requests_per_s * one.tokens_per_request)} tokens/s ("
                       f"{number(one.requests_per_s * traffic.output_tokens)} written), per copy that is full"),
        ("of the limit", f"MFU {one.mfu:.1%}, MBU of decode {one.mbu:.1%}"),
        ("binds", f"{one.binds} (decode), {one.prompt_binds} (prompts)"),
        ("cost", _cost(one)),
        ("memory", _memory(one)),
        ("largest context", f"{context:,} tokens at this batch, by memory"
                            + (f"; the model's own limit is {own:,}" if own < context else "")),
        ("figures", _source(plan)),
    ]  # fmt: skip


def _copies(one: Candidate, plan: Plan) -> str:
    unused = plan.wish.machines.num_devices - one.copies * one.num_devices
    copies = "1 copy" if one.copies == 1 else f"{one.copies} copies"
    return f"{copies}, {unused} device{'s' if unused > 1 else ''} left" if unused else f"{copies}, all devices in use"


def _prompts(one: Candidate) -> str:
    step, placed = one.prompt_pass, one.prompt.placed
    if one.passes_per_prompt > 1:
        what = f"in {one.passes_per_prompt} chunks of {step.new_tokens} tokens"
    else:
        what = "one whole prompt at a time" if step.batch == 1 else f"{step.batch} whole prompts at a time"
    return f"{what}, {_layout(one, placed)}, {milliseconds(one.prompt.seconds)} a pass"


def _layout(one: Candidate, placed: Placed | None) -> str:
    if placed is None or one.num_devices == 1:
        return "one device"
    return f"{placed.layout}, attention over {placed.sharding}"


def _cost(one: Candidate) -> str:
    per_million = 1e6 / one.tokens_per_request
    seconds = one.device_s_per_request
    text = f"{seconds:.4g} device-seconds per request, {number(seconds * per_million)} per million tokens"
    if one.cost_per_request is not None:
        money = one.cost_per_request
        text = f"{money:.3g} per request, {money * per_million:.4g} per million tokens; {text}"
    basis = "at full batches" if one.traffic.rate_per_s is None else "at the traffic's rate"
    return f"{text}, {basis}"


def _memory(one: Candidate) -> str:
    model = one.model
    parts = {
        "weights": model.weight_bytes,
        "cache": one.cache_bytes,
        "activations": one.activation_bytes,
        "runtime": model.runtime_bytes,
    }
    shown = ", ".join(f"{name} {size(round(num_bytes))}" for name, num_bytes in parts.items() if num_bytes)
    return f"{shown}; in all {size(round(one.memory_bytes))} of {size(round(model.usable_bytes))} of each device"


def _source(plan: Plan) -> str:
    """Where the figures come from, and what they leave out."""
    device = plan.wish.machines.device
    spare = "" if plan.wish.traffic.rate_per_s is None else "; a fifth of capacity is kept free"
    if device.name == THIS:
        return f"predicted from {device.sources['times']} of {device.title}{spare}"
    text = f"predicted, nothing was run; a tenth of memory is kept free{spare}"
    if device.name != "tpu-v4":
        text += f"; efficiencies are those fitted to TPU v4, not measured on {device.title}"
    if plan.chosen.model.weight_dtype == "int8":
        text += "; int8 weights change answers a little: measure that with `strop eval`"
    return text


def frontier_table(plan: Plan) -> Table:
    """A row for each configuration that none beats, but for those that are hardly cheaper than the one before."""
    has_price = plan.wish.price_per_device_hour is not None
    header = [
        "",
        "devices",
        "mesh",
        "weights",
        "batch",
        "prompts",
        "prompt layout",
        "decode layout",
        "TTFT",
        "ITL",
        "E2E",
    ]
    header += ["requests/min, a copy", "MFU", "MBU", "binds", "cost/M tokens" if has_price else "device-s/M tokens"]
    shown: list[Candidate] = []
    for one in plan.frontier:
        if one is plan.chosen or not shown or one.device_s_per_request < 0.99 * shown[-1].device_s_per_request:
            shown.append(one)
    rows = [_row(one, plan) for one in shown]
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]  # one device has no layouts
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _row(one: Candidate, plan: Plan) -> list[str]:
    prompts = (
        f"{one.prompt_pass.batch} whole" if one.passes_per_prompt == 1 else f"chunks of {one.prompt_pass.new_tokens}"
    )
    layouts = [
        "" if placed is None or one.num_devices == 1 else f"{placed.layout}/{placed.sharding}"
        for placed in (one.prompt.placed, one.decode.placed)
    ]
    cost = one.device_s_per_request if one.cost_per_request is None else one.cost_per_request
    return [
        "chosen" if one is plan.chosen else "",
        f"{one.num_devices}" + (f" x {one.copies}" if one.copies > 1 else ""),
        str(one.model.mesh) if one.num_devices > 1 else "",
        one.model.weight_dtype,
        str(one.batch),
        prompts,
        *layouts,
        *(milliseconds(seconds) for seconds in (one.ttft_s, one.itl_s, one.e2e_s)),
        f"{number(60 * one.requests_per_s)}",
        f"{one.mfu:.0%}",
        f"{one.mbu:.0%}",
        one.binds,
        number(1e6 * cost / one.tokens_per_request),
    ]


def card_tables(plan: Plan) -> list[tuple[str, Table]]:
    """The chosen configuration op by op, per device."""
    found = []
    for card in explain(plan.chosen):
        header = ["what", "times", "GFLOP", "memory", "sent", "time added", "share", "waits for"]
        rows = [
            [
                row.name,
                str(row.count),
                number(row.flops / 1e9) if row.flops else "",
                size(round(row.memory_bytes)) if row.memory_bytes else "",
                size(round(row.sent_bytes)) if row.sent_bytes else "",
                milliseconds(row.seconds),
                f"{row.seconds / card.seconds:.1%}",
                row.binds,
            ]
            for row in card.rows
        ]
        waits = ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in card.parts_s.items() if seconds)
        found.append((f"{card.title}: {milliseconds(card.seconds)} ({waits})", (header, rows)))
    return found
