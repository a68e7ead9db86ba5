"""Banks from elsewhere: whole and checked, or not there at all. The hub is a small server that speaks its API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from meteora_dist.bank import Bank
from meteora_dist.bank.diff import diff_banks
from meteora_dist.bank.pull import pull_bank
from meteora_dist.errors import BankError
from tests.bank.conftest import Parts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MEMORY = "memory://store/bank"


@pytest.fixture
def bank(parts: Parts, tmp_path: Path) -> Bank:
    return parts.write(tmp_path / "there" / "bank")


@pytest.fixture
def store(bank: Bank) -> Iterator[fsspec.AbstractFileSystem]:
    """An object store with the bank, and what else may lie there."""
    store = fsspec.filesystem("memory")
    store.put(str(bank.path), "/store/bank", recursive=True)
    store.pipe_file("/store/bank/experts/few/optimizer.bin", b"pickle")
    yield store
    store.rm("/store", recursive=True)


@pytest.mark.parametrize("place", ["{}", "file://{}", "{}/"])
def test_a_folder(bank: Bank, tmp_path: Path, place: str) -> None:
    progress: list[tuple[int, int]] = []
    pulled = pull_bank(place.format(bank.path), tmp_path / "here", lambda *done: progress.append(done))
    assert diff_banks(bank, pulled).same
    assert progress == [(done, 7) for done in range(1, 8)]


def test_a_store_gives_the_listed_files_and_no_others(
    bank: Bank, store: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    pulled = pull_bank(MEMORY, tmp_path / "here")
    assert diff_banks(bank, pulled).same
    files = {str(file.relative_to(pulled.path)) for file in pulled.path.rglob("*") if file.is_file()}
    assert files == {str(file.relative_to(bank.path)) for file in bank.path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("broken", ["missing", "damaged", "failing"])
def test_nothing_is_left_of_a_fetch_that_breaks_off(
    store: fsspec.AbstractFileSystem, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "/store/bank/experts/upper/adapter_model.safetensors"
    if broken == "missing":
        store.rm(file)
    elif broken == "damaged":
        content = bytearray(store.cat_file(file))
        content[-1] ^= 1
        store.pipe_file(file, bytes(content))
    else:
        get = type(store).get_file

        def failing(self: object, remote: str, local: str, **options: object) -> None:
            if remote.endswith("upper/adapter_model.safetensors"):
                raise ConnectionResetError("the line is dead")
            get(self, remote, local, **options)

        monkeypatch.setattr(type(store), "get_file", failing)
    place = tmp_path / "elsewhere" / "here"
    with pytest.raises(BankError, match=r"it has no experts/upper|digest|the line is dead"):
        pull_bank(MEMORY, place)
    assert list(place.parent.iterdir()) == []


def test_a_place_that_is_taken_and_sources_that_are_none(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="exists already"):
        pull_bank(str(bank.path), tmp_path)
    for source, message in (
        (str(tmp_path / "none"), "has no bank.json"),
        ("hf://only-a-name", "write hf://owner/name"),
        ("nonsense://x/y", "Protocol not known: nonsense"),
        ("s3://bucket/bank", "Install s3fs to access S3"),
        ("gs://bucket/bank", "gcsfs"),
    ):
        with pytest.raises(BankError, match=message):
            pull_bank(source, tmp_path / "here")


@pytest.fixture
def hub(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The hub with the bank in ``owner/banks`` below ``v1/``, at the revision ``main``; yields the paths asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            asked.append(self.path)
            start = f"/owner/banks/resolve/{COMMIT}/v1/"
            file = bank.path / self.path.removeprefix(start)
            if self.path == "/api/models/owner/banks/revision/main":
                self.reply(json.dumps({"id": "owner/banks", "sha": COMMIT}).encode(), body)
            elif self.path.startswith(start) and file.is_file():
                self.reply(file.read_bytes(), body)
            else:
                self.reply(b"{}", body, 404)

        def reply(self, content: bytes, body: bool, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound" if "resolve" in self.path else "RepoNotFound")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("huggingface_hub.constants.ENDPOINT", "huggingface_hub.hf_api.ENDPOINT"):
        monkeypatch.setattr(name, endpoint, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_hub_gives_all_files_of_one_commit(bank: Bank, hub: list[str], tmp_path: Path) -> None:
    pulled = pull_bank("hf://owner/banks@main/v1", tmp_path / "here")
    assert diff_banks(bank, pulled).same
    assert hub.count("/api/models/owner/banks/revision/main") == 1
    assert {path.split("/")[4] for path in hub if "/resolve/" in path} == {COMMIT}
    assert sorted(path.name for path in pulled.path.iterdir()) == ["bank.json", "experts", "gates.safetensors"]


def test_what_the_hub_does_not_have(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BankError, match="cannot be had: "):
        pull_bank("hf://owner/other@main/v1", tmp_path / "here")
    with pytest.raises(BankError, match=r"bank\.json cannot be had: "):
        pull_bank("hf://owner/banks@main/v2", tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(BankError, match="cannot be had: "):
        pull_bank("hf://owner/banks@main/v1", tmp_path / "here")
    assert not (tmp_path / "here").exists()
