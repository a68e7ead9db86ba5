"""``meteora bank`` as a user types it: what it prints, its exit codes, and that mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from tests.support.shell import Shell


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def adapter(bank: Bank, name: str) -> str:
    return f"{name}={bank.path / 'experts' / name}"


def test_build_add_remove_and_diff(tiny_bank: Bank, tiny_base: Path, tmp_path: Path, shell: Shell) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    said = shell("bank", "build", first, "--base", tiny_base, "--adapter", adapter(tiny_bank, "plain"), "--top-k", 1)
    assert said.code == 0
    assert said.out == f"{first}: generation 1, 1 experts (0 with rows of their own, 1 with prototypes), 14 gates\n"
    assert shell("bank", "add", first, adapter(tiny_bank, "wide"), "--out", second).code == 0
    assert Bank.open(second).names == ("plain", "wide")
    for words in (["pull", first], ["add", first, adapter(tiny_bank, "wide"), "--out"]):
        said = shell("bank", *words, tmp_path / words[0], "--json")
        made = Bank.open(tmp_path / words[0])
        assert json.loads(said.out) == {
            "bank": str(made.path),
            "generation": made.manifest.generation,
            "experts": list(made.names),
            "prototypes": list(made.names),
            "gates": 14,
            "routers": 0,
        }
    swapped = f"plain={tiny_bank.path / 'experts' / 'rooted'}"
    assert "the bank has an expert 'plain' already" in shell("bank", "add", second, swapped, "--out", third).err
    assert shell("bank", "add", second, swapped, "--replace", "--out", third).code == 0
    said = shell("bank", "diff", second, third)
    assert (said.code, said.out.splitlines()[0]) == (1, "generation: 2 -> 3")
    assert "~ plain: digest " in said.out
    found = json.loads(shell("bank", "diff", second, third, "--json").out)
    assert (found["same"], list(found["changed"])) == (False, ["plain"])
    fourth = tmp_path / "fourth"
    assert shell("bank", "remove", third, "plain", "--out", fourth).code == 0
    assert Bank.open(fourth).names == ("wide",)
    assert shell("bank", "diff", fourth, fourth).out == "no difference\n"


def test_build_takes_a_folder_of_adapters(tiny_bank: Bank, tiny_base: Path, tmp_path: Path, shell: Shell) -> None:
    out = tmp_path / "bank"
    said = shell(
        "bank", "build", out, "--base", tiny_base, "--adapters", tiny_bank.path / "experts", "--base-id", "tiny"
    )
    assert said.code == 0
    assert Bank.open(out).names == tuple(sorted(tiny_bank.names))
    assert Bank.open(out).manifest.base_model == "tiny"


def test_inspect(tiny_bank: Bank, shell: Shell) -> None:
    said = shell("bank", "inspect", tiny_bank.path)
    assert said.code == 0
    for text in ("tiny-llama", "linears 14", *tiny_bank.names, tiny_bank.digests[0][:8]):
        assert text in said.out
    facts = json.loads(shell("bank", "inspect", tiny_bank.path, "--json").out)
    rooted = next(one for one in facts["experts"] if one["name"] == "rooted")
    assert (rooted["rank"], rooted["rslora"], rooted["linears"], rooted["gate"]) == (4, True, 14, "trained")
    assert rooted["bytes"] == (tiny_bank.path / "experts/rooted/adapter_model.safetensors").stat().st_size
    assert facts["gates"]["digest"] == tiny_bank.manifest.gate_digest


def test_validate_names_a_flipped_byte(tiny_bank: Bank, tmp_path: Path, shell: Shell) -> None:
    copy = tmp_path / "bank"
    assert shell("bank", "pull", tiny_bank.path, copy).code == 0
    assert shell("bank", "validate", copy).out == f"{copy}: sound, 4 experts\n"
    weights = copy / "experts/wide/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    said = shell("bank", "validate", copy)
    assert said.code == 1
    assert said.err.startswith(f"error: {weights.parent}: the adapter's digest is ")
    said = shell("bank", "validate", copy, "--json")
    assert (said.code, json.loads(said.out)["sound"]) == (1, False)
    assert shell("bank", "inspect", copy).code == 0
    assert shell("bank", "diff", copy, tiny_bank.path).code == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("build OUT --base BASE", 2, "name at least one"),
        ("build OUT --base BASE --adapter plain", 2, "must be NAME=FOLDER"),
        ("build OUT --base BASE --adapter x=NONE", 1, "there is no such folder"),
        ("build OUT --base NONE --adapter x=BANK/experts/plain", 1, "cannot be read as a causal language model"),
        ("build BANK --base BASE --adapter x=BANK/experts/plain", 1, "exists already"),
        ("build OUT --base BASE --adapters BASE", 1, "holds no adapter"),
        ("build OUT --base BASE --adapters BANK/experts --adapter plain=BANK/experts/plain", 2, "is in"),
        ("build OUT --base BASE --adapter auto=BANK/experts/plain", 1, "is reserved"),
        ("inspect NONE", 1, "there is no such folder"),
        ("inspect BASE", 1, "bank.json: there is no such file"),
        ("validate NONE", 1, "bank.json: there is no such file"),
        ("validate BANK --model NONE", 1, "there is no such file"),
        ("diff BANK NONE", 2, "there is no such folder"),
        ("add BANK new=NONE --out OUT", 1, "there is no such folder"),
        ("add BANK x=BANK/experts/plain x=BANK/experts/wide --out OUT", 2, "is given more than once"),
        ("add BANK new=BANK/experts/plain", 2, "--out"),
        ("remove BANK nobody --out OUT", 1, "there is no expert 'nobody'"),
        ("remove BANK plain wide rooted partial --out OUT", 1, "a bank needs at least one"),
        ("pull NONE OUT", 1, "it has no bank.json"),
        ("pull hf://x OUT", 1, "write hf://owner/name"),
        ("pull BANK BANK", 1, "exists already"),
        ("import-reference NONE OUT --base BASE", 1, "there is no such file"),
        ("import-reference BASE OUT --base BASE", 1, "all names must begin with"),
        ("frobnicate", 2, "No such command"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    tiny_bank: Bank, tiny_base: Path, tmp_path: Path, shell: Shell, words: str, code: int, message: str
) -> None:
    places = {"BANK": tiny_bank.path, "BASE": tiny_base, "NONE": tmp_path / "none", "OUT": tmp_path / "out"}
    for name, path in places.items():
        words = words.replace(name, str(path))
    said = shell("bank", *words.split())
    assert said.code == code
    assert message in said.flat
    assert not (tmp_path / "out").exists()
