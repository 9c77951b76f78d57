"""Where samplers ask the network, on every path."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from pipeline.diffusion.grid import Grid, levels, ratio_range, usual_grid
from pipeline.diffusion.path import Path, RectifiedFlow, VarianceExploding, VariancePreserving
from pipeline.errors import ConfigError

SCALED_LINEAR = VariancePreserving.scaled_linear()
PATHS: list[Path] = [
    RectifiedFlow(),
    VariancePreserving.linear(),
    VariancePreserving.cosine(),
    VariancePreserving.cosine().beginning_at(-10.2),
    SCALED_LINEAR.rescaled_to_zero_terminal_snr(),
    VarianceExploding(),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 999])
def test_levels_fall_from_the_path_s_end_to_clean_data(path: Path, steps: int) -> None:
    for grid in get_args(Grid):
        if grid == "trailing" and (not isinstance(path, VariancePreserving) or steps > path.t_max):
            continue
        points = levels(path, grid, steps)
        assert len(points) == steps + 1
        assert points[0].t == path.t_max
        assert (points[-1].alpha, points[-1].sigma) == (1.0, 0.0)
        ratios = [point.ratio for point in points]
        assert ratios == sorted(set(ratios), reverse=True)
        times = torch.tensor([point.t for point in points[:-1]], dtype=torch.float64)
        assert ((path.t_min <= times) & (times <= path.t_max)).all()
        assert path.alpha(times).tolist() == [point.alpha for point in points[:-1]]
        assert path.sigma(times).tolist() == [point.sigma for point in points[:-1]]


def test_trailing_takes_the_rows_of_the_paper() -> None:
    rows = [point.t for point in levels(SCALED_LINEAR, "trailing", 10)[:-1]]
    assert rows == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]  # Lin et al. 2023, table 2
    with pytest.raises(ConfigError, match="trailing is for the table of timesteps"):
        levels(RectifiedFlow(), "trailing", 10)
    with pytest.raises(ConfigError, match="steps: 1001, and the objective's table has 1000 timesteps"):
        levels(SCALED_LINEAR, None, 1001)


def test_karras_is_even_in_the_seventh_root() -> None:
    ratios = torch.tensor([point.ratio for point in levels(VarianceExploding(), "karras", 18)[:-1]])
    roots = ratios ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[0], atol=1e-6)
    assert ratios[0] == 80
    assert ratios[-1] == pytest.approx(0.002)


@pytest.mark.parametrize("path", PATHS)
def test_log_snr_is_even_where_it_is_finite(path: Path) -> None:
    ratios = [point.ratio for point in levels(path, "log_snr", 30)[1:-1]]
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    assert torch.allclose(logs.diff(), logs.diff()[0], atol=1e-6)
    low, high = ratio_range(path)
    assert math.isclose(ratios[-1], low, rel_tol=1e-6)
    assert ratios[0] < high <= 160


def test_each_path_has_its_usual_grid() -> None:
    assert [usual_grid(path) for path in PATHS] == ["uniform", *["trailing"] * 4, "karras"]
