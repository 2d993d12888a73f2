"""Schedules: the curves, the two searches, and what a search leaves behind when it is cut off."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from tokensieve import schedules
from tokensieve.methods import GSearch, PSigmoid
from tokensieve.schedules.bayesian import solve_centre


def needs(enough: tuple[float, ...]) -> object:
    """A score that is 1 where every layer has at least what it needs, and falls with what is missing."""
    return lambda rates: 1.0 - sum(max(0.0, e - r) for r, e in zip(rates, enough))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: schedules.check_rates([]), "rates must hold at least one layer, got none"),
        (lambda: schedules.check_rates([1.0, 0.2, 0.3]), "rates must not grow, got 0.3 after 0.2 at layer 2"),
        (lambda: schedules.check_rates([1.0, math.nan]), r"rates must be in \[0, 1\], got nan at layer 1"),
        (lambda: schedules.check_rates([1.5]), r"rates must be in \[0, 1\], got 1.5 at layer 0"),
        (lambda: schedules.ratio((2,), (0.5, 0.2), 4), "one share for each of 1 layers"),
        (lambda: schedules.ratio((0,), (0.5,), 4), r"layers must be in \[1, 3\]"),
        (lambda: schedules.ratio((2, 2), (0.5, 0.2), 4), "layers must increase"),
        (lambda: schedules.ratio((1, 2), (0.2, 0.5), 4), "rates must not grow"),
        (lambda: schedules.sigmoid(0, steepness=1, centre=1), "num_layers must be 1 or more"),
        (lambda: schedules.sigmoid(4, steepness=-1, centre=1), "steepness must be finite and 0 or more"),
        (lambda: schedules.sigmoid(4, steepness=1, centre=math.inf), "centre must be finite"),
        (lambda: schedules.sigmoid(4, steepness=1, centre=1, floor=0.6, ceiling=0.5), "floor <= ceiling"),
        (lambda: schedules.search(needs((1,)), 4, grid=()), "grid must hold at least one share"),
        (lambda: schedules.search(needs((1,)), 4, grid=(2.0,)), "rates must be in"),
        (lambda: schedules.search(needs((1,)), 4, layers=(3, 1)), "layers must increase"),
        (lambda: schedules.search(needs((1,)), 4, tolerance=-1), "tolerance must be 0 or more"),
        (lambda: schedules.search(lambda rates: math.nan, 4, progress=False), "score must return a number, got nan"),
        (lambda: schedules.search_sigmoid(needs((1,)), 4, budget=0.2), r"budget must be in \(1 / 4, 1\]"),
        (lambda: schedules.search_sigmoid(needs((1,)), 4, budget=0.5, trials=0), "trials must be 1 or more"),
        (lambda: schedules.search_sigmoid(needs((1,)), 4, budget=0.5, steepness=(0, 1)), "0 < low <= high"),
        (lambda: schedules.search_sigmoid(needs((1,)), 4, budget=0.5, max_floor=0.9), "max_floor must be in"),
        (lambda: GSearch(rates=(0.5, 0.5)), "rates must begin with 1"),
        (lambda: GSearch(rates=(1.0, 0.5, 0.7)), "GSearch: rates must not grow"),
        (lambda: PSigmoid(floor=2.0), "floor <= ceiling"),
    ],
)
def test_bad_input(make: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()  # type: ignore[operator]


def test_a_rate_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="rates must be numbers, got '1'"):
        schedules.check_rates(["1"])  # type: ignore[list-item]


@pytest.mark.parametrize("steepness", [0.0, 0.3, 5.0, 1e6])
def test_sigmoid_falls_between_its_limits(steepness: float) -> None:
    rates = schedules.sigmoid(32, steepness=steepness, centre=12.5, floor=0.1, ceiling=0.9)
    assert rates[0] == 1
    assert all(0.1 <= rate <= 0.9 for rate in rates[1:])
    for layer in range(1, 32):
        want = 0.1 + 0.8 * 0.5 * (1 - math.tanh(steepness * (layer - 12.5) / 2))  # the same curve, said otherwise
        assert rates[layer] == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_finds_what_every_layer_needs(monotone: bool, seed: int) -> None:
    draw = random.Random(seed)
    steps = sorted((draw.randrange(11) / 10 for _ in range(7)), reverse=True)
    enough = (1.0, *steps)
    grid = [i / 10 for i in range(11)]
    result = schedules.search(needs(enough), 8, grid=grid, monotone=monotone, progress=False)  # type: ignore[arg-type]
    assert result.rates == enough
    assert result.score == 1.0


def test_greedy_result_is_minimal_by_brute_force() -> None:
    """No share of the result can fall to the next one of the grid, for it and all later layers, without missing the target."""

    def score(rates: tuple[float, ...]) -> float:
        return sum(math.sqrt(rate) * weight for rate, weight in zip(rates, (4, 3, 2, 1)))

    grid = [i / 10 for i in range(11)]
    target = score((1.0,) * 4) - 0.9
    rates = schedules.search(score, 4, tolerance=0.9, grid=grid, progress=False).rates
    assert score(rates) >= target
    for layer in range(1, 4):
        smaller = [share for share in grid if share < rates[layer]]
        assert not smaller or score(rates[:layer] + (max(smaller),) * (4 - layer)) < target


def test_greedy_layers_limit_where_it_falls() -> None:
    rates = schedules.search(needs((1.0, 0.3, 0.3, 0.3)), 4, layers=(2,), grid=(0.3, 1.0), progress=False).rates  # type: ignore[arg-type]
    assert rates == (1.0, 1.0, 0.3, 0.3)


class Interrupted:
    """A score that is cut off at its n-th call."""

    def __init__(self, score: object, calls: int) -> None:
        self.score, self.left, self.seen = score, calls, 0

    def __call__(self, rates: tuple[float, ...]) -> float:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.seen += 1
        return self.score(rates)  # type: ignore[operator]


SEARCHES = {
    "greedy": lambda score, path: schedules.search(score, 6, tolerance=0.2, resume=path, progress=False),
    "sigmoid": lambda score, path: schedules.search_sigmoid(score, 6, budget=0.4, trials=14, resume=path, progress=False),
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_interrupted_search_goes_on_where_it_stopped(kind: str, tmp_path: Path) -> None:
    score = needs((1.0, 0.9, 0.6, 0.6, 0.2, 0.1))
    whole = Interrupted(score, 1000)
    want = SEARCHES[kind](whole, tmp_path / "whole.json")
    path = tmp_path / "search.json"
    cut = Interrupted(score, 5)
    with pytest.raises(KeyboardInterrupt):
        SEARCHES[kind](cut, path)
    assert len(json.loads(path.read_text())["evaluations"]) == 5
    rest = Interrupted(score, 1000)
    assert SEARCHES[kind](rest, path) == want
    assert cut.seen + rest.seen == whole.seen
    assert sorted(p.name for p in tmp_path.iterdir()) == ["search.json", "whole.json"]  # no half-written file is left
    nothing = Interrupted(score, 0)
    assert SEARCHES[kind](nothing, path) == want  # a finished search asks for nothing


def test_resume_refuses_another_search_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    schedules.search(needs((1, 0.5)), 2, resume=path, progress=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="resume must hold the same search, got another num_layers"):
        schedules.search(needs((1, 0.5)), 3, layers=(1,), resume=path, progress=False)  # type: ignore[arg-type]
    path.write_text("{}")
    with pytest.raises(ValueError, match="resume must be a file that this search wrote"):
        schedules.search(needs((1, 0.5)), 2, resume=path, progress=False)  # type: ignore[arg-type]


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    schedules.search(needs((1, 0.5)), 2, grid=(0.5, 1.0))  # type: ignore[arg-type]
    assert "search: 1/1 layers, layer 1 keeps 0.5, 2 schedules scored" in capsys.readouterr().err


@pytest.mark.parametrize(("steepness", "floor"), [(0.05, 0.0), (0.5, 0.3), (3.0, 0.0), (3.0, 0.3)])
def test_solved_centre_meets_the_budget(steepness: float, floor: float) -> None:
    rates = solve_centre(32, 0.4, steepness, floor)
    assert 0.4 - 1e-6 < sum(rates) / 32 <= 0.4
    assert schedules.check_rates(rates) == rates


def test_sigmoid_search_beats_its_first_guesses() -> None:
    """Quality that only a steep early drop gives: the best of 20 trials is far better than the mean of random ones."""
    target = schedules.sigmoid(16, steepness=1.7, centre=6.0, floor=0.08)
    budget = sum(target) / 16

    def score(rates: tuple[float, ...]) -> float:
        return -sum((a - b) ** 2 for a, b in zip(rates, target))

    found = schedules.search_sigmoid(score, 16, budget=budget, trials=20, progress=False)
    draw = random.Random(0)
    flat = (budget * 16 - 1) / 15
    points = [(math.exp(draw.uniform(math.log(0.05), math.log(3))), draw.uniform(0, flat)) for _ in range(50)]
    guesses = [score(solve_centre(16, budget, steepness, floor)) for steepness, floor in points]
    assert found.score > 0.2 * sum(guesses) / len(guesses)  # scores are negative: at least five times nearer
    assert found.score > -0.02


def test_scheduled_methods_drop_where_the_count_falls() -> None:
    method = GSearch(rates=(1.0, 1.0, 0.5, 0.5, 0.1))
    assert [(s.layer, s.source) for s in method.stages] == [(2, 1), (4, 3)]
    assert [method.keep_count(i, 577) for i in range(2)] == [288, 57]
    sigmoid = PSigmoid(num_layers=8)
    assert [s.layer for s in sigmoid.stages] == list(range(1, 8))
    counts = schedules.keep_counts(sigmoid.rates, 576)
    assert [sigmoid.keep_count(i, 576) for i in range(7)] == list(counts[1:])
