"""The measurement of kernels compares equals, its checks can fail, and tuning finds the fastest."""

from __future__ import annotations

from dataclasses import asdict, replace
from unittest.mock import patch

import pytest
import torch

from meteora_dist.bench.kernel_checks import Finding, Sizes, check_kernels
from meteora_dist.bench.kernel_tuning import tuned, workload_seconds
from meteora_dist.bench.kernel_ways import BankLayer, ways_of
from meteora_dist.bench.kernels import KernelPlan, measure_kernels
from meteora_dist.planning.shapes import ModelShape
from meteora_kernels.launch import DEFAULT, Tiles, parse_table, tiles_of
from meteora_kernels.routed_lora import plan

SHAPE = ModelShape(hidden=8, mlp=12, layers=1, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
CPU = torch.device("cpu")
SMALL = replace(tiles_of("cpu"), splits=2, inputs=16, outputs=32, few_tokens=2)


def layer(experts: int = 5) -> BankLayer:
    return BankLayer.random(SHAPE, experts, 2, torch.float32, CPU, torch.Generator().manual_seed(0))


def test_all_routed_ways_compute_the_same() -> None:
    one = layer()
    inputs = [torch.randn(7, width, generator=torch.Generator().manual_seed(1)) for width in one.widths]
    ways = ways_of(one, 7, 2)
    with torch.no_grad():
        wanted, *others = (ways[name](inputs) for name in ways if name not in ("base", "one LoRA"))
        plain = ways["base"](inputs)
    for found in others:
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not any(torch.allclose(y, base) for y, base in zip(wanted, plain, strict=True))


def test_bytes_by_hand() -> None:
    one = layer(experts=3)
    inputs = [torch.zeros(1, width) for width in one.widths]
    # Inputs 8, 8, 8 and 12 wide; outputs 8, 4, 4, 8, 12, 12, 8; weights of all seven.
    read, written = 8 + 8 + 8 + 12, 8 + 4 + 4 + 8 + 12 + 12 + 8
    weights = 8 * (8 + 4 + 4) + 8 * 8 + 2 * 8 * 12 + 12 * 8
    assert one.bytes_moved("base", inputs, 2) == 4 * (read + written + weights)
    pair = 2 * (3 * 8 + 8 + 2 * 8 + 12 + written)
    assert one.bytes_moved("one LoRA", inputs, 2) - one.bytes_moved("base", inputs, 2) == 4 * pair
    gates = 3 * (3 * 8 + 8 + 2 * 8 + 12)
    assert one.bytes_moved("routed", inputs, 2) - one.bytes_moved("base", inputs, 2) == 4 * (2 * pair + gates)
    many = [torch.zeros(9, width) for width in one.widths]
    # Nine tokens cannot use more than the three experts there are.
    assert one.bytes_moved("gather", many, 2) - one.bytes_moved("base", many, 2) == 4 * (3 * pair + gates)


def test_rows_of_a_run() -> None:
    rounds: list[None] = []
    settings = KernelPlan("SmolLM2-135M", (1, 2), (3,), 2, 2, 1, 1, torch.float32, CPU)
    rows = measure_kernels(settings, lambda: rounds.append(None))
    ways = list(ways_of(layer(), 1, 2))
    assert ways[:5] == ["base", "one LoRA", "gather", "loop", "routed"]
    assert [(row.way, row.tokens) for row in rows] == [(way, tokens) for tokens in (1, 2) for way in ways]
    assert len(rounds) == settings.rounds
    assert all(row.of_base == 1 for row in rows if row.way == "base")
    assert all(row.milliseconds > 0 and row.floor_share > 0 for row in rows)


SIZES = Sizes(width=24, outputs=(20,), banks=(((4,), 3), ((4, 17, 1), 6)), tokens=(1, 3))


def test_checks_pass_on_the_interpreter() -> None:
    few_dense = replace(SMALL, dense_columns=16)
    with patch.object(plan, "runs_kernels", lambda _: True), patch.object(plan, "tiles_of", lambda _: few_dense):
        findings = check_kernels(CPU, [torch.float32], SIZES)
    assert [one for one in findings if not one.right] == []
    assert {one.check for one in findings} >= {"choice", "values", "values apart", "alone and in a batch"}


def test_a_wrong_kernel_is_found() -> None:
    def doubled(*arguments: object) -> tuple[torch.Tensor, ...]:
        return tuple(2 * delta for delta in original(*arguments))

    original = plan.routed_lora
    sizes = replace(SIZES, banks=SIZES.banks[:1], tokens=(1, 2))
    small = patch.object(plan, "tiles_of", lambda _: SMALL)
    with patch.object(plan, "runs_kernels", lambda _: True), small, patch.object(plan, "routed_lora", doubled):
        wrong = {one.check for one in check_kernels(CPU, [torch.float32], sizes) if not one.right}
    assert wrong >= {"values apart", "gradient of input"}
    assert not Finding("values", "", float("nan"), 1.0).right


def test_tuning_ends_at_the_fastest() -> None:
    def seconds(tiles: Tiles) -> float:
        # Eight warps only pay off with wide tiles, and do not fit at all with many splits.
        if tiles.warps == 8 and tiles.splits == 16:
            return float("inf")
        return abs(tiles.outputs - 256) + (10 if tiles.warps == 8 and tiles.outputs < 256 else 1 / tiles.warps)

    found = tuned(tiles_of(DEFAULT), {"warps": (2, 4, 8), "outputs": (64, 128, 256), "splits": (8, 16)}, seconds)
    assert (found.warps, found.outputs, found.splits) == (8, 256, 8)


def test_a_workload_takes_time() -> None:
    sizes = replace(SIZES, banks=SIZES.banks[:1], tokens=(1,))
    with patch.object(plan, "runs_kernels", lambda _: True):
        assert workload_seconds(CPU, SMALL, sizes, repeats=1) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": 3}, "splits of default is 3; it must be a power of two, at least 1"),
        ({"outputs": 8}, "at least 16"),
        ({"warp": 4}, "default must have"),
    ],
)
def test_a_table_that_no_kernel_can_take_is_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_table({DEFAULT: asdict(tiles_of(DEFAULT)) | change})
    with pytest.raises(ValueError, match="no row 'default'"):
        parse_table({"H100": asdict(tiles_of(DEFAULT))})
