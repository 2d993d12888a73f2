"""P-Sigmoid: the best logistic schedule under a token budget, by Bayesian optimisation (arXiv 2412.00556)."""

from __future__ import annotations

import os
from typing import Any

from .curves import sigmoid
from .evaluations import Evaluations, Rates, Score, SearchResult


def search_sigmoid(
    score: Score,
    num_layers: int,
    *,
    budget: float,
    trials: int = 30,
    steepness: tuple[float, float] = (0.05, 3.0),
    max_floor: float | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """The logistic schedule of the best score among those whose mean rate meets the budget.

    Args:
        score: called with num_layers rates, returns the quality on your calibration set; larger is better.
        num_layers: layers of the decoder, 2 or more.
        budget: mean rate over the layers, in (1 / num_layers, 1]: layer 0 alone sees everything.
        trials: calls of `score`, 1 or more.
        steepness: range that is searched, per layer, on a logarithmic scale.
        max_floor: largest floor that is searched; the budget's own share of the later layers where None (a flat schedule).
        seed: of the optimiser.
        resume: file of the scores so far, as in `search`.
        progress: a line on standard error per trial.

    Returns:
        SearchResult(rates, score, evaluations).

    Raises:
        ImportError: optuna is missing; pip install 'tokensieve[search]'.
        ValueError: an argument that breaks a rule above.

    Two parameters are searched, steepness and floor, by a Gaussian process (optuna's GPSampler); the centre is solved for, so that every
    schedule meets the budget: the mean rate is never above it, and below it by less than 1e-6. Deterministic for a deterministic score, so
    a resumed search goes on where it stopped, also with more trials.

    Source: P-Sigmoid (arXiv 2412.00556), from its abstract and summaries; see `sigmoid`.

    Example:
        >>> result = search_sigmoid(lambda rates: -abs(rates[2] - 0.5), 6, budget=0.5, trials=4, progress=False)
        >>> round(sum(result.rates) / 6, 4), result.evaluations
        (0.5, 4)
    """
    if num_layers < 2:
        raise ValueError(f"tokensieve.schedules.search_sigmoid: num_layers must be 2 or more, got {num_layers}")
    if not 1 / num_layers < budget <= 1:
        raise ValueError(f"tokensieve.schedules.search_sigmoid: budget must be in (1 / {num_layers}, 1], got {budget}")
    if trials < 1:
        raise ValueError(f"tokensieve.schedules.search_sigmoid: trials must be 1 or more, got {trials}")
    low, high = steepness
    if not 0 < low <= high:
        raise ValueError(f"tokensieve.schedules.search_sigmoid: steepness must satisfy 0 < low <= high, got {steepness}")
    flat = (budget * num_layers - 1) / (num_layers - 1)  # rate of the later layers if all are alike
    top = flat if max_floor is None else max_floor
    if not 0 <= top <= flat:
        raise ValueError(f"tokensieve.schedules.search_sigmoid: max_floor must be in [0, {flat:.4g}] for this budget, got {max_floor}")
    settings = {"search": "sigmoid", "num_layers": num_layers, "budget": budget, "steepness": [low, high], "max_floor": top, "seed": seed}
    evaluate = Evaluations("search_sigmoid", score, settings, resume, progress)
    return _optimise(evaluate, num_layers, budget, trials, (low, high), top, seed)


def _optimise(
    evaluate: Evaluations, num_layers: int, budget: float, trials: int, steepness: tuple[float, float], top: float, seed: int
) -> SearchResult:
    optuna = _optuna()
    space = {
        "steepness": optuna.distributions.FloatDistribution(*steepness, log=True),
        "floor": optuna.distributions.FloatDistribution(0.0, top),
    }
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed))
    best = float("-inf")
    for trial_number in range(trials):
        trial = study.ask(space)
        rates = solve_centre(num_layers, budget, trial.params["steepness"], trial.params["floor"])
        value = evaluate(rates)
        study.tell(trial, value)
        best = max(best, value)
        evaluate.tell(trial_number + 1, trials, f"trials, best {best:.4g}")
    rates = max(evaluate.scores, key=lambda known: evaluate.scores[known])
    return SearchResult(rates, evaluate.scores[rates], len(evaluate.scores))


def solve_centre(num_layers: int, budget: float, steepness: float, floor: float) -> Rates:
    """The logistic schedule of this steepness and floor whose mean rate is the budget: the mean grows with the centre, so bisect it.

    Example:
        >>> rates = solve_centre(32, 0.4, 0.5, 0.1)
        >>> round(sum(rates) / 32, 6)
        0.4
    """
    reach = num_layers + 40 / steepness  # there the curve is flat to 1e-17
    low, high = -reach, reach
    for _ in range(80):
        middle = (low + high) / 2
        rates = sigmoid(num_layers, steepness=steepness, centre=middle, floor=floor)
        low, high = (middle, high) if sum(rates) <= budget * num_layers else (low, middle)
    return sigmoid(num_layers, steepness=steepness, centre=low, floor=floor)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ImportError("tokensieve.schedules.search_sigmoid needs optuna: pip install 'tokensieve[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
