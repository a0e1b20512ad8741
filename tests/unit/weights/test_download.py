"""`lightning-npu-tp download` against a small hub on this machine.

Catches copies of the weights in other formats that are fetched too, a broken-off file that is taken for a whole one,
whole files that are fetched again, changed bytes that nobody notices, a server that never ends or never answers, and
errors that do not say what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import typer
from huggingface_hub import constants
from typer.testing import CliRunner

from lightning_npu_tp.checkpoint.locks import hold
from lightning_npu_tp.tools.commands.download_command import download
from lightning_npu_tp.weights import hub_download as downloading

SHA = "0123456789abcdef0123456789abcdef01234567"
BIG = bytes(range(256)) * 2000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "model-00001-of-00002.safetensors": BIG,
    "model-00002-of-00002.safetensors": BIG[::-1],
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sp",
    "LICENSE": b"text",
    "README.md": b"text",
    "pytorch_model.bin": b"x" * 10,
    "model.fp16.safetensors": b"x" * 10,
    "consolidated.00.pth": b"x",
    "q4.gguf": b"x",
    "onnx/model.onnx": b"x",
    "onnx/config.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
}
NEEDED = sorted(list(FILES)[:8])


class Hub(NamedTuple):
    """A server on this machine.

    files, served: what it says it has, and what it sends. requests: (method, file, Range header). cut: file -> bytes
    after which the connection breaks. tokens: (file, token or None) of every request for content; moved: files whose
    content lies on another server, and its address.
    """

    address: str
    files: dict[str, bytes]
    served: dict[str, bytes]
    requests: list[tuple[str, str, str | None]]
    cut: dict[str, int]
    tokens: list[tuple[str, str | None]]
    moved: dict[str, str]


def handler_of(
    files: dict[str, bytes],
    served: dict[str, bytes],
    requests: list,
    cut: dict[str, int],
    tokens: list[tuple[str, str | None]],
    moved: dict[str, str],
) -> type:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", headers.pop("length", str(len(body))))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith("/api/models/"):
                return self.tell(path.removeprefix("/api/models/"))
            name = path.split(f"/resolve/{SHA}/")[-1]
            wanted = self.headers.get("Range")
            requests.append((self.command, name, wanted))
            if name not in served:
                return self.refuse(404, "EntryNotFound")
            body, told = served[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X_Repo_Commit": SHA}
            if self.command == "HEAD":
                self.send_response(302 if name in moved else 200)
                if name in moved:
                    self.send_header("Location", f"{moved[name]}{path}")
                for key, value in told.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(files[name])))
                return self.end_headers()
            tokens.append((name, self.headers.get("Authorization")))
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            part = body[first:]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if name in cut:
                self.wfile.write(part[: cut[name]])
                self.wfile.flush()
                self.close_connection = True
                return None
            self.wfile.write(part)
            return None

        do_HEAD = do_GET

        def tell(self, path: str) -> None:
            repo, _, revision = path.partition("/revision/")
            if repo == "owner/gated":
                return self.refuse(403, "GatedRepo")
            if repo not in ("owner/model", "owner/pickled"):
                return self.refuse(401, "RepoNotFound")
            if revision not in ("", "main", SHA):
                return self.refuse(404, "RevisionNotFound")
            siblings: list[dict[str, Any]] = []
            for name, content in files.items():
                if repo == "owner/pickled" and name.endswith(".safetensors"):
                    continue
                entry = {"rfilename": name, "size": len(content)}
                if len(content) > 1000:
                    entry["lfs"] = {
                        "sha256": hashlib.sha256(content).hexdigest(),
                        "size": len(content),
                        "pointerSize": 1,
                    }
                if b"no_hash" in content:
                    siblings.append(entry)
                    continue
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                siblings.append(entry)
            self.answer(200, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode())

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.close_session()
    files, served = dict(FILES), dict(FILES)
    requests, cut, tokens, moved = [], {}, [], {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(files, served, requests, cut, tokens, moved))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Hub(f"http://127.0.0.1:{server.server_address[1]}", files, served, requests, cut, tokens, moved)
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(download)
    return CliRunner().invoke(app, list(arguments))


def test_only_what_loading_needs_is_fetched_and_shown_before(hub: Hub, tmp_path: Path) -> None:
    seen = command("owner/model", str(tmp_path / "model"), "--endpoint", hub.address, "--dry-run")
    assert seen.exit_code == 0 and not (tmp_path / "model").exists()
    assert (
        "model-00001-of-00002.safetensors" in seen.output and "8 files of the repository are not needed" in seen.output
    )
    done = command("owner/model", str(tmp_path / "model"), "--endpoint", hub.address)
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in (tmp_path / "model").iterdir() if file.is_file()) == NEEDED
    assert all((tmp_path / "model" / name).read_bytes() == FILES[name] for name in NEEDED)
    assert "8 files of owner/model, all verified" in done.output
    hub.requests.clear()
    assert command("owner/model", str(tmp_path / "model"), "--endpoint", hub.address).exit_code == 0
    assert hub.requests == [], "files that are there and right were asked for again"


def test_a_broken_connection_is_told_and_the_next_call_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00001-of-00002.safetensors"
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.cut[name] = 0
    hub.served[name] = BIG[:100_000]
    first = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert first.exit_code == 1 and "go on with the files that are missing" in first.output and name in first.output
    assert not (tmp_path / name).exists(), "a part under the file's own name would be taken for the whole"
    hub.cut.clear()
    hub.served.update(FILES)
    hub.requests.clear()
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 0, done.output
    assert (tmp_path / name).read_bytes() == BIG
    assert not any(method == "GET" and file < name for method, file, _ in hub.requests), "whole files came again"


def test_a_connection_that_breaks_once_is_gone_on_with_where_it_broke(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00001-of-00002.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: hub.cut.clear())
    hub.cut[name] = 300_000
    assert command("owner/model", str(tmp_path), "--endpoint", hub.address).exit_code == 0
    assert ("GET", name, "bytes=300000-") in hub.requests and (tmp_path / name).read_bytes() == BIG


def test_what_a_killed_call_left_is_removed(hub: Hub, tmp_path: Path) -> None:
    left = tmp_path / ".cache/huggingface/download/abc.0123abcd.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of a file")
    assert command("owner/model", str(tmp_path), "--endpoint", hub.address).exit_code == 0
    assert not left.exists()


def test_a_server_that_goes_on_sending_is_left_at_the_listed_size(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model-00001-of-00002.safetensors"
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.served[name] = BIG * 40
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 1 and name in done.output
    assert f"sends more than the {len(BIG):,} bytes that the hub names" in done.output
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.stat().st_size > len(BIG)]


@pytest.mark.parametrize("silent", ["the list", "a file"])
def test_a_silent_server_is_told(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if silent == "a file":
            hub.moved["config.json"] = address
        done = command("owner/model", str(tmp_path), "--endpoint", address if silent == "the list" else hub.address)
    finally:
        listener.close()
    assert done.exit_code == 1 and "cannot be reached, or broke off" in done.output and "Timeout" in done.output
    assert ("while fetching config.json" in done.output) == (silent == "a file")


def test_two_downloads_into_one_folder_are_told_of_each_other(hub: Hub, tmp_path: Path) -> None:
    with hold(tmp_path / "model", "downloading"):
        done = command("owner/model", str(tmp_path / "model"), "--endpoint", hub.address)
    assert done.exit_code == 1 and f"process {os.getpid()} of this host" in done.output
    assert "is downloading it. Wait until it is done" in done.output and hub.requests == []


def test_only_what_has_a_hash_is_called_verified(hub: Hub, tmp_path: Path) -> None:
    hub.files["config.json"] = hub.served["config.json"] = b'{"no_hash": 1}'
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 0 and "config.json: 14 bytes, its size is right, the hub gives no hash" in done.output
    assert "8 files of owner/model, 7 of them verified" in done.output


class StandIn:
    """modelscope_hub 0.5.1 by the signatures that are used of it; the library itself is not installed for tests."""

    class HubError(Exception):
        pass

    class NotExistError(HubError):
        pass

    class AuthenticationError(HubError):
        pass

    class PermissionDeniedError(HubError):
        pass

    def __init__(self) -> None:
        self.served, self.fetched, self.said = dict(FILES), [], []
        self.errors = self
        self.__name__ = "modelscope_hub"

    def HubApi(self, config: Any = None, *, endpoint: str | None = None, token: str | None = None) -> StandIn:
        self.said.append((endpoint, token))
        return self

    def list_repo_files(
        self, repo_id: str, repo_type: str, *, revision: str | None = None, recursive: bool = True
    ) -> list[Any]:
        assert repo_type == "model" and revision == "master"
        if repo_id != "owner/model":
            raise self.NotExistError("no such model")
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items() if name != "LICENSE"}
        return [
            SimpleNamespace(path=name, size=len(content), sha256=hashes.get(name), type="blob")
            for name, content in FILES.items()
        ] + [SimpleNamespace(path="onnx", size=0, sha256=None, type="tree")]

    def download_file(
        self,
        repo_id: str,
        repo_type: str,
        file_path: str,
        *,
        revision: str | None = None,
        local_dir: Any = None,
        force: bool = False,
        expected_sha256: str | None = None,
        file_size: int | None = None,
    ) -> Path:
        assert (repo_type, revision, force, file_size) == ("model", "master", True, len(FILES[file_path]))
        if file_path not in self.served:
            raise OSError("it broke off")
        self.fetched.append(file_path)
        (local_dir / file_path).write_bytes(self.served[file_path])
        return local_dir / file_path


def test_modelscope_is_listed_and_verified_like_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = StandIn()
    monkeypatch.setitem(sys.modules, "modelscope_hub", library)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ask = ("owner/model", str(tmp_path / "m"), "--from", "modelscope")
    assert command(*ask, "--dry-run").exit_code == 0 and library.fetched == []
    done = command(*ask)
    assert done.exit_code == 0 and "8 files of owner/model, 7 of them verified" in done.output, done.output
    assert sorted(library.fetched) == NEEDED and {endpoint for endpoint, _ in library.said} == {None}
    name = "model-00002-of-00002.safetensors"
    library.served[name] = b"!" + FILES[name][1:]
    (tmp_path / "m" / name).unlink()
    done = command(*ask)
    assert done.exit_code == 1 and "its hash differs" in done.output and not (tmp_path / "m" / name).exists()
    del library.served[name]
    done = command(*ask)
    assert done.exit_code == 1 and f"broke off while fetching {name} (OSError: it broke off)" in done.output
    done = command("owner/absent", *ask[1:])
    assert done.exit_code == 2 and "was not found at ModelScope" in done.output
    done = command(*ask[:3], "elsewhere")
    assert done.exit_code == 2 and "--from elsewhere is no hub" in done.output
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    done = command(*ask)
    assert done.exit_code == 2 and "pip install 'lightning-npu-tp[modelscope]'" in done.output


def test_changed_bytes_are_found_and_named(hub: Hub, tmp_path: Path) -> None:
    name = "model-00002-of-00002.safetensors"
    hub.served[name] = b"!" + FILES[name][1:]
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 1 and name in done.output and "its hash differs" in done.output
    assert not (tmp_path / name).exists()
    hub.served["config.json"] = b'{"model_type": "LLAMA"}'
    (tmp_path / "config.json").unlink()
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 1 and "config.json is not what the hub says" in done.output
    hub.served.update(FILES)
    assert command("owner/model", str(tmp_path), "--endpoint", hub.address).exit_code == 0
    # Damaged after it was fetched, of the same size: the hub's client would take it for good.
    (tmp_path / name).write_bytes(b"!" + FILES[name][1:])
    assert command("owner/model", str(tmp_path), "--endpoint", hub.address).exit_code == 0
    assert (tmp_path / name).read_bytes() == FILES[name]


def test_what_does_not_fit_is_refused_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = command("owner/model", str(tmp_path / "model"), "--endpoint", hub.address)
    assert done.exit_code == 2 and "and 1,000 are free there" in done.output
    assert hub.requests == []


def test_an_index_that_names_an_absent_file_is_told(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model-00002-of-00002.safetensors"]
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address)
    assert done.exit_code == 1 and "does not hold: model-00002-of-00002.safetensors" in done.output


def test_every_refusal_says_what_to_do(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, complaint in (
        (["owner/gated"], 2, "is gated: accept its terms"),
        (["owner/absent"], 2, "was not found"),
        (["owner/model", "--revision", "v9"], 2, "no such revision"),
        (["owner/pickled"], 2, "holds no safetensors, only .bin, .gguf, .onnx, .pth"),
        (["a/b/c"], 2, "a/b/c"),
        (["owner/model", "--token-env", "NOBODY_SET_THIS"], 2, "no such variable"),
    ):
        done = command(arguments[0], str(tmp_path / "x"), "--endpoint", hub.address, *arguments[1:])
        assert done.exit_code == code and complaint in done.output, (arguments, done.output)
        assert len(done.output.strip().splitlines()) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = command("owner/model", str(tmp_path / "x"), "--endpoint", hub.address)
    assert done.exit_code == 1 and "HF_HUB_OFFLINE" in done.output


def test_a_hub_that_is_not_there_is_told(hub: Hub, tmp_path: Path) -> None:
    done = command("owner/model", str(tmp_path), "--endpoint", "http://127.0.0.1:1")
    assert done.exit_code == 1 and "127.0.0.1:1 cannot be reached" in done.output and "--endpoint" in done.output


def test_variants_and_subfolders_are_not_needed() -> None:
    assert [name for name in FILES if downloading.is_wanted(name)] == [name for name in FILES if name in NEEDED]


def test_a_token_goes_to_the_hub_and_to_nobody_else(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model-00001-of-00002.safetensors"
    hub.moved[name] = hub.address.replace("127.0.0.1", "localhost")
    monkeypatch.setenv("MY_TOKEN", "hf_secret")
    done = command("owner/model", str(tmp_path), "--endpoint", hub.address, "--token-env", "MY_TOKEN")
    assert done.exit_code == 0, done.output
    assert dict(hub.tokens)[name] is None
    assert dict(hub.tokens)["config.json"] == "Bearer hf_secret"
