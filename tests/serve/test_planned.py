"""A server that nobody gave budgets to: it measures the machine once, plans, and says what it took."""

import re
from pathlib import Path

from http_client import ask
from server_process import ServerProcess

_PLANNED = re.compile(r"planned for this machine: (\d+) sequences at once, prompts in chunks of (\d+) tokens")


def test_budgets_are_planned_for_this_machine(smollm2_path: Path, environment: dict[str, str], tmp_path: Path) -> None:
    def start(*options: object) -> ServerProcess:
        arguments = smollm2_path, "--name", "smollm2", "--context", 2048, *options
        found = ServerProcess(*arguments, environment=environment, log_path=tmp_path / f"log{len(options)}")
        return found

    first_log = ""
    for options in ((), ("--max-seqs", 3)):  # the second time nothing is measured, if nobody disturbed the first
        with start(*options) as server:
            server.ready()
            words = _PLANNED.search(server.log)
            assert words, server.log
            num_seqs, chunk = int(words[1]), int(words[2])
            assert num_seqs == 3 if options else num_seqs > 0
            assert 16 <= chunk <= 2048
            body = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
            assert ask(server.url, "/v1/completions", body).status == 200
            if "not kept" not in first_log:
                assert "measuring this machine" not in (server.log if options else "")
            first_log = first_log or server.log
