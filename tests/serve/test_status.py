"""What the page is told, and the share of the limit that Prometheus sees too."""

from http_client import ask
from server_process import metric, wait_until_idle

from strop import __version__
from strop.ops import native

BODY = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Count to a hundred."}],
    "max_tokens": 60,
    "seed": 1,
}


def test_the_card_is_the_models(server_url: str) -> None:
    status = ask(server_url, "/status").json
    assert status["trouble"] is None and status["uptime_s"] > 0
    card = status["card"]
    assert card["names"] == ["smollm2"] and card["version"] == __version__ and card["runner"] == "generate"
    assert card["context_tokens"] == card["request_tokens"] == 2048 and card["has_chat_template"]
    assert 50e6 < card["weight_bytes"] < 600e6 and "weights" in card["memory"]


def test_the_figures_are_those_of_what_happened(server_url: str) -> None:
    assert ask(server_url, "/v1/chat/completions", BODY).status == 200
    live = ask(server_url, "/status").json["live"]
    assert live["tokens_per_s"] > 0
    assert 0 < live["ttft_p50_s"] <= live["ttft_p95_s"]
    assert 0 < live["itl_p50_s"] <= live["itl_p99_s"]
    wait_until_idle(server_url)
    live = ask(server_url, "/status").json["live"]
    assert (live["num_running"], live["num_waiting"], live["cache_use"]) == (0, 0, 0)
    assert live["requests_per_minute"] > 0 and live["cost_per_request"] is None


def test_prefixes_looked_for_and_found_are_counted(server_url: str) -> None:
    def counts() -> tuple[float, ...]:
        wait_until_idle(server_url)
        names = ("prefix_cache_queries_total", "prefix_cache_hits_total", "iteration_tokens_total_sum")
        return tuple(metric(server_url, f"vllm:{name}") for name in names)

    body = {"model": "smollm2", "prompt": list(range(1000, 1100)), "max_tokens": 3}
    before = counts()
    for _ in range(2):
        reply = ask(server_url, "/v1/completions", body).json
    cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
    queries, hits, tokens = (now - then for now, then in zip(counts(), before, strict=True))
    assert queries == 200 and cached == hits > 50
    assert tokens == 200 - cached + 2 * 2  # the last token of an answer is not computed with


def test_the_share_of_the_limit_is_a_share(server_url: str) -> None:
    ask(server_url, "/v1/chat/completions", BODY)
    share = ask(server_url, "/status").json["live"]["share_of_limit"]
    if native.library() is None:
        assert share is None
    elif share is not None:  # the machine was too busy to be probed
        assert 0 < share < 2  # above 1 where it was so busy that the probe fell short
        assert abs(metric(server_url, "strop:share_of_limit") - share) < 0.2
    help_line = b"# HELP strop:share_of_limit"
    assert (help_line in ask(server_url, "/metrics").body) == (share is not None)
