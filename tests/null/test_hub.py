"""Hub ids with the real huggingface_hub: a Hub of our own on this machine, its cache, and no network at all."""

import errno
import hashlib
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tiny_gguf import tiny_model

from strop.core.errors import CapacityError, FormatError, UnsupportedError
from strop.formats.checkpoint import open_checkpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.hf import HFCheckpoint
from strop.formats.hub import HubModel, choose_files, parse_hub_id

hub = pytest.importorskip("huggingface_hub")
constants = importlib.import_module("huggingface_hub.constants")

Files = dict[str, bytes]
WEIGHTS = save({"w": np.ones((2, 2), np.float32)})
FOLDER: Files = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "consolidated.safetensors": WEIGHTS,
    "pytorch_model.bin": b"\x80\x04.",
    "original/model.safetensors": WEIGHTS,
    "README.md": b"# model",
}
GGUF = tiny_model().build()
GGUFS: Files = {
    "name-Q4_K_M.gguf": GGUF,
    "name-Q4_K_S.gguf": GGUF,
    "mmproj-name-F16.gguf": GGUF,
    "BF16/name-BF16-00001-of-00002.gguf": GGUF,
    "BF16/name-BF16-00002-of-00002.gguf": GGUF,
}


@dataclass
class FakeHub:
    """Revisions of repositories, and what was asked for."""

    revisions: dict[str, dict[str, Files]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Repository -> the Hub's error code for it."""
    downloads: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, repo: str, revision: str) -> str:
        return next((f"{i:040x}" for i, name in enumerate(self.revisions[repo]) if revision in (name, f"{i:040x}")), "")

    def files(self, repo: str, commit: str) -> Files:
        return list(self.revisions[repo].values())[int(commit, 16)]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api":
            what, *revision_parts = parts[4:] or ["revision", "main"]
            repo, revision = "/".join(parts[2:4]), "/".join(revision_parts)
        else:
            repo, what, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repo in self.refused:
            return 403, {"X-Error-Code": self.refused[repo]}, b""
        if repo not in self.revisions:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.commit(repo, revision)
        if not commit:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.files(repo, commit)
        if what == "revision":
            return 200, {}, _json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
        if what == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in files.items()
            ]
            return 200, {}, _json(entries)
        content = files["/".join(parts[4:])]
        return 200, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}, content


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._respond(with_body=False)

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                fake.downloads.append(self.path.partition("?")[0].rpartition("/resolve/")[2].partition("/")[2])
            self._respond(with_body=True)

        def _respond(self, with_body: bool) -> None:
            status, headers, body = fake.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    fake.url = f"http://127.0.0.1:{http.server_port}"
    yield fake
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def fake(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The Hub with one folder in two revisions and one repository of GGUF files, and an empty cache."""
    newer = FOLDER | {"config.json": b'{"architectures": ["Qwen2ForCausalLM"]}'}
    server.revisions = {"some-org/folder": {"main": newer, "v1": FOLDER}, "some-org/ggufs": {"main": GGUFS}}
    server.refused = {}
    server.downloads.clear()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    return server


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def lose_the_network(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens on the discard port."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def test_a_folder_comes_without_pickles_and_other_layouts(fake: FakeHub) -> None:
    checkpoint = open_checkpoint("some-org/folder")
    assert isinstance(checkpoint, HFCheckpoint)
    assert checkpoint.config == {"architectures": ["Qwen2ForCausalLM"]}
    assert sorted(fake.downloads) == ["config.json", "model.safetensors", "tokenizer.json"]
    open_checkpoint("some-org/folder")
    assert len(fake.downloads) == 3


def test_what_sentence_transformers_adds_comes_too() -> None:
    wanted = ["1_Pooling/config.json", "2_Normalize/config.json", "config.json", "model.safetensors", "modules.json"]
    others = ["onnx/config.json", "1_Pooling/weights.bin", "README.md", "../1_Pooling/config.json"]
    found = choose_files([*wanted, "vocab.txt", *others], HubModel("org/name", None, None), where="org/name")
    assert found == [*wanted, "vocab.txt"]


def test_a_revision_is_honoured_online_and_from_the_cache(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_checkpoint("some-org/folder@v1")
    assert isinstance(old, HFCheckpoint) and old.config == {"architectures": ["LlamaForCausalLM"]}
    by_commit = open_checkpoint(f"some-org/folder@{1:040x}")
    assert by_commit.path == old.path
    go_offline(monkeypatch)
    assert open_checkpoint("some-org/folder@v1").path == old.path
    assert open_checkpoint(f"some-org/folder@{1:040x}").path == old.path
    with pytest.raises(
        FormatError, match=r"'some-org/folder' is no local path.*HF_HUB_OFFLINE is set.*once with a net"
    ):
        open_checkpoint("some-org/folder")


def test_without_a_network_the_cache_is_used(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = open_checkpoint("some-org/folder").path
    lose_the_network(fake, monkeypatch)
    assert open_checkpoint("some-org/folder").path == path
    with pytest.raises(FormatError, match=r"'other-org/folder' is no local path, not.* in the Hub's cache \(.*refused"):
        open_checkpoint("other-org/folder")


def test_a_partly_downloaded_snapshot_offline_names_what_is_missing(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors", "u": "model-3.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": _json(index)}
    weights = {f"model-{i}.safetensors": save({"wvu"[i - 1]: np.ones(2, np.float32)}) for i in (1, 2, 3)}
    fake.revisions["some-org/shards"] = {"main": files | weights}
    path = open_checkpoint("some-org/shards").path
    (path / "model-2.safetensors").unlink()
    (path / "model-3.safetensors").unlink()
    go_offline(monkeypatch)
    with pytest.raises(
        FormatError, match=r"2 of the 3 shards .* missing: 'model-2.safetensors', 'model-3.safetensors'"
    ):
        open_checkpoint("some-org/shards")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert set(open_checkpoint("some-org/shards").tensors) == {"u", "v", "w"}


@pytest.mark.parametrize("spelling", ["Q4_K_M", "q4_k_m"])
def test_a_gguf_type_picks_its_file(fake: FakeHub, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(f"some-org/ggufs:{spelling}")
    assert isinstance(checkpoint, GGUFCheckpoint) and checkpoint.path.name == "name-Q4_K_M.gguf"
    assert fake.downloads == ["name-Q4_K_M.gguf"]
    go_offline(monkeypatch)
    assert open_checkpoint(f"some-org/ggufs:{spelling}").path == checkpoint.path
    with pytest.raises(UnsupportedError, match=r"cache, offline, holds no GGUF models of type 'Q8_0'.*name-Q4_K_M"):
        open_checkpoint("some-org/ggufs:Q8_0")


def test_the_choice_among_ggufs_is_the_users(fake: FakeHub) -> None:
    with pytest.raises(UnsupportedError, match=r"holds 3 GGUF models; pass some-org/ggufs:TYPE.*name-Q4_K_S\.gguf"):
        open_checkpoint("some-org/ggufs")
    with pytest.raises(UnsupportedError, match="holds no GGUF files: pass some-org/folder without ':Q4_K_M'"):
        open_checkpoint("some-org/folder:Q4_K_M")


def test_all_parts_of_a_split_gguf_come_in_order() -> None:
    model = HubModel("some-org/ggufs", None, "BF16")
    parts = ["BF16/name-BF16-00001-of-00002.gguf", "BF16/name-BF16-00002-of-00002.gguf"]
    assert choose_files(reversed(GGUFS), model, "it") == parts
    with pytest.raises(UnsupportedError, match="3 GGUF models"):  # F16 is no end of BF16
        choose_files(GGUFS, HubModel("some-org/ggufs", None, None), "it")
    with pytest.raises(UnsupportedError, match="no GGUF models of type 'F16'"):
        choose_files(GGUFS, HubModel("some-org/ggufs", None, "F16"), "it")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA adapter"),
        (["model_index.json", "unet/diffusion.safetensors", "text_encoder/config.json"], "diffusion pipeline"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["params.json", "consolidated.00.pth", "tokenizer.model"], "maker's own layout"),
        (["config.json", "onnx/model.onnx"], "ONNX only"),
        (["tokenizer.json"], "only a tokenizer"),
        (["README.md"], "neither safetensors nor GGUF"),
    ],
)
def test_repositories_that_hold_something_else_are_not_downloaded(fake: FakeHub, files: list[str], words: str) -> None:
    fake.revisions["some-org/other"] = {"main": dict.fromkeys(files, b"{}")}
    with pytest.raises(UnsupportedError, match=f"some-org/other holds {'.*' + words}"):
        open_checkpoint("some-org/other")
    assert not fake.downloads


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "an encoder-decoder"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by 'hqq'"),
    ],
)
def test_what_the_config_rules_out_is_refused_before_the_weights_come(
    fake: FakeHub, config: dict[str, Any], words: str
) -> None:
    fake.revisions["some-org/large"] = {"main": {"config.json": _json(config), "model.safetensors": WEIGHTS}}
    with pytest.raises(UnsupportedError, match=f"some-org/large.*{words}"):
        open_checkpoint("some-org/large")
    assert fake.downloads == ["config.json"]


def test_gated_absent_and_unknown_are_told_apart(fake: FakeHub) -> None:
    fake.refused["some-org/folder"] = "GatedRepo"
    with pytest.raises(FormatError, match=r"'some-org/folder' is gated: accept .*/some-org/folder and log in"):
        open_checkpoint("some-org/folder")
    with pytest.raises(FormatError, match=r"'some-org/typo' is neither a local path nor .*hf auth login"):
        open_checkpoint("some-org/typo")
    with pytest.raises(FormatError, match=r"'some-org/ggufs' has no revision 'v9'.*commits/main"):
        open_checkpoint("some-org/ggufs@v9")


def test_a_full_disk_is_said(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    with pytest.raises(CapacityError, match=r"disk is full \(\d+ bytes free.*HF_HOME"):
        open_checkpoint("some-org/folder")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubModel("org/name", None, None)),
        ("org/na.me@v1.0", HubModel("org/na.me", "v1.0", None)),
        ("org/name@refs/pr/3:Q4_0", HubModel("org/name", "refs/pr/3", "Q4_0")),
        ("hf.co/org/name:IQ4_NL", HubModel("org/name", None, "IQ4_NL")),
        ("https://huggingface.co/org/name", HubModel("org/name", None, None)),
        ("name", None),
        ("org/name/more", None),
        ("org/name.gguf", None),
        ("org/name@", None),
        ("org/name:", None),
        ("../name", None),
        ("/org/name", None),
    ],
)
def test_hub_ids(text: str, expected: HubModel | None) -> None:
    assert parse_hub_id(text) == expected
    if expected is not None and "co/" not in text:
        assert str(expected) == text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match="pip install huggingface_hub"):
        open_checkpoint("some-org/model")
