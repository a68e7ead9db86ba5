"""A user's mistake ends any command with exit code 1 or 2 and a message that names it, never with a traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.cli.main import COMMANDS, Command
from tests.support.shell import Shell
from tests.support.tasks import write_tasks

MISTAKES = [
    ("fetch-demo extra", 2, "unexpected extra argument"),
    ("demo --bank NONE", 1, "DEMO FAILED"),
    ("serve --bank NONE --model BASE", 1, "there is no such folder"),
    ("serve --model NONE --bank BANK", 1, "NONE"),
    ("serve --ep 0 --bank BANK --model BASE", 1, "ep"),
    ("serve --http-port TAKEN --bank BANK --model BASE", 1, "is taken"),
    ("serve --http-port 99999 --bank BANK --model BASE", 1, "99999 is no port"),
    ("serve --http-port 8765 --grpc-port 8765 --bank BANK --model BASE", 1, "cannot both answer on port 8765"),
    ("serve --keys NONE --bank BANK --model BASE", 1, "NONE"),
    ("serve --config NONE", 1, "NONE"),
    ("check NONE", 1, "NONE"),
    ("check BASE", 1, "Is a directory"),
    ("check BASE/model.safetensors", 1, "model.safetensors"),
    ("check BANK/experts/plain/adapter_config.json", 1, "applications"),
    ("check", 2, "Missing argument"),
    ("plan --model nothing --experts 8 --rank 8", 1, "nothing"),
    ("plan --model Llama-3.1-8B --experts 8 --rank 8 --gpu-memory much", 1, "is no size"),
    ("plan --model Llama-3.1-8B --experts 8 --rank 8 --gpu-memory 1GiB", 1, "GiB"),
    ("keys new", 2, "--name"),
    ("keys new --name x --requests-per-minute 0", 1, "requests_per_minute"),
    ("eval --out OUT --bank BANK --model BASE --data BASE", 1, 'has no "examples"'),
    ("eval --out OUT --bank BANK --model BASE --data NONE", 1, "NONE"),
    ("eval --out BASE/config.json --bank BANK --model BASE --data TASKS", 1, "no such folder can be made"),
    ("eval --out OUT --method nothing", 1, "nothing"),
    ("eval --out OUT --adapter x", 1, "NAME=FOLDER"),
    ("train gates --base BASE --adapters NONE --data NONE --out OUT --run OUT2", 1, "holds no adapter"),
    ("train gates --base BASE --adapters BANK/experts --data NONE --out OUT --run OUT2", 1, "needs a data set"),
    ("train gates --base BASE --adapters BANK/experts --data BASE --out OUT --run OUT2 --set a", 1, "NAME=VALUE"),
    ("train gates --base BASE --adapters BANK/experts --data TASKS --out OUT --run BASE/config.json", 1, "is a file"),
    ("train gates --base BASE --adapters BANK/experts --data TASKS --out BASE/config.json/x --run OUT", 1, "no folder"),
    ("train moa --adapters NONE --base BASE --data NONE --out OUT --run OUT", 1, "NONE"),
    ("bench decode --bank NONE --model BASE", 1, "there is no such folder"),
    ("bench prefill --bank NONE --model BASE", 1, "there is no such folder"),
    ("bench scaling --bank NONE --model BASE", 1, "there is no such folder"),
    ("bench capacity --mesh wide", 2, "is no layout"),
    ("bench kernels --experts x", 2, "--experts"),
    ("bench gates --experts x", 2, "--experts"),
    ("bench serve nowhere", 1, "nowhere"),
    ("bench serve http://127.0.0.1:1/v1 --requests 1 --concurrency 1", 1, "ConnectError"),
    ("bench load --streams x", 2, "--streams"),
    ("bench frontend --bank NONE", 1, "there is no such folder"),
    ("bench chaos --bank NONE", 1, "there is no such folder"),
    ("report bench NONE", 1, "No such file"),
    ("report routing --bank NONE", 1, "there is no such folder"),
    ("report routing --model NONE --bank BANK --data TASKS", 1, "NONE: there is no such folder"),
    ("chat --url nowhere", 1, "must start with http"),
    ("trace q --url nowhere", 1, "must start with http"),
    ("doctor --http-port 0", 2, "--http-port"),
]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capfd)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_an_unknown_option(command: Command, shell: Shell) -> None:
    said = shell(*command.words, "--frobnicate")
    assert said.code == 2
    assert "--frobnicate" in said.flat


@pytest.mark.parametrize(("words", "code", "message"), MISTAKES, ids=[words for words, *_ in MISTAKES])
def test_a_mistake(
    words: str, code: int, message: str, tiny_bank: Bank, tiny_base: Path, tmp_path: Path, shell: Shell
) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        places = {"BANK": tiny_bank.path, "BASE": tiny_base, "TAKEN": listener.getsockname()[1]}
        if "TASKS" in words:
            places["TASKS"] = write_tasks(tmp_path / "tasks")
        for name, place in places.items():
            words = words.replace(name, str(place))
        said = shell(*words.split())
    assert said.code == code
    assert message in said.flat
    assert "Traceback" not in said.flat


def test_every_command_has_a_mistake() -> None:
    tried = [words.split() for words, *_ in MISTAKES]
    for command in COMMANDS:
        if command.words[0] != "bank":  # tests/cli/test_bank.py has them
            assert any(tuple(words[: len(command.words)]) == command.words for words in tried), command.words
