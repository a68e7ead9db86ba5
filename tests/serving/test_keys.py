"""The keys file: what it may say, and that it is read again when it changes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from meteora_dist.cli.main import build_app
from meteora_dist.errors import Forbidden, KeysError
from meteora_dist.serving.keys import ANONYMOUS, Caller, Keyring, key_digest, new_key, read_keys

HASH = key_digest("secret")


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    # File systems with coarse clocks would take two quick writes for one.
    os.utime(path, ns=(0, write.versions))  # type: ignore[attr-defined]
    write.versions += 1  # type: ignore[attr-defined]
    return path


write.versions = 1  # type: ignore[attr-defined]


def test_entries_are_read_from_yaml_and_json(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"name": "a", "sha256": HASH}, {"name": "b", "sha256": ["0" * 64, "1" * 64]}]))
    first, second = read_keys(path)
    assert (first.name, first.role, first.models, first.sha256) == ("a", "user", None, (HASH,))
    assert second.sha256 == ("0" * 64, "1" * 64)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[{name: a}]", r"0\.sha256: Field required"),
        ("[{name: a, sha256: secret}]", r"0\.sha256\.0: String should match"),
        (f"[{{name: a, sha256: '{HASH}', key: x}}]", r"0\.key: Extra inputs"),
        (f"[{{name: a, sha256: '{HASH}', role: root}}]", r"0\.role"),
        (f"[{{name: a, sha256: '{HASH}', requests_per_minute: 0}}]", "greater than 0"),
        (f"[{{name: a/b, sha256: '{HASH}'}}]", r"0\.name"),
        ("[{name: a, sha256: []}]", "at least 1 item"),
        (f"[{{name: a, sha256: '{HASH}'}}, {{name: a, sha256: '{'0' * 64}'}}]", "the name a is there more than once"),
        (f"[{{name: a, sha256: '{HASH}'}}, {{name: b, sha256: '{HASH}'}}]", "is there more than once"),
        ("keys: []", "valid tuple"),
        ("", "valid tuple"),
        ("[", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_damaged_file_is_refused_with_its_fault(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(KeysError, match=says):
        read_keys(path)


def test_a_key_is_found_by_its_digest_alone(tmp_path: Path) -> None:
    ring = Keyring(write(tmp_path / "keys", {"name": "a", "sha256": HASH}))
    found = ring.find("secret")
    assert found is not None
    assert found.name == "a"
    for wrong in ("", "Secret", "secret ", HASH):
        assert ring.find(wrong) is None
    almost = HASH[:-1] + ("0" if HASH[-1] != "0" else "1")
    assert Keyring(write(tmp_path / "almost", {"name": "a", "sha256": almost})).find("secret") is None


def test_keys_are_replaced_without_a_restart_both_valid_meanwhile(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    old, new = new_key(), new_key()
    ring = Keyring(write(path, {"name": "a", "sha256": key_digest(old)}), lambda: now[0])
    write(path, {"name": "a", "sha256": [key_digest(old), key_digest(new)]})
    assert ring.find(new) is None, "looks at most once a second"
    now[0] = 1.0
    assert ring.find(old) == ring.find(new) is not None
    write(path, {"name": "a", "sha256": key_digest(new)})
    now[0] = 2.0
    assert ring.find(old) is None
    assert ring.find(new) is not None


@pytest.mark.parametrize("damage", ["content", "gone"])
def test_a_broken_new_file_keeps_the_keys_and_says_so_once(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, now = tmp_path / "keys", [0.0]
    ring = Keyring(write(path, {"name": "a", "sha256": HASH}), lambda: now[0])
    if damage == "content":
        write(path, {"name": "a"})
    else:
        path.unlink()
    with caplog.at_level(logging.ERROR):
        for now[0] in (1.0, 2.0, 3.0):
            assert ring.find("secret") is not None
    assert len(caplog.records) == 1
    assert "the keys stay as they were" in caplog.text
    write(path, {"name": "b", "sha256": HASH})
    now[0] = 4.0
    found = ring.find("secret")
    assert found is not None
    assert found.name == "b"


def test_a_secret_that_is_swapped_by_a_link_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes updates a mounted Secret."""
    for folder, name in (("first", "a"), ("second", "b")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "keys", {"name": name, "sha256": HASH})
    link, now = tmp_path / "data", [0.0]
    link.symlink_to("first")
    ring = Keyring(link / "keys", lambda: now[0])
    (tmp_path / "next").symlink_to("second")
    (tmp_path / "next").rename(link)
    now[0] = 1.0
    found = ring.find("secret")
    assert found is not None
    assert found.name == "b"


def test_an_allow_list_names_every_model_modes_too() -> None:
    caller = Caller(name="a", models=("auto", "wide"))
    caller.demand("wide")
    caller.demand("auto", "wide")
    for models in (("base",), ("wide", "plain"), ("auto-sequence",)):
        with pytest.raises(Forbidden, match=f"may not use the model '{models[-1]}'"):
            caller.demand(*models)
    ANONYMOUS.demand("auto", "anything")
    with pytest.raises(Forbidden, match="administrator"):
        ANONYMOUS.demand_admin()
    Caller(name="root", role="admin").demand_admin()


def test_new_keys_differ_and_their_entry_can_be_used(tmp_path: Path) -> None:
    words = ["keys", "new", "--name", "search", "--model", "auto", "--model", "wide", "--requests-per-minute", "60"]
    result = CliRunner().invoke(build_app(words), words)
    path = tmp_path / "keys.yaml"
    path.write_text(result.output)
    key = next(word for word in result.output.split() if word.startswith("mk-"))
    (entry,) = read_keys(path)
    assert entry.sha256 == (key_digest(key),)
    assert (entry.name, entry.role, entry.models, entry.requests_per_minute) == ("search", "user", ("auto", "wide"), 60)
    assert yaml.safe_load(result.output)[0].keys() == {"name", "sha256", "role", "models", "requests_per_minute"}
    assert key != new_key() != new_key()
    words.append("--json")
    made = json.loads(CliRunner().invoke(build_app(words), words).output)
    assert made["entry"].pop("sha256") == key_digest(made["key"])
    assert made["entry"] == {
        name: value for name, value in yaml.safe_load(result.output)[0].items() if name != "sha256"
    }


def test_a_caller_is_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        Caller(name="a", model="auto")  # type: ignore[call-arg]
