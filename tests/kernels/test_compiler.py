"""Compiled libraries: made once, whole, for this processor; and what happens where they cannot be made."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from meteora_kernels import compiler
from meteora_kernels.routed_lora import plan
from meteora_kernels.routed_lora.cpu import operators as cpu
from tests.kernels.test_routed_lora import random_stack

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "answer.c"
    file.write_text("int answer(void) { return 42; }")
    return file


@needs_compiler
def test_one_library_a_source_however_many_build_it(source: Path) -> None:
    folder = source.parent / "cache" / "kernels"
    with ThreadPoolExecutor() as pool:
        answers = [library.answer() for library in pool.map(compiler.compiled, [source] * 4)]
    assert answers == [42] * 4
    assert [file.suffix for file in folder.iterdir()] == [".so"], "no half-made file is left"
    with patch.object(compiler, "_build", side_effect=AssertionError("it is there already")):
        compiler.compiled(source)
    source.write_text("int answer(void) { return 43; }")
    assert compiler.compiled(source).answer() == 43
    with patch.object(compiler, "processor", lambda: "another one"):
        compiler.compiled(source)
    assert len(list(folder.iterdir())) == 3


@needs_compiler
def test_a_source_that_does_not_compile_is_named(source: Path) -> None:
    source.write_text("int answer(")
    with pytest.raises(compiler.CannotCompile, match=r"answer\.c"):
        compiler.compiled(source)


@needs_compiler
def test_a_folder_that_others_may_write_to_is_not_trusted(source: Path) -> None:
    folder = source.parent / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(compiler.CannotCompile, match="no other may write"):
        compiler.compiled(source)


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(compiler.CannotCompile, match="no C compiler"):
        compiler.compiled(source)


@pytest.fixture
def anew() -> Iterator[None]:
    cpu.available.cache_clear()
    cpu._library.cache_clear()
    yield
    cpu.available.cache_clear()
    cpu._library.cache_clear()


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_torch_serves_and_the_log_says_so_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.delenv("CC", raising=False)
    stack = random_stack(torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        served = [plan.located(stack) for _ in range(2)]
    assert not any(plan.runs_compiled(one) for one in served)
    assert caplog.text.count("no C compiler") == 1
    ids_TNK = torch.tensor([[[0, 2], [1, 3]]])
    assert len(plan.routed_lora(torch.ones(1, 12), served[0], ids_TNK, torch.ones(1, 2, 2))) == 2


@needs_compiler
@pytest.mark.usefixtures("anew")
def test_a_library_that_computes_something_else_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with patch.object(cpu, "routed_lora_reference", lambda x_TH, *_: (torch.ones(len(x_TH), 37),)):
        assert not cpu.available()
    assert "something else than its twin" in caplog.text
