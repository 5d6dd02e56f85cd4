"""The probe: positive, steady figures from the real library, and limits that follow from them."""

import pytest

from strop.machine.probe import KernelClock, MachineRates, probe, read_bandwidth_bytes_per_s
from strop.ops import native

RATES = MachineRates("any", 2, 1000, {"int8": 400.0, "bf16": 200.0, "f32": 100.0}, 50.0, 60.0)


def test_limit_is_the_longer_of_compute_and_memory():
    assert RATES.limit_s({"int8": 800.0}, 30.0) == 2.0
    assert RATES.limit_s({"int8": 800.0, "f32": 100.0}, 30.0) == 3.0
    assert RATES.limit_s({"int8": 800.0}, 240.0) == 4.0  # by the faster kind of pages


def test_the_higher_figure_wins():
    other = MachineRates("any", 2, 1000, {"int8": 300.0, "bf16": 250.0, "f32": 100.0}, 55.0, 10.0)
    best = RATES.better_of(other)
    assert best.flops_per_s == {"int8": 400.0, "bf16": 250.0, "f32": 100.0}
    assert (best.read_bytes_per_s, best.read_huge_bytes_per_s) == (55.0, 60.0)


@pytest.mark.parametrize(("num_bytes", "num_threads"), [(0, 1), (-5, 1), (4096, 0)])
def test_nothing_to_probe(num_bytes, num_threads):
    with pytest.raises(ValueError, match="nothing to probe"):
        probe(None, num_bytes, num_threads)


@pytest.fixture(scope="module")
def library():
    loaded = native.library()
    if loaded is None or not hasattr(loaded, "strop_probe_rate"):
        pytest.skip("no native library")
    return loaded


def test_real_figures_are_plausible(library):
    rates = probe(library, 1 << 20, 1, seconds=0.1)
    assert rates.isa == native.isa()
    flops = rates.flops_per_s
    # A core at 0.1 to 10 GHz doing 1 to 1000 operations a cycle; a compiler that drops the work shows as far more.
    assert all(1e8 < rate < 1e13 for rate in flops.values())
    assert 0.5 * flops["f32"] < flops["bf16"] <= 1.5 * flops["int8"]
    assert all(1e8 < rate < 1e13 for rate in (rates.read_bytes_per_s, rates.read_huge_bytes_per_s))


def test_a_working_set_smaller_than_a_chunk_works(library):
    assert probe(library, 1, 2, seconds=0.05).best_read_bytes_per_s > 0


def test_impossible_arguments_give_nothing(library):
    assert library.strop_probe_rate(7, 1, 0.01) == 0
    assert library.strop_probe_bandwidth(-1, 1, 0.01, 0) == 0
    assert library.strop_probe_bandwidth(1 << 62, 1, 0.01, 0) == 0


def test_kernel_clock_stands_still_without_kernels(library):
    clock = KernelClock(library)
    assert clock.lap_s() == 0.0


@pytest.mark.parametrize("native_or_not", ["0", "1"])
def test_bandwidth_alone_with_and_without_the_library(monkeypatch, native_or_not):
    monkeypatch.setenv("STROP_NATIVE", native_or_not)
    assert 1e7 < read_bandwidth_bytes_per_s(1 << 20, 1, seconds=0.02) < 1e13
