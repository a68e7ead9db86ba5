from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from meteora_dist.adapters.header import TensorInfo, read_header
from meteora_dist.errors import AdapterError, BankError

# a: 2 x 3 fp32 = bytes 0 to 24; b: 4 bf16 = bytes 24 to 32
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def raw(header: Any, data: bytes = bytes(32)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def put(folder: Path, content: bytes) -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    return path


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    header = read_header(path)
    assert header.tensors == {"a": TensorInfo("F32", (2, 3), 0, 24), "b": TensorInfo("BF16", (4,), 24, 32)}
    assert header.metadata == {"format": "pt"}
    assert path.stat().st_size == header.data_start + 32


def test_empty_tensors_and_scalars_are_consistent(tmp_path: Path) -> None:
    path = put(tmp_path, save({"none": torch.zeros(0, 3), "one": torch.tensor(1.0)}))
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    assert shapes == {"none": (0, 3), "one": ()}


def test_a_header_length_that_looks_like_a_pickle_is_still_a_length(tmp_path: Path) -> None:
    text = json.dumps({"a": A, "b": B}).encode().ljust(0x0580)
    assert read_header(put(tmp_path, raw(text))).data_start == 8 + 0x0580
    assert raw(text).startswith(b"\x80\x05")


BROKEN = {
    "empty": (b"", "it has 0 bytes, fewer than the 8"),
    "short": (b"\x01\x02", "it has 2 bytes, fewer than the 8"),
    "header cut": (raw({"a": A, "b": B})[:20], "truncated: the header needs"),
    "data cut": (raw({"a": A, "b": B})[:-1], "truncated: the tensors need 32 bytes of data, the file has 31"),
    "data left over": (raw({"a": A, "b": B}, bytes(40)), "8 bytes at its end belong to no tensor"),
    "length out of bounds": (struct.pack("<Q", 2**40) + bytes(64), "a header of 1099511627776 bytes"),
    "text": (
        b"hello world, this is not a tensor file",
        "not a safetensors file: its first 8 bytes announce a header of",
    ),
    "torch archive": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(64), "a PyTorch archive \\(pickle\\), which is never read"),
    "pickle": (b"\x80\x02}q\x00." + bytes(64), "a pickle, which is never read"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "no JSON": (raw(b"{nope"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "no object": (raw(b"[1, 2]"), "does not start with '{'"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "huge number": (raw(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "NaN": (raw(b'{"a": NaN}'), "NaN is not a JSON value"),
    "twice": (raw(b'{"a": 1, "a": 2}'), "key 'a' occurs twice"),
    "metadata no text": (raw({"__metadata__": {"n": 1}, "a": A, "b": B}), "must map text to text"),
    "no dict": (raw({"a": 3}), "'a' must have dtype, shape and data_offsets"),
    "field missing": (raw({"a": {"dtype": "F32", "shape": [2, 3]}}), "'a' must have dtype, shape and data_offsets"),
    "field unknown": (raw({"a": {**A, "stride": 1}, "b": B}), "nothing else"),
    "dtype": (raw({"a": {**A, "dtype": "F33"}, "b": B}), "unknown dtype 'F33'"),
    "dtype no text": (raw({"a": {**A, "dtype": ["F32"]}, "b": B}), "unknown dtype"),
    "shape negative": (raw({"a": {**A, "shape": [-2, -3]}, "b": B}), "'a' has no valid shape"),
    "shape not whole": (raw({"a": {**A, "shape": [2.0, 3]}, "b": B}), "'a' has no valid shape"),
    "shape true": (raw({"a": {**A, "shape": [True, 6]}, "b": B}), "'a' has no valid shape"),
    "shape too long": (raw({"a": {**A, "shape": [1] * 17}, "b": B}), "'a' has no valid shape"),
    "offsets three": (raw({"a": {**A, "data_offsets": [0, 24, 24]}, "b": B}), "no valid data_offsets"),
    "offsets backwards": (raw({"a": {**A, "data_offsets": [24, 0]}, "b": B}), "takes 24 bytes"),
    "shape against offsets": (raw({"a": {**A, "shape": [2, 4]}, "b": B}), "takes 32 bytes, but .* hold 24"),
    "overlap": (
        raw({"a": A, "b": {**B, "data_offsets": [20, 28]}}),
        "'b' starts at byte 20 instead of 24: it overlaps",
    ),
    "gap": (
        raw({"a": A, "b": {**B, "data_offsets": [28, 36]}}),
        "'b' starts at byte 28 instead of 24: it leaves a gap",
    ),
    "same place twice": (raw({"a": A, "c": A}, bytes(24)), "it overlaps"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_with_the_reason(tmp_path: Path, case: str) -> None:
    content, reason = BROKEN[case]
    path = put(tmp_path, content)
    with pytest.raises(AdapterError, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_raises_the_error_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"there is no such file"):
        read_header(tmp_path / "none", BankError)
    with pytest.raises(BankError, match=r"there is no such file"):
        read_header(tmp_path, BankError)


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALID = save({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, {"k": "v"})


def refuse_or_agree_with_the_library(path: Path) -> None:
    """What passes must be what the safetensors library sees; everything else is an AdapterError and nothing else."""
    try:
        header = read_header(path)
    except AdapterError:
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.tensors)
        for name, info in header.tensors.items():
            assert tuple(file.get_slice(name).get_shape()) == info.shape


@FUZZ
@given(st.binary(max_size=200))
def test_random_bytes_never_crash_it(tmp_path: Path, content: bytes) -> None:
    refuse_or_agree_with_the_library(put(tmp_path, content))


@FUZZ
@given(st.binary(max_size=120), st.binary(max_size=16))
def test_random_headers_of_the_right_length_never_crash_it(tmp_path: Path, text: bytes, data: bytes) -> None:
    refuse_or_agree_with_the_library(put(tmp_path, raw(b"{" + text + b"}", data)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 32), min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), ENTRY | JSON, max_size=3), st.integers(0, 32))
def test_random_entries_never_crash_it(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    refuse_or_agree_with_the_library(put(tmp_path, raw(header, bytes(size))))


@FUZZ
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.integers(0, len(VALID)))
def test_damaged_files_never_crash_it(tmp_path: Path, position: int, byte: int, length: int) -> None:
    damaged = bytearray(VALID)
    damaged[position] = byte
    refuse_or_agree_with_the_library(put(tmp_path, bytes(damaged)))
    refuse_or_agree_with_the_library(put(tmp_path, bytes(damaged[:length])))
