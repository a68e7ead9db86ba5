"""The bundles of a world, by hand."""

from __future__ import annotations

import pytest

from meteora_cluster.errors import PlacementError
from meteora_cluster.placement import Resources, check_bundles, world_bundles


def test_one_bundle_a_rank_and_the_driver_in_the_first() -> None:
    bundles = world_bundles(3, Resources(cpus=0.8, gpus=1), driver=Resources(cpus=0.2))
    assert bundles == [{"CPU": 1.0, "GPU": 1}, {"CPU": 0.8, "GPU": 1}, {"CPU": 0.8, "GPU": 1}]


def test_without_a_driver_all_bundles_are_alike_and_name_no_gpu() -> None:
    assert world_bundles(2, Resources(cpus=1)) == [{"CPU": 1}, {"CPU": 1}]


def test_sums_of_fractions_are_exact_to_rays_precision() -> None:
    assert world_bundles(1, Resources(cpus=0.2), driver=Resources(cpus=0.1)) == [{"CPU": 0.3}]


def test_no_ranks_and_empty_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one rank, not 0"):
        world_bundles(0, Resources(cpus=1))
    with pytest.raises(ValueError, match="empty bundle"):
        world_bundles(1, Resources())


def test_bigger_bundles_fit_and_smaller_or_fewer_do_not() -> None:
    needed = world_bundles(2, Resources(cpus=1))
    check_bundles([{"CPU": 2}, {"CPU": 1, "GPU": 1}], needed)
    with pytest.raises(PlacementError, match="has 1 bundles, but a world of 2"):
        check_bundles([{"CPU": 2}], needed)
    with pytest.raises(PlacementError, match=r"bundle 1 is .*0\.5.*, but rank 1 needs"):
        check_bundles([{"CPU": 2}, {"CPU": 0.5}], needed)
