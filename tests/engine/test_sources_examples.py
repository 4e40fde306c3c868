"""What the sources say in passing, shown: pictures, examples and implications, and where a printed formula goes wrong.

Everything is computed, nothing is drawn, unless a test says so.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, Normal

import pgengine
from pgengine.distributions import open_distribution
from pgengine.estimation import gradient
from pgengine.estimators import BatchRows, reward_to_go, step_weights
from pgengine.exact import (
    EnumeratedRows,
    best_stationary,
    enumerate_trajectories,
    estimate_moments,
    exact_gradient,
    exact_return,
    exact_values,
    expected_estimate,
    log_policy,
    optimal_values,
    parameters_in_double,
    trajectory_probabilities,
)
from pgengine.optimizers import open_optimizer
from pgengine.score_function import draw_samples, score_function_gradient
from pgengine.spaces import BoxSpace
from pgengine.spec import (
    AdaGradSpec,
    AdamSpec,
    GaussianSpec,
    LinearPolicySpec,
    SgdSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from tests.engine.worlds import algorithm, bandit, random_mdp, table_policy

TOLERANCE = 1e-9
WORLD = random_mdp(0, A=3, horizon=3)


def weights_of(spec: TabularSpec, **settings: object) -> Callable[[EnumeratedRows], np.ndarray]:
    resolved = algorithm(spec, **settings)
    return lambda rows: step_weights(BatchRows(rows.rewards, rows.offsets), resolved).score


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """In degrees; by the arc tangent, which small angles need."""
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def flat_policy(spec: TabularSpec, theta: list[list[float]]) -> pgengine.Policy:
    policy = LinearPolicySpec(initial_parameters={"theta": theta})
    return pgengine.create_policy(policy, spec, pgengine.describe(spec), seed=0)


# --- what J is, and that its optimum depends on where episodes begin (Bereyhi) ----------------------------------------


def two_states(first: float, *, alike: bool) -> TabularSpec:
    """One step; action 0 is right in state 0 and pays 1, action 1 is right in state 1 and pays 2."""
    return TabularSpec(
        transitions=[[[0.0, 0.0, 1.0]] * 2] * 3,
        rewards=[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]],
        initial=[first, 1.0 - first, 0.0],
        terminal=[2],
        horizon=1,
        observations=[0, 0, 1] if alike else None,
    )


def test_the_optimum_depends_on_where_episodes_begin_if_the_class_cannot_serve_all_states() -> None:
    best = {p: best_stationary(pgengine.TabularMDP(two_states(p, alike=True)), gamma=1.0, starts=0) for p in (0.8, 0.3)}
    assert pytest.approx(0.8, abs=1e-9) == best[0.8].J
    assert pytest.approx(1.4, abs=1e-9) == best[0.3].J
    assert best[0.8].probabilities[0] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert best[0.3].probabilities[0] == pytest.approx([0.0, 1.0], abs=1e-6)
    # so no policy of the class maximises the value of both states
    v = exact_values(
        np.log(np.array([[0.9, 0.1], [0.5, 0.5]])), pgengine.TabularMDP(two_states(0.5, alike=True)), gamma=1.0
    ).v
    assert v[0, :2] == pytest.approx([0.9, 0.2], abs=1e-12)


def test_one_table_is_best_from_every_state_if_the_states_can_be_told_apart() -> None:
    for p in (0.8, 0.3):
        mdp = pgengine.TabularMDP(two_states(p, alike=False))
        best, everywhere = best_stationary(mdp, gamma=1.0, starts=0), optimal_values(mdp, gamma=1.0)
        assert pytest.approx(p + 2 * (1 - p), abs=1e-9) == best.J
        assert best.probabilities[:2] == pytest.approx(np.eye(2), abs=1e-6)
        assert everywhere.v[:2] == pytest.approx([1.0, 2.0], abs=1e-12)


def test_j_is_the_mean_of_v_over_first_states() -> None:
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    values = exact_values(policy, mdp, gamma=0.9)
    by_state = []
    for s in np.flatnonzero(mdp.initial):
        start = [float(i == s) for i in range(len(WORLD.initial))]
        from_there = pgengine.TabularMDP(WORLD.model_copy(update={"initial": start}))
        by_state.append(mdp.initial[s] * exact_return(policy, from_there, gamma=0.9))
        # v(s_0) is the mean return of all trajectories that begin there
        trajectories = enumerate_trajectories(from_there)
        p = trajectory_probabilities(trajectories, log_policy(policy, parameters_in_double(policy))).detach().numpy()
        G = (trajectories.rewards * 0.9 ** np.arange(trajectories.rewards.shape[1])).sum(axis=1)
        assert p @ G == pytest.approx(values.v[0, s], abs=1e-12)
    assert sum(by_state) == pytest.approx(values.J, abs=1e-12)


# --- continuous softmax (Bereyhi) -------------------------------------------------------------------------------------


def test_a_softmax_over_the_line_with_quadratic_features_is_the_gaussian() -> None:
    """exp(theta'x(s, a)) / integral with x = [a, a^2]: theta = [mu / sigma^2, -1 / (2 sigma^2)]."""
    mu, sigma = 0.7, 0.4
    a = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)
    score = mu / sigma**2 * a - a**2 / (2 * sigma**2)
    softmax = score.exp() / torch.trapezoid(score.exp(), a)
    space = BoxSpace(shape=[1], low=[None], high=[None], dtype="float32")
    gaussian = open_distribution(GaussianSpec(sigma="fixed", initial_sigma=sigma), space)
    outputs = torch.full((len(a), 1), mu, dtype=torch.float64)
    density = gaussian.log_prob({}, outputs, a[:, None]).exp()
    assert torch.allclose(softmax, density, rtol=1e-6, atol=1e-9)  # sigma is kept in float32


def test_a_softmax_of_a_linear_score_has_no_integral_over_the_line() -> None:
    """With x = [x, y, a] the integral over [-L, L] grows without bound; on a box it exists, without the state."""
    theta = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    grows = []
    for L in (10.0, 20.0, 40.0):
        a = torch.linspace(-L, L, 40_001, dtype=torch.float64)
        grows.append(float(torch.trapezoid((theta[2] * a).exp(), a)))
    assert grows[1] > 100 * grows[0]
    assert grows[2] > 1e4 * grows[1]
    a = torch.linspace(-1.0, 1.0, 2001, dtype=torch.float64)
    densities = []
    for x, y in ((0.0, 0.0), (3.0, -2.0)):
        score = (theta[0] * x + theta[1] * y + theta[2] * a).exp()
        densities.append(score / torch.trapezoid(score, a))
    assert distance(*densities) < 1e-12


def test_values_that_sum_to_one_need_not_be_probabilities() -> None:
    """A linear map may sum to one over the actions and still give one of them less than nothing."""
    theta, x = np.array([1.0, -0.5]), np.array([[1.0, -0.5], [0.0, 0.5]])
    linear = x @ theta
    assert linear.sum() == pytest.approx(1.0)
    assert linear.min() < 0
    softmax = np.exp(linear) / np.exp(linear).sum()
    assert softmax.sum() == pytest.approx(1.0)
    assert softmax.min() > 0


# --- the log-derivative identity (Lin, Log-derivative page, Bereyhi) --------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=9, max_size=9))
def test_the_gradient_of_a_probability_is_itself_times_the_gradient_of_its_logarithm(numbers: list[float]) -> None:
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    theta = torch.tensor(numbers, dtype=torch.float64).reshape(3, 3).requires_grad_()
    p = trajectory_probabilities(enumerate_trajectories(mdp), log_policy(policy, {"theta": theta}))
    for one in p[:: len(p) // 5]:
        (of_p,) = torch.autograd.grad(one, theta, retain_graph=True)
        (of_log,) = torch.autograd.grad(one.log(), theta, retain_graph=True)
        assert distance(of_p, one.detach() * of_log) < 1e-14


def test_the_lemma_with_the_index_as_printed_does_not_vanish() -> None:
    """sum_a pi(a) grad log pi(a) = 0; with grad log pi(a_t) inside, as printed, the sum is the score of a_t itself."""
    log_pi = torch.log_softmax(torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64), 0)
    scores = torch.eye(3, dtype=torch.float64) - log_pi.exp()  # row a: grad of log pi(a) in the logits
    right = (log_pi.exp()[:, None] * scores).sum(0)
    assert float(right.abs().max()) < 1e-15
    for taken in range(3):
        printed = (log_pi.exp()[:, None] * scores[taken]).sum(0)
        assert float(printed.abs().max()) > 0.1


# --- trajectories as the warm-up's x (Sun) ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_is_the_score_function_of_trajectories(gamma: float) -> None:
    """x = a trajectory, P_theta = p(tau), f = the return: the general estimator gives the engine's, batch by batch."""
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    trajectories = enumerate_trajectories(mdp)
    G = torch.as_tensor((trajectories.rewards * gamma ** np.arange(trajectories.rewards.shape[1])).sum(axis=1))
    theta = {"theta": torch.tensor(policy.parameters["theta"], dtype=torch.float64)}

    def over_trajectories(p: dict[str, torch.Tensor]) -> Categorical:
        return Categorical(probs=trajectory_probabilities(trajectories, log_policy(policy, p)), validate_args=False)

    tau = draw_samples(over_trajectories(theta), 8, seed=0)
    general = score_function_gradient(over_trajectories, lambda x, p: G[x], theta, tau, baseline="leave_one_out")
    # the same eight trajectories, as the engine lays them out
    lengths = trajectories.lengths[tau]
    steps = [(i, t) for i, n in zip(tau.tolist(), lengths.tolist(), strict=True) for t in range(n)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = BatchRows(np.array([trajectories.rewards[i, t] for i, t in steps]), offsets)
    settings = dict(credit="total_return", gamma=gamma, baseline={"kind": "leave_one_out"}, trajectories=8)
    score = step_weights(rows, algorithm(WORLD, **settings)).score
    leaves = {"theta": theta["theta"].clone().requires_grad_()}
    log_pi = log_policy(policy, leaves)
    taken = torch.stack([log_pi[trajectories.observations[i, t], trajectories.actions[i, t]] for i, t in steps])
    (torch.as_tensor(score) * taken).sum().backward()
    assert distance(general.gradient["theta"], leaves["theta"].grad) < 1e-9  # type: ignore[arg-type]


# --- formulas that fall short as printed ------------------------------------------------------------------------------


def test_the_boxed_formula_lacks_gamma_to_the_t() -> None:
    """E[sum_t score_t G_t] with G_t discounted from t on: the gradient at gamma 1, at 0.8 no multiple of it."""
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    trajectories = enumerate_trajectories(mdp)
    for gamma, right in ((1.0, True), (0.8, False)):
        exact = exact_gradient(policy, mdp, gamma=gamma)
        boxed = expected_estimate(
            policy, trajectories, lambda rows, g=gamma: reward_to_go(rows.rewards, rows.offsets, gamma=g), K=1
        )
        assert (distance(boxed, exact) < TOLERANCE) is right
        assert (angle(boxed, exact) < 1e-4) is right
        kept = weights_of(WORLD, gamma=gamma, discount_weight="gamma_power", baseline={"kind": "none"}, trajectories=1)
        assert distance(expected_estimate(policy, trajectories, kept, K=1), exact) < TOLERANCE


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_the_printed_theorem_is_short_of_the_mass_of_d(gamma: float) -> None:
    """With d made a distribution, the theorem's right side is the gradient over the mass of d: 1 / E[T] at gamma 1."""
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    values = exact_values(policy, mdp, gamma=gamma)
    leaves = parameters_in_double(policy)
    pi = log_policy(policy, leaves).exp()
    exact = exact_gradient(policy, mdp, gamma=gamma, method="differentiate")

    def side(d: np.ndarray, q: np.ndarray) -> torch.Tensor:
        value = (torch.as_tensor(d)[..., None] * torch.as_tensor(q) * pi).sum()
        return torch.autograd.grad(value, leaves["theta"], retain_graph=True)[0].reshape(-1)

    assert distance(side(values.d, values.q), exact) < 1e-12
    assert values.mass > 1.3
    assert distance(side(values.d / values.mass, values.q) * values.mass, exact) < 1e-12
    if gamma == 1.0:
        trajectories = enumerate_trajectories(mdp)
        p = trajectory_probabilities(trajectories, log_policy(policy, leaves)).detach().numpy()
        assert values.mass == pytest.approx(float(p @ trajectories.lengths), abs=1e-12)
    else:
        # unrolling without the discount, as printed, weighs late states too much
        undiscounted = exact_values(policy, mdp, gamma=1.0).d
        assert angle(side(undiscounted, values.q), exact) > 0.01
    # and with a horizon q has an index of time: the values of the first step do not do for all
    assert angle(side(values.d, np.repeat(values.q[:1], len(values.q), axis=0)), exact) > 0.01


def test_dividing_by_steps_is_not_dividing_by_trajectories() -> None:
    """1/N and the two readings of 1/(sum T_i + 1): all steps counted, or as many less as there are trajectories more
    than one. T_i is the index of the last step. Only 1/N points along the gradient."""
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    trajectories, exact = enumerate_trajectories(mdp), exact_gradient(policy, mdp, gamma=1.0)
    settings: dict[str, object] = dict(credit="total_return", baseline={"kind": "none"}, trajectories=2)
    per_trajectory = weights_of(WORLD, **settings)
    literal = lambda rows: per_trajectory(rows) * 2 / (rows.offsets[-1] - 2 + 1)  # noqa: E731
    for weights, right in (
        (per_trajectory, True),
        (weights_of(WORLD, mean_over="all_steps", **settings), False),
        (literal, False),
    ):
        assert (angle(expected_estimate(policy, trajectories, weights, K=2), exact) < 1e-4) is right


def debt() -> TabularSpec:
    """A coin pays 1 or -1, and the next step takes it back whatever is done: the total is always zero."""
    return TabularSpec(
        transitions=[
            [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
            *[[[0.0, 0.0, 0.0, 1.0]] * 2] * 3,
        ],
        rewards=[[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0, 0.0],
        terminal=[3],
        horizon=2,
    )


def test_reward_to_go_usually_lowers_the_variance_but_not_always() -> None:
    moments = {}
    for name, spec in (("usual", WORLD), ("debt", debt())):
        trajectories = enumerate_trajectories(pgengine.TabularMDP(spec))
        for credit in ("total_return", "reward_to_go"):
            weights = weights_of(spec, credit=credit, baseline={"kind": "none"}, trajectories=1)
            moments[name, credit] = estimate_moments(table_policy(spec), trajectories, weights, K=1)
    assert moments["usual", "reward_to_go"].variance_trace < moments["usual", "total_return"].variance_trace
    assert moments["debt", "total_return"].variance_trace < 1e-24
    assert moments["debt", "reward_to_go"].variance_trace > 0.1
    assert np.abs(moments["debt", "reward_to_go"].mean).max() < 1e-12


# --- what the theorem allows: more complicated weights (Bereyhi) ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_all_actions_of_a_visited_state_can_be_credited_with_their_exact_q(gamma: float) -> None:
    """Sum over the steps of gamma^t sum_a q_t(s_t, a) grad pi(a|s_t), whichever actions were taken: exact, and of less
    variance than the score of the action taken times its q, which is exact too."""
    policy, mdp = table_policy(WORLD), pgengine.TabularMDP(WORLD)
    trajectories, exact = enumerate_trajectories(mdp), exact_gradient(policy, mdp, gamma=gamma)
    q = exact_values(policy, mdp, gamma=gamma).q

    def sampled(rows: EnumeratedRows) -> np.ndarray:
        t = np.arange(rows.offsets[-1]) - np.repeat(rows.offsets[:-1], np.diff(rows.offsets))
        return gamma**t * q[t, rows.states, rows.actions]

    of_the_taken = estimate_moments(policy, trajectories, sampled, K=1)
    assert np.abs(of_the_taken.mean - exact.numpy()).max() < TOLERANCE

    leaves = parameters_in_double(policy)
    log_pi = log_policy(policy, leaves)
    p = trajectory_probabilities(trajectories, log_pi).detach()
    t = np.arange(trajectories.states.shape[1])
    of_state = (torch.as_tensor(q[t, trajectories.states]) * log_pi.exp()[trajectories.states]).sum(dim=2)
    per_trajectory = (of_state * torch.as_tensor(trajectories.taken * gamma**t)).sum(dim=1)
    estimates = torch.stack(
        [torch.autograd.grad(one, leaves["theta"], retain_graph=True)[0].reshape(-1) for one in per_trajectory]
    )
    assert distance(p @ estimates, exact) < TOLERANCE
    assert float((p[:, None] * (estimates - exact) ** 2).sum()) < 0.9 * of_the_taken.variance_trace


# --- ascent (Bereyhi, Sun) --------------------------------------------------------------------------------------------


def test_ascent_on_j_is_descent_on_minus_j() -> None:
    """One update of the engine by SGD with rate 0.3 adds 0.3 times the estimate, and the exact gradient climbs J."""
    spec = bandit(0.0, 1.0, 3.0)
    training = TrainingSpec(
        environment=spec,
        policy=LinearPolicySpec(),
        algorithm={
            "optimizer": {"kind": "sgd", "learning_rate": 0.3},
            "trajectories": 64,
            "baseline": {"kind": "none"},
        },  # type: ignore[arg-type]
        stop=StopSpec(updates=1),
        seed=1,
    )
    (update,) = pgengine.train(training)
    mdp, policy = pgengine.TabularMDP(spec), flat_policy(spec, [[0.0] * 3] * 2)
    estimate = gradient(policy, update.record.batch, update.record.weighed.weights).reshape(2, 3)
    assert np.abs(estimate).max() > 0.1
    assert np.abs(update.policy.parameters["theta"] - 0.3 * estimate).max() < 1e-6
    leaves = parameters_in_double(policy)
    exact = exact_gradient(policy, mdp, gamma=1.0).reshape(2, 3)
    optimizer = open_optimizer(SgdSpec(learning_rate=0.3), list(leaves.values()))
    minus_J = -(log_policy(policy, leaves).exp()[0] * torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)).sum()
    minus_J.backward()
    optimizer.step()
    assert distance(leaves["theta"].detach(), 0.3 * exact) < 1e-12
    after = flat_policy(spec, (0.3 * exact).tolist())
    assert exact_return(after, mdp, gamma=1.0) > exact_return(policy, mdp, gamma=1.0)


def test_a_step_of_adagrad_or_adam_does_not_point_along_the_gradient() -> None:
    """Their first steps go as far along every coordinate, so unbiasedness of g says nothing of their direction."""
    g = torch.tensor([1.0, 0.1, -0.5], dtype=torch.float64)
    for spec, along in ((SgdSpec(), True), (AdaGradSpec(), False), (AdamSpec(), False)):
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        theta.grad = -g
        open_optimizer(spec, [theta]).step()
        moved = theta.detach()
        assert float(moved @ g) > 0
        assert (angle(moved, g) < 1e-4) is along
        assert (float((moved.abs() / moved.abs().max()).min()) > 0.99) is not along


def test_mass_moves_to_where_f_is_large() -> None:
    """One small step along E[f grad log P]: what is better than the mean gains, what is worse loses, and f raised by a
    constant everywhere makes the same step."""
    mdp = pgengine.TabularMDP(bandit(1.0, 2.0, 4.0))
    policy = flat_policy(mdp.spec, [[0.5, 0.0, -0.5], [0.0, 0.0, 0.0]])
    exact = exact_gradient(policy, mdp, gamma=1.0).reshape(2, 3)
    after = flat_policy(mdp.spec, (torch.tensor(policy.parameters["theta"]).double() + 0.01 * exact).tolist())
    before, moved = (log_policy(p, parameters_in_double(p))[0].exp().detach().numpy() for p in (policy, after))
    f = np.array([1.0, 2.0, 4.0])
    gains = np.sign(moved - before)
    assert gains[2] == 1.0
    assert gains[0] == -1.0
    assert moved @ f > before @ f
    raised = pgengine.TabularMDP(bandit(101.0, 102.0, 104.0))
    assert distance(exact_gradient(policy, raised, gamma=1.0).reshape(2, 3), exact) < 1e-11


@pytest.mark.slow
def test_a_gaussian_moves_to_where_f_is_large() -> None:
    """f = 1 on [1, 2]: steps from N(0, 1) bring more than 9 of 10 draws into it, where 0.136 were."""
    inside = lambda x, p: ((x > 1.0) & (x < 2.0)).double()  # noqa: E731
    make = lambda p: Normal(p["mean"], p["log_sigma"].exp())  # noqa: E731
    mass = lambda p: float(make(p).cdf(torch.tensor(2.0)) - make(p).cdf(torch.tensor(1.0)))  # noqa: E731
    p = {name: torch.tensor(0.0, dtype=torch.float64) for name in ("mean", "log_sigma")}
    masses = [mass(p)]
    for step in range(100):
        estimate = score_function_gradient(make, inside, p, draw_samples(make(p), 200, seed=step))
        p = {name: value + 0.2 * estimate.gradient[name] for name, value in p.items()}
        masses.append(mass(p))
    assert masses[0] == pytest.approx(0.1359, abs=1e-4)
    assert masses[1] > masses[0]
    assert masses[-1] > 0.9


# --- stochastic gradient descent (Sun) --------------------------------------------------------------------------------

X = torch.tensor([[1.0, 0.5], [1.0, -1.0], [1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
Y = torch.tensor([1.0, 0.2, 2.5, 0.4], dtype=torch.float64)
BEST = torch.linalg.lstsq(X, Y[:, None]).solution[:, 0]


def minus_loss(x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """Minus (f_theta(x) - y)^2 of examples by their number."""
    return -((X[x] @ p["theta"] - Y[x]) ** 2)


def data(p: dict[str, torch.Tensor]) -> Categorical:
    """Which example comes: free of theta, so that only the gradient of f is left."""
    return Categorical(probs=torch.full((4,), 0.25, dtype=torch.float64))


def test_supervised_learning_is_the_case_in_which_the_distribution_is_not_shaped() -> None:
    p = {"theta": torch.tensor([0.3, -0.4], dtype=torch.float64)}
    leaf = p["theta"].clone().requires_grad_()
    (exact,) = torch.autograd.grad(((X @ leaf - Y) ** 2).mean(), leaf)
    each = [score_function_gradient(data, minus_loss, p, torch.tensor([i]), baseline="none") for i in range(4)]
    mean = torch.stack([one.gradient["theta"] for one in each]).mean(0)
    assert distance(-mean, exact) < 1e-14  # E[g] = grad J


def descend(rate: Callable[[int], float], steps: int, runs: int) -> torch.Tensor:
    """Single-example SGD on the squared error, [runs, 2]."""
    theta = torch.tensor([2.0, -2.0], dtype=torch.float64).repeat(runs, 1)
    for step, i in enumerate(np.random.default_rng(0).integers(4, size=(steps, runs))):
        residual = (X[i] * theta).sum(dim=1) - Y[i]
        theta = theta - rate(step) * 2 * residual[:, None] * X[i]
    return theta


def test_on_a_convex_loss_decreasing_steps_reach_the_optimum_and_constant_ones_hover_about_it() -> None:
    """Mean squared distance from the least-squares solution over 50 runs of 3,000 steps. With Robbins-Monro steps it
    falls as 1/t, with constant ones it stays at about the step size times the noise."""
    falling, constant = (
        float((descend(rate, 3000, 50) - BEST).square().sum(dim=1).mean())
        for rate in (lambda t: 0.1 / (1 + t / 50), lambda t: 0.1)
    )
    assert falling < 1e-3
    assert constant > 10 * falling


def test_the_gradient_can_vanish_far_from_every_optimum() -> None:
    """A softmax that has made up its mind: the norm is below 1e-10, and J is 0 where 1 can be had."""
    spec = bandit(0.0, 1.0)
    policy, mdp = flat_policy(spec, [[30.0, 0.0], [0.0, 0.0]]), pgengine.TabularMDP(spec)
    assert float(exact_gradient(policy, mdp, gamma=1.0).norm()) < 1e-10
    assert exact_return(policy, mdp, gamma=1.0) < 1e-10


def forgetful() -> TabularSpec:
    """Action 0, then action 1, of two states that look alike: J = p (1 - p), best at p = 1/2, inside the simplex."""
    return TabularSpec(
        transitions=[[[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], *[[[0.0, 0.0, 1.0]] * 2] * 2],
        rewards=[[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        initial=[1.0, 0.0, 0.0],
        terminal=[2],
        horizon=2,
        observations=[0, 0, 1],
    )


@pytest.mark.slow
def test_decreasing_steps_drive_the_exact_gradient_to_zero_at_an_optimum_inside() -> None:
    """The engine's own training by SGD with Robbins-Monro steps, from p = 0.95: J rises from 0.0475 to within 1e-3 of
    its maximum 1/4, and the norm of the exact gradient falls below a tenth of what it was."""
    spec = forgetful()
    start = [[math.log(0.95 / 0.05), 0.0], [0.0, 0.0]]
    training = TrainingSpec(
        environment=spec,
        policy=LinearPolicySpec(initial_parameters={"theta": start}),
        algorithm={  # type: ignore[arg-type]
            "optimizer": {"kind": "sgd", "learning_rate": 2.0, "schedule": {"kind": "inverse_time", "scale": 50.0}},
            "trajectories": 16,
        },
        stop=StopSpec(updates=600),
        diagnostics_every=0,
        seed=0,
    )
    mdp = pgengine.TabularMDP(spec)
    before = flat_policy(spec, start)
    *_, last = pgengine.train(training)
    norms = [float(exact_gradient(policy, mdp, gamma=1.0).norm()) for policy in (before, last.policy)]
    assert exact_return(before, mdp, gamma=1.0) == pytest.approx(0.0475, abs=1e-6)
    assert exact_return(last.policy, mdp, gamma=1.0) > 0.249
    assert norms[1] < 0.1 * norms[0]
