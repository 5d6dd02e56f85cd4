"""Rows, ratios, bars, interleaving, the choice of a peer's flags, and a worker peer end to end. No model, no device."""

import json
import sys
import textwrap

import pytest

from strop.bench.bars import check_bars, mark_coarse
from strop.bench.measure import first_token, interleave
from strop.bench.peers import Peer, find_peers
from strop.bench.peers.worker import WorkerPeer
from strop.bench.report import Report, Row, measured_row, render_bars, render_missing, render_rows, shares_above_one
from strop.bench.workloads import Workload, prompts, workloads
from strop.core.errors import StropError


class Scripted:
    """A contender that plays back values and writes down when it ran."""

    def __init__(self, name, values, log):
        self.name, self.values, self.log = name, iter(values), log

    def measure(self, workload):
        self.log.append(self.name)
        value = next(self.values)
        if value is None:
            raise StropError("out of order")
        return value


def test_contenders_take_turns_and_the_warm_up_does_not_count(tmp_path):
    log = []
    ours, peer = Scripted("strop", [1, 10, 20, 30], log), Scripted("peer", [9, 5, 8, 20], log)
    values, missing = interleave([ours, peer], Workload("decode", 1), 3, tmp_path)
    assert log == ["strop", "peer"] * 4
    assert values == {"strop": [10, 20, 30], "peer": [5, 8, 20]}
    assert missing == {}


def test_a_contender_that_fails_is_dropped_with_its_reason(tmp_path):
    ours, peer = Scripted("strop", [1, 1, 2], []), Scripted("peer", [7, 7, None], [])
    values, missing = interleave([ours, peer], Workload("decode", 1), 2, tmp_path)
    assert values == {"strop": [1, 2]}
    assert missing == {"peer": "out of order"}


def test_ratios_are_of_pairs_and_the_value_is_the_median():
    row = measured_row(Workload("decode", 8), "strop", {"strop": [10, 20, 60], "peer": [5, 8, 20]}, {})
    assert (row.name, row.params, row.value, row.unit) == ("decode", {"batch": 8}, 20, "tokens/s")
    assert row.peers == {"peer": 8}
    ratio = row.ratios["peer"]
    assert (ratio.median, ratio.low, ratio.high) == (2.5, 2.0, 3.0)


def test_workloads_keep_the_reports_order_and_name_their_amounts():
    chosen = workloads({"prefill", "decode", "rss"}, [1, 32])
    assert [(w.row, w.params) for w in chosen] == [
        ("decode", {"batch": 1}),
        ("decode", {"batch": 32}),
        ("prefill", {"tokens": 512}),
        ("prefill", {"tokens": 2048}),
        ("rss", {"batch": 1}),
    ]


def test_prompts_share_no_prefix_within_a_seed_or_between_seeds():
    all_prompts = prompts(8, 128, 1000, seed=1) + prompts(8, 128, 1000, seed=2)
    assert len({ids[:32] for ids in all_prompts}) == 16
    assert all(len(ids) == 128 and min(ids) >= 0 and max(ids) < 1000 for ids in all_prompts)
    assert prompts(2, 4, 50, seed=3) == prompts(2, 4, 50, seed=3)


def report_with(rows, coarse=()):
    report = Report("m", rows=rows, peers={name: {"coarse": True} for name in coarse})
    return report, {bar["name"] + " " + bar["at_least"]: bar for bar in check_bars(report)}


def row_of(name, amount, ours, **peers):
    values = {"strop": [ours]} | {
        peer.replace("_", " ").replace("llama", "llama.cpp"): [v] for peer, v in peers.items()
    }
    return measured_row(Workload(name, amount), "strop", values, {})


def test_bars_without_measurements_are_not_measured():
    _, bars = report_with([])
    assert len(bars) == 17
    assert {bar["met"] for bar in bars.values()} == {None}


def test_decode_bars_compare_with_the_same_file_and_with_q4_0():
    _, bars = report_with([row_of("decode", 1, 120.0, llama=100.0, other=119.0)])
    assert bars["decode, batch 1 1.2 x llama.cpp"]["met"] is True
    row = measured_row(
        Workload("decode", 1), "strop", {"strop": [119.0], "llama.cpp": [100.0], "llama.cpp q4_0": [120.0]}, {}
    )
    _, bars = report_with([row])
    assert bars["decode, batch 1 1.2 x llama.cpp"]["met"] is False
    assert bars["decode, batch 1 1.0 x llama.cpp q4_0"]["met"] is False


def test_a_coarse_peer_sets_no_bar():
    rows = [row_of("throughput", 32, 300.0, vllm=150.0, fast=1000.0)]
    _, bars = report_with(rows, coarse=["fast"])
    assert bars["throughput, batch 32 1.5 x the best peer"]["met"] is True
    _, bars = report_with(rows)
    assert bars["throughput, batch 32 1.5 x the best peer"]["met"] is False


def test_coarse_means_one_and_a_half_times_our_distance():
    fidelity = Row("fidelity", {"path": "prompt"}, 1e-3, "nat", peers={"llama.cpp": 1.4e-3, "vllm": 1.6e-3})
    report = Report("m", rows=[fidelity], peers={"llama.cpp": {"isa": "x"}})
    mark_coarse(report)
    assert report.peers == {"llama.cpp": {"isa": "x", "coarse": False}, "vllm": {"coarse": True}}


@pytest.mark.parametrize(("kl", "ratio", "met"), [(1.0e-3, 1.0, True), (1.3e-3, 1.0, False), (1.0e-3, 1.02, True)])
def test_fidelity_bars(kl, ratio, met):
    details = {"perplexity_ratio": {"mean": ratio, "low": ratio, "high": ratio}}
    row = Row("fidelity", {"path": "prompt"}, kl, "nat", peers={"llama.cpp": 1e-3}, details=details)
    _, bars = report_with([row])
    assert bars["fidelity, prompt: mean KL <= 1.1 x llama.cpp"]["met"] is met
    assert bars["fidelity, prompt: perplexity ratio <= 1.01"]["met"] is (ratio <= 1.01)


def test_share_start_and_overhead_bars():
    decode = row_of("decode", 1, 100.0)
    decode.share_of_limit = 0.8
    rows = [
        decode,
        Row("host_overhead", {"batch": 1}, 0.2, "ms"),
        Row("start", {"batch": 1}, 0.9, "s"),
        Row("help", {}, 0.3, "s"),
    ]
    _, bars = report_with(rows)
    assert bars["decode, batch 1: share of the limit 75 %"]["met"] is True
    assert bars["decode, batch 1: host overhead <= 0.15 ms"]["met"] is False
    assert bars["start to first token <= 1.0 s"]["met"] is True
    assert bars["strop --help <= 0.25 s"]["met"] is False


def test_a_share_above_one_is_found():
    good, bad = row_of("decode", 1, 1.0), row_of("decode", 8, 1.0)
    good.share_of_limit, bad.share_of_limit = 1.0, 1.01
    assert shares_above_one(Report("m", rows=[good, bad, row_of("start", 1, 1.0)])) == [bad]


def test_json_has_the_agreed_fields():
    row = row_of("prefill", 512, 4000.0, vllm=2000.0)
    row.share_of_limit, row.shares_of_limit = 0.5, [0.4, 0.5, 0.7]
    plain = json.loads(json.dumps(Report("m", rows=[row], versions={"strop": "0"}, machine={"isa": "x"}).as_json()))
    expected = {
        "name": "prefill",
        "params": {"tokens": 512},
        "value": 4000.0,
        "unit": "tokens/s",
        "share_of_limit": 0.5,
    }
    assert plain["rows"][0].items() >= (expected | {"peers": {"vllm": 2000.0}}).items()
    assert plain["versions"] == {"strop": "0"}
    assert plain["machine"] == {"isa": "x"}


def test_tables_show_values_coarseness_and_reasons():
    row = row_of("decode", 32, 3000.0, llama=500.0)
    row.missing = {"vllm": "no such file", "other": "other takes no part in decode"}
    row.share_of_limit, row.shares_of_limit = 0.5, [0.4, 0.5, 0.7]
    report = Report("m", rows=[row], peers={"llama.cpp": {"coarse": True}})
    report.bars = check_bars(report)
    assert "6.00x" in render_rows(report)
    assert "50% (40%-70%)" in render_rows(report)
    assert "llama.cpp (coarse)" in render_rows(report)
    assert render_missing(report) == "decode, batch 32: vllm: no such file"
    assert "NOT MET" not in render_bars(report)
    assert "not measured" in render_bars(report)


@pytest.fixture
def peers_directory(tmp_path):
    """A peer made of this interpreter and a stub of an engine."""
    stub = tmp_path / "stub"
    stub.mkdir()
    stub.joinpath("stub_engine.py").write_text(
        textwrap.dedent(
            """
            class Engine:
                vocab_size = 100
                def __init__(self, flags): self.flags = flags
                def describe(self): return {"version": "1", "isa": "stub"}
                def generate(self, prompts, num_tokens):
                    print("noise on standard output")
                    if self.flags["mode"] == "broken": raise ValueError("cannot")
                def logits(self, tokens):
                    import numpy as np
                    return {"logits": np.tile(np.array(tokens, np.float32)[:, None], (1, 3))}
            def load(weights, num_threads, flags): return Engine(flags)
            """
        )
    )
    programs = tmp_path / "bin"
    programs.mkdir()
    python = programs / "python"  # not a link: it would leave the virtual environment
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    tmp_path.joinpath("peers.toml").write_text(
        textwrap.dedent(
            f"""
            [engine.stub]
            adapter = "worker"
            module = "stub_engine"
            version = "1"
            install = "by hand"
            programs = "bin"
            environment_variable = "STROP_PEER_STUB"
            [engine.stub.environment]
            PYTHONPATH = "{stub}"
            [engine.stub.flags]
            decode = {{ mode = ["broken", "good"] }}
            [[peer]]
            name = "stub"
            engine = "stub"
            weights = "bin"
            [[peer]]
            name = "stub without weights"
            engine = "stub"
            weights = "nowhere"
            """
        )
    )
    return tmp_path


def test_unknown_and_absent_engines_are_named(tmp_path):
    with pytest.raises(StropError, match=r"'nothing' is unknown: choose from llama\.cpp, openvino, vllm"):
        find_peers(["nothing"], tmp_path, tmp_path / "m.gguf")
    with pytest.raises(StropError, match=r"(?s)llama\.cpp is not installed.*STROP_PEER_LLAMA_CPP.*To install it"):
        find_peers(["llama.cpp"], tmp_path, tmp_path / "m.gguf")


def test_broken_overrides_are_named(tmp_path):
    tmp_path.joinpath("peers.toml").write_text("[engine")
    with pytest.raises(StropError, match="not valid TOML"):
        find_peers(["vllm"], tmp_path, tmp_path / "m.gguf")


def test_a_worker_peer_from_its_own_table(peers_directory, caplog):
    (spec,) = find_peers(["stub"], peers_directory, peers_directory / "m.gguf")
    assert "stub without weights is left out" in caplog.text
    assert spec.candidates("throughput") == [{"mode": "broken"}, {"mode": "good"}]
    worker = WorkerPeer(spec, 1)
    try:
        assert worker.describe() == {"version": "1", "isa": "stub"}
        assert worker.measure(Workload("prefill", 64), {"mode": "good"}) > 0
        with pytest.raises(StropError, match="ValueError: cannot"):
            worker.measure(Workload("prefill", 64), {"mode": "broken"})
        assert worker.measure(Workload("start"), {"mode": "good"}) > 0
        assert worker.measure(Workload("rss"), {"mode": "good"}) > 1  # MiB
        import numpy as np

        (logits,) = worker.logits(np.array([[4, 5]], np.int32), one_by_one=False)
        assert logits.tolist() == [[4.0] * 3, [5.0] * 3]
    finally:
        worker.close()


class Tunable:
    """An adapter whose value is its flag."""

    def __init__(self):
        self.measured = []

    def describe(self):
        return {}

    def measure(self, workload, flags):
        self.measured.append(flags["mode"])
        return {"broken": 1.0, "good": 2.0}[flags["mode"]]

    def close(self):
        pass


def test_the_best_flags_are_searched_once_and_recorded(peers_directory):
    (spec,) = find_peers(["stub"], peers_directory, peers_directory / "m.gguf")
    record = peers_directory / "flags.json"
    for workload, best, found in ((Workload("decode", 8), "good", 2.0), (Workload("start"), "broken", 1.0)):
        first, again, elsewhere = Tunable(), Tunable(), Tunable()
        assert Peer(spec, first, record, "here").measure(workload) == found
        assert first.measured == ["broken", "broken", "good", "good", best]
        assert Peer(spec, again, record, "here").measure(workload) == found
        assert again.measured == [best]
        Peer(spec, elsewhere, record, "another machine").measure(workload)
        assert len(elsewhere.measured) == 5


def test_first_token_times_output_and_tells_failures():
    first_s, whole_s, peak_bytes = first_token([sys.executable, "-c", "print('x')"])
    assert 0 < first_s <= whole_s
    assert peak_bytes > 1 << 20
    with pytest.raises(StropError, match="ended with 3"):
        first_token([sys.executable, "-c", "import sys; print('x'); sys.exit(3)"])
    with pytest.raises(StropError, match="0 bytes"):
        first_token([sys.executable, "-c", "pass"])
