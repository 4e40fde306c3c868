"""The weight of every step against a definition written with loops, and what a baseline does to the variance."""

import math
from itertools import product

import numpy as np
import pytest

from pgengine.errors import ShapeMismatch
from pgengine.estimators import BatchRows, StepWeights, step_weights
from pgengine.spec import AlgorithmSpec

LENGTHS = {1: [4], 2: [3, 1], 3: [2, 5, 1], 4: [4, 1, 4, 6]}
BASELINES = [
    {"kind": "none"},
    {"kind": "constant", "value": 2.5},
    {"kind": "moving_average"},
    *[{"kind": "leave_one_out", "over": over} for over in ("time_step", "alive", "shrunk", "total", "all_steps")],
    *[{"kind": "batch_mean", "over": over} for over in ("time_step", "alive", "total", "all_steps")],
]
ENTROPIES = [None, {"coefficient": 0.7}, {"coefficient": 0.7, "as": "bonus"}]
RATIOS = [
    {},
    {"kind": "trajectory"},
    {"kind": "per_decision"},
    {"kind": "trajectory", "clip": 1.3},
    {"kind": "per_decision", "clip": 1.3},
    {"kind": "trajectory", "self_normalise": True},
    {"kind": "per_decision", "self_normalise": True, "clip": 1.3},
]


class Episodes:
    """Random rows, by trajectory and time."""

    def __init__(self, lengths: list[int]) -> None:
        generator = np.random.default_rng(0)
        self.K = len(lengths)
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns = [
            [generator.normal(mean, deviation, size=length).tolist() for length in lengths]
            for mean, deviation in ((1.0, 3.0), (0.0, 1.0), (1.0, 0.3), (0.0, 0.4))
        ]
        self.r, self.predicted, self.H, self.log_ratio = columns

    def rows(self) -> BatchRows:
        flat = [np.concatenate(column) for column in (self.r, self.predicted, self.H, self.log_ratio)]
        return BatchRows(flat[0], self.offsets, *flat[1:])


def naive(e: Episodes, a: AlgorithmSpec) -> tuple[list[float], list[float]]:
    """Weights of scores and of gradients of entropies, slow and plain."""
    K, gamma = e.K, a.credit_gamma
    c = 0.0 if a.entropy is None else a.entropy.coefficient
    paid = c if a.entropy is not None and a.entropy.as_ == "objective" else 0.0

    def raw_ratio(j: int, t: int) -> float:
        """w_{0:t} of a trajectory, which keeps its last value after its end; w_{0:-1} = 1."""
        last = len(e.r[j]) - 1 if a.importance.kind == "trajectory" else t
        ratio = math.exp(sum(e.log_ratio[j][: last + 1]))
        return ratio if a.importance.clip is None else min(ratio, a.importance.clip)

    def ratio(j: int, t: int) -> float:
        if a.importance.kind == "none" or (a.importance.kind == "per_decision" and t < 0):
            return 1.0
        mean = sum(raw_ratio(i, t) for i in range(K)) / K if a.importance.self_normalise else 1.0
        return raw_ratio(j, t) / mean

    def credit(j: int, t: int) -> float:
        total = 0.0
        for k in range(t, len(e.r[j])):
            later = e.H[j][k + 1] if k + 1 < len(e.r[j]) else 0.0
            total += gamma ** (k - t) * ratio(j, k) * (e.r[j][k] + gamma * paid * later)
        return total

    def own_credit(j: int, t: int) -> float:
        """The credit of a row of the batch; zero after the end."""
        if t >= len(e.r[j]):
            return 0.0
        return credit(j, 0 if a.credit == "total_return" else t)

    def baseline(i: int, t: int) -> float:
        kind, over = a.baseline.kind, getattr(a.baseline, "over", "")
        if kind == "none":
            return 0.0
        if kind == "constant":
            return a.baseline.value  # type: ignore[union-attr]
        if kind == "moving_average":
            return e.predicted[i][t]
        who = [j for j in range(K) if kind == "batch_mean" or j != i]
        if over == "all_steps":
            values = [own_credit(j, s) for j in who for s in range(len(e.r[j]))]
            return sum(values) / len(values)
        if a.credit == "total_return":
            returns = [credit(j, 0) for j in who]
            return sum(returns) / (len(who) + (2 if over == "shrunk" else 0))
        if over == "total":
            return sum(credit(j, 0) for j in who) / len(who)
        alive = sum(t < len(e.r[j]) for j in who)
        count = {"time_step": len(who), "alive": max(alive, 1), "shrunk": alive + 2}[over]
        return sum(own_credit(j, t) for j in who) / count

    def count(i: int) -> float:
        steps = sum(len(rewards) for rewards in e.r)
        return {"trajectories": K, "all_steps": steps, "own_steps": K * len(e.r[i])}[a.mean_over]

    def deviation(i: int) -> float:
        if a.standardise != "leave_one_out":
            return 1.0
        others = [credit(j, 0) for j in range(K) if j != i]
        mean = sum(others) / (K - 1)
        return math.sqrt(sum((value - mean) ** 2 for value in others) / (K - 2))

    advantage = {(i, t): own_credit(i, t) - ratio(i, t) * baseline(i, t) for i in range(K) for t in range(len(e.r[i]))}
    if a.standardise == "batch":
        mean = sum(advantage.values()) / len(advantage)
        spread = math.sqrt(sum((value - mean) ** 2 for value in advantage.values()) / len(advantage))
        advantage = {key: (value - mean) / spread if spread > 1e-9 else 0.0 for key, value in advantage.items()}
    power = gamma if a.discount_weight == "gamma_power" else 1.0
    of_entropy = gamma if a.credit == "total_return" else power
    before = 0 if a.importance.kind == "trajectory" else 1
    return (
        [power**t * value / count(i) / deviation(i) for (i, t), value in advantage.items()],
        [c * of_entropy**t * ratio(i, t - before) / count(i) / deviation(i) for i, t in advantage],
    )


def compare(e: Episodes, a: AlgorithmSpec) -> StepWeights:
    found = step_weights(e.rows(), a)
    scores, entropies = naive(e, a)
    assert np.allclose(found.score, scores, rtol=1e-10, atol=1e-12)
    if a.entropy is None:
        assert found.entropy is None
    else:
        assert found.entropy is not None
        assert np.allclose(found.entropy, entropies, rtol=1e-10, atol=1e-12)
    return found


@pytest.mark.parametrize("gamma", [1.0, 0.8, 0.0])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: "-".join(map(str, baseline.values())))
@pytest.mark.parametrize("credit", ["reward_to_go", "total_return"])
def test_every_weight_is_its_definition(credit: str, baseline: dict[str, object], gamma: float) -> None:
    for K, mean_over, weight in product(LENGTHS, ["trajectories", "all_steps", "own_steps"], ["none", "gamma_power"]):
        a = AlgorithmSpec.model_validate(
            dict(credit=credit, discount_weight=weight, mean_over=mean_over, baseline=baseline, gamma=gamma)
        )
        if K == 1 and baseline["kind"] == "leave_one_out":
            with pytest.raises(ShapeMismatch, match="two trajectories"):
                step_weights(Episodes(LENGTHS[K]).rows(), a)
        else:
            compare(Episodes(LENGTHS[K]), a)


@pytest.mark.slow
@pytest.mark.parametrize("standardise", ["none", "leave_one_out", "batch"])
@pytest.mark.parametrize("importance", RATIOS, ids=lambda ratio: "-".join(map(str, ratio.values())) or "none")
@pytest.mark.parametrize("entropy", ENTROPIES, ids=lambda entropy: "-".join(map(str, (entropy or {}).values())))
def test_every_weight_is_its_definition_with_entropy_ratios_and_standards(
    entropy: dict[str, object] | None, importance: dict[str, object], standardise: str
) -> None:
    for K, credit, gamma, baseline in product([3, 4], ["reward_to_go", "total_return"], [1.0, 0.8], BASELINES):
        if credit == "total_return" and importance.get("kind") == "per_decision":
            continue  # refused: see test_resolution
        settings = dict(
            credit=credit, gamma=gamma, baseline=baseline, entropy=entropy, importance=importance,
            standardise=standardise, discount_weight="none" if credit == "total_return" else "gamma_power",
        )  # fmt: skip
        compare(Episodes(LENGTHS[K]), AlgorithmSpec.model_validate(settings))


def test_discounting_by_termination_discounts_nothing_else() -> None:
    settings = {"gamma": 0.8, "entropy": {"coefficient": 0.7}, "discount_weight": "gamma_power"}
    ending = AlgorithmSpec.model_validate(settings | {"discount": "termination"})
    undiscounted = AlgorithmSpec.model_validate(settings | {"gamma": 1.0})
    found, plain = (step_weights(Episodes([3, 1]).rows(), a) for a in (ending, undiscounted))
    assert np.array_equal(found.score, plain.score)
    assert found.entropy is not None
    assert plain.entropy is not None
    assert np.array_equal(found.entropy, plain.entropy)


def test_the_parts_of_a_weight_make_it_up() -> None:
    e = Episodes([3, 1])
    a = AlgorithmSpec.model_validate(
        {"gamma": 0.5, "discount_weight": "gamma_power", "importance": {"kind": "per_decision"}}
    )
    found = step_weights(e.rows(), a)
    assert found.ratio is not None
    assert np.allclose(found.ratio, np.exp(np.concatenate([np.cumsum(e.log_ratio[0]), e.log_ratio[1]])))
    assert np.allclose(found.score, 0.5 ** np.array([0, 1, 2, 0]) * (found.credit - found.baseline) / 2)
    assert step_weights(e.rows(), a.model_copy(update={"importance": AlgorithmSpec().importance})).ratio is None


def test_the_effective_sample_size_counts_whole_trajectories() -> None:
    e = Episodes(LENGTHS[4])
    w = np.exp([sum(logs) for logs in e.log_ratio])
    for importance in RATIOS[1:]:
        found = step_weights(e.rows(), AlgorithmSpec.model_validate({"importance": importance}))
        assert found.effective_sample_size == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert step_weights(e.rows(), AlgorithmSpec()).effective_sample_size == 4.0


def test_ratios_beyond_every_float_are_not_hidden() -> None:
    """A sum of log-ratios of 1000: the estimate is not finite, but what can be told is told, without a warning."""
    far = BatchRows(np.array([1.0, 0.0, 1.0]), np.array([0, 2, 3]), log_ratios=np.array([500.0, 500.0, 0.0]))
    a = AlgorithmSpec.model_validate({"importance": {"kind": "trajectory"}})
    found = step_weights(far, a)
    assert not np.isfinite(found.score).all()
    assert found.effective_sample_size == pytest.approx(1.0)
    bounded = AlgorithmSpec.model_validate({"importance": {"kind": "per_decision", "self_normalise": True}})
    assert np.isfinite(step_weights(far, bounded).score).all()


def test_what_the_policy_never_does_has_weight_zero() -> None:
    never = BatchRows(np.ones(3), np.array([0, 2, 3]), log_ratios=np.array([-np.inf, 0.0, -np.inf]))
    for self_normalise in (False, True):
        a = AlgorithmSpec.model_validate({"importance": {"kind": "trajectory", "self_normalise": self_normalise}})
        found = step_weights(never, a)
        assert np.all(found.score == 0.0)
        assert found.effective_sample_size == 0.0


@pytest.mark.parametrize("standardise", ["leave_one_out", "batch"])
def test_returns_that_are_all_alike_give_weights_of_zero(standardise: str) -> None:
    """0.1 + 0.2 and 0.3 are alike but for rounding, which must not be blown up to a deviation of one."""
    rows = BatchRows(np.array([0.1, 0.2, 0.3, 0.2, 0.1]), np.array([0, 2, 3, 5]))
    a = AlgorithmSpec.model_validate(
        {"credit": "total_return", "standardise": standardise, "baseline": {"kind": "none"}}
    )
    assert np.all(step_weights(rows, a).score == 0.0)


def test_an_outlier_does_not_hide_the_deviation_of_the_others() -> None:
    rows = BatchRows(np.array([1e12, 1.0, 2.0]), np.array([0, 1, 2, 3]))
    a = AlgorithmSpec.model_validate(
        {"credit": "total_return", "standardise": "leave_one_out", "baseline": {"kind": "none"}}
    )
    assert step_weights(rows, a).score[0] == pytest.approx(1e12 / 3.0 / np.sqrt(0.5))


@pytest.mark.parametrize(("settings", "message"), [
    ({"importance": {"kind": "trajectory"}}, "log-probabilities"),
    ({"entropy": {"coefficient": 1.0}}, "entropy"),
    ({"baseline": {"kind": "linear_value"}}, "predicts"),
    ({"standardise": "leave_one_out"}, "three"),
])  # fmt: skip
def test_what_is_missing_is_named(settings: dict[str, object], message: str) -> None:
    rows = BatchRows(np.ones(3), np.array([0, 2, 3]))
    with pytest.raises(ShapeMismatch, match=message):
        step_weights(rows, AlgorithmSpec.model_validate(settings))


def test_a_baseline_keeps_the_mean_of_the_estimate_and_takes_its_variance_away() -> None:
    """Two arms that pay 10 and 11, drawn evenly by two trajectories: all four batches, so nothing is random."""
    offsets, arms = np.array([0, 1, 2]), [10.0, 11.0]

    def estimates(baseline: dict[str, object]) -> np.ndarray:
        settings = AlgorithmSpec.model_validate({"baseline": baseline, "trajectories": 2})
        batches = [np.array(batch) for batch in product([0, 1], repeat=2)]
        scores = [0.5 - batch for batch in batches]  # by the score of the first arm
        weights = [step_weights(BatchRows(np.take(arms, batch), offsets), settings).score for batch in batches]
        return np.array([w @ score for w, score in zip(weights, scores, strict=True)])

    none, constant, others = (estimates(baseline) for baseline in (BASELINES[0], BASELINES[1], BASELINES[3]))
    assert np.allclose([none.mean(), constant.mean(), others.mean()], -0.25)
    assert none.var() == pytest.approx(5.25**2 / 2)
    assert constant.var() == pytest.approx((5.25 - 1.25) ** 2 / 2)
    assert others.var() == pytest.approx(0.0625)
