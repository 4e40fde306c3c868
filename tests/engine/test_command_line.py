"""`python -m pgengine` trains, evaluates, checks gradients and explains updates without a server."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import pgengine
from pgengine.__main__ import main
from pgengine.spec import (
    AlgorithmSpec,
    GradientCheckSpec,
    GymnasiumSpec,
    LinearPolicySpec,
    LqrSpec,
    StopSpec,
    TabularSpec,
    TrainingSpec,
)
from tests.engine import foreign_environments  # noqa: F401  registers what others wrote
from tests.engine.worlds import CARTPOLE, bandit, random_mdp, table_policy

MDP = random_mdp(0)
LQR = LqrSpec(
    dynamics=[[0.9]], control=[[1.0]], state_cost=[[1.0]], action_cost=[[0.1]], noise_deviation=[0.1], horizon=5
)
ESTIMATORS = [
    AlgorithmSpec(gamma=0.9, trajectories=2),
    AlgorithmSpec(gamma=0.9, discount_weight="none", trajectories=2),
]


# one step leads on or round in a circle, so that a policy may never end an episode
ENDLESS = TabularSpec(
    transitions=[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]] * 2],
    rewards=[[0.0, 1.0], [0.0, 0.0]],
    initial=[1.0, 0.0],
    terminal=[1],
)


def written(path: Path, spec: pgengine.TrainingSpec | GradientCheckSpec | LqrSpec) -> str:
    path.write_text(spec.model_dump_json(exclude_unset=True))
    return str(path)


def as_json(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return str(path)


def kept(path: Path, policy: pgengine.Policy) -> str:
    path.write_bytes(policy.to_bytes())
    return str(path)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says before it does anything."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("pgengine: ").rstrip("\n")


@pytest.mark.slow
def test_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.safetensors"
    assert main(["train", "CartPole-v1", "--seed", "1", "--updates", "2", "--output", str(policy)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("label: exact\nupdate     1  mean return")
    assert '"stopped_by": "updates"' in printed
    assert main(["evaluate", str(policy), "CartPole-v1", "--episodes", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 5
    assert main(["train", "CartPole-v1", "--updates", "1", "--policy", str(policy)]) == 0
    assert "update     3  mean return" in capsys.readouterr().out


def test_a_policy_that_has_passed_the_threshold_is_trained_for_as_long_as_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of FrozenLake-v1 without slips, whose id has a threshold of 0.70, and from whose start this policy leads on."""
    way = {0: 1, 4: 1, 8: 2, 9: 1, 13: 2, 14: 2}
    table = [[20.0 * (way.get(state) == action) for action in range(4)] for state in range(16)]
    lake = GymnasiumSpec(id="FrozenLake-v1", arguments={"is_slippery": False})
    known = LinearPolicySpec(initial_parameters={"theta": table})
    policy = pgengine.create_policy(known, lake, pgengine.describe(lake), seed=0)
    (tmp_path / "policy").write_bytes(policy.to_bytes())
    file = as_json(tmp_path / "spec.json", {"environment": lake.model_dump()})
    assert main(["train", file, "--policy", str(tmp_path / "policy"), "--updates", "3"]) == 0
    printed = capsys.readouterr().out
    assert "update     3" in printed
    assert '"stopped_by": "updates"' in printed


def test_an_explanation_is_of_the_run_that_train_makes_of_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one that publishes its table, for which more than the policy is filled in."""
    environment = GymnasiumSpec(id="pgengine/Bandit-v0")
    (made,) = pgengine.train(TrainingSpec(environment=environment, stop=StopSpec(updates=1)))
    assert main(["explain", "pgengine/Bandit-v0", "--json"]) == 0
    shown = pgengine.Explanation.model_validate_json(capsys.readouterr().out)
    assert shown.episodes_total == 128
    assert shown.estimate_norm == pytest.approx(made.metrics["gradient_norm"], rel=1e-5)


def test_a_run_that_learned_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = as_json(tmp_path / "spec.json", {"environment": bandit(1.0, 1.0).model_dump()})
    assert main(["train", file, "--updates", "6"]) == 0
    printed = capsys.readouterr().out
    (finding,) = json.loads(printed[printed.index("\n{") :])["findings"]
    assert finding["code"] == "returns_alike"
    assert "in each of the 6 updates" in finding["message"]
    assert "algorithm.entropy" in finding["suggestion"]


def test_training_prints_that_an_environment_cannot_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, expected in (("FromNumpy", 1), ("Drawing", 0)):
        drawing = {"kind": "gymnasium", "id": f"foreign/{name}-v0"}
        file = as_json(tmp_path / "spec.json", {"environment": drawing, "evaluation": {"episodes": 2}})
        assert main(["train", file, "--updates", "1"]) == 0
        printed = capsys.readouterr().out.splitlines()
        told = [line for line in printed if line.startswith("not_repeatable: played twice")]
        assert len(told) == expected


def test_a_spec_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"environment": bandit(0.0, 1.0).model_dump(), "stop": {"updates": 1}}))
    assert main(["train", str(file)]) == 0
    assert "update     1" in capsys.readouterr().out


def test_an_environment_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = TrainingSpec.model_validate({"environment": LQR.model_dump(), "policy": {"kind": "linear"}})
    policy = tmp_path / "policy.safetensors"
    training = written(tmp_path / "training.json", spec)
    assert main(["train", training, "--updates", "1", "--output", str(policy)]) == 0
    capsys.readouterr()
    # written without its defaults, an environment still says its kind
    (tmp_path / "lqr.json").write_text(LQR.model_dump_json())
    assert main(["evaluate", str(policy), str(tmp_path / "lqr.json"), "--episodes", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_length"] == 5.0


def test_a_check_is_a_table_for_people_and_json_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = GradientCheckSpec(environment=MDP, estimators=ESTIMATORS, mode="enumerate")
    (tmp_path / "check.json").write_text(spec.model_dump_json())
    policy = tmp_path / "policy.safetensors"
    policy.write_bytes(table_policy(MDP).to_bytes())
    arguments = ["check", str(tmp_path / "check.json"), "--policy", str(policy)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("objective: expected return discounted by 0.9")
    assert lines[-2].split("  ")[0] == "reward_to_go, leave_one_out over time_step, K=2, gamma=0.9"
    assert " agrees " in lines[-2]
    assert "without gamma^t" in lines[-1]
    assert " differs " in lines[-1]
    assert main([*arguments, "--json"]) == 0
    result = pgengine.GradientCheck.model_validate_json(capsys.readouterr().out)
    assert [report.verdict for report in result.estimators] == ["agrees", "differs"]
    assert main([*arguments, "--json", "--mode", "sample", "--batches", "30", "--seed", "4"]) == 0
    sampled = pgengine.GradientCheck.model_validate_json(capsys.readouterr().out)
    expected = pgengine.check_gradient(MDP, table_policy(MDP), ESTIMATORS, batches=30, seed=4)
    assert sampled.estimators == expected.estimators


def test_a_check_by_id(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "FrozenLake-v1", "--batches", "8"]) == 0
    assert "64 parameters" in capsys.readouterr().out


def test_an_update_is_explained_in_words_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = TrainingSpec.model_validate(
        {"environment": MDP, "policy": {"kind": "linear"}, "algorithm": {"gamma": 0.9, "trajectories": 3}, "seed": 2}
    )
    (tmp_path / "training.json").write_text(spec.model_dump_json())
    arguments = ["explain", str(tmp_path / "training.json"), "--update", "2"]
    assert main([*arguments, "--episodes", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("update 2, an estimate from 3 episodes (")
    assert "\nepisode 0: " in printed
    assert "|contribution|" in printed
    assert "exact gradient" in printed
    assert main([*arguments, "--episodes", "3", "--json"]) == 0
    worked = pgengine.Explanation.model_validate_json(capsys.readouterr().out)
    assert worked == pgengine.explain(spec, 2, episodes=3)
    for update in pgengine.train(spec):
        (tmp_path / "state.safetensors").write_bytes(update.state())
        break
    assert main([*arguments, "--episodes", "3", "--json", "--state", str(tmp_path / "state.safetensors")]) == 0
    assert pgengine.Explanation.model_validate_json(capsys.readouterr().out) == worked


def test_ratios_and_entropy_are_columns_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    algorithm = {
        "trajectories": 2,
        "entropy": {"coefficient": 0.1},
        "importance": {"kind": "trajectory", "behaviour": {"kind": "policy"}},
    }
    (tmp_path / "training.json").write_text(json.dumps({"environment": MDP.model_dump(), "algorithm": algorithm}))
    (tmp_path / "other.safetensors").write_bytes(table_policy(MDP).to_bytes())
    behaviour = ["--behaviour", str(tmp_path / "other.safetensors")]
    assert main(["explain", str(tmp_path / "training.json"), *behaviour]) == 0
    printed = capsys.readouterr().out
    assert "  ratio  " in printed
    assert "  entropy weight  " in printed
    for command in (["explain"], ["train", "--updates", "1"]):
        missing = refusal([*command, str(tmp_path / "training.json")], capsys).split(": ", 1)
        assert missing[0] == "/algorithm/importance/behaviour"
        assert "--behaviour" in missing[1]


@pytest.mark.parametrize("arguments", [
    ["train", "NoSuch-v1"],
    ["train", "missing.json"],
    ["evaluate", "x", "y"],
    ["check", "CartPole-v1"],
    ["check", "FrozenLake-v1", "--batches", "1"],
    ["check", "FrozenLake-v1", "--mode", "enumerate", "--json"],
    ["explain", "CartPole-v1", "--update", "0"],
    ["explain", "CartPole-v1", "--first-episode", "16", "--json"],
    ["explain", "NoSuch-v1"],
])  # fmt: skip
def test_mistakes_end_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("pgengine: ")
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_json_alone_on_standard_output() -> None:
    command = [sys.executable, "-m", "pgengine", "explain", "CartPole-v1", "--max-steps", "3", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert pgengine.Explanation.model_validate_json(finished.stdout).update == 1
    assert finished.stderr == ""


# --- what is refused, and in whose words ------------------------------------------------------------------------------


def test_pointers_lead_into_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the root of the file, without the kinds that were tried on the way."""
    short = MDP.model_dump(mode="json", exclude_none=True)
    short["transitions"][0][0][0] /= 2
    wrong = json.loads(json.dumps(short))
    wrong["transitions"][0][0][0] = -1
    environment = as_json(tmp_path / "environment.json", short)
    policy = kept(tmp_path / "policy.safetensors", table_policy(MDP))
    theta = {"environment": MDP.model_dump(), "policy": {"kind": "linear", "initial_parameters": {"theta": [1.0]}}}
    for command in ("train", "explain", "check"):
        for cell, table in (("/environment/transitions/0/0", short), ("/environment/transitions/0/0/0", wrong)):
            file = as_json(tmp_path / "spec.json", {"environment": table})
            assert refusal([command, file], capsys).startswith(f"{cell}: ")
        told = refusal([command, as_json(tmp_path / "theta.json", theta)], capsys)
        assert told.startswith("/policy/initial_parameters/theta: ")
    assert refusal(["evaluate", policy, environment], capsys).startswith("/transitions/0/0: ")
    nobody = {"environment": {"kind": "tabular", "initial": [1.0]}}
    assert refusal(["train", as_json(tmp_path / "spec.json", nobody)], capsys).startswith("/environment/transitions: ")
    assert refusal(["train", "CartPole-v1", "--updates", "0"], capsys).startswith("/stop/updates: ")
    assert refusal(["train", "CartPole-v1", "--seed", "-1"], capsys).startswith("/seed: ")
    (tmp_path / "broken.json").write_text("{")
    for command in (["train"], ["evaluate", policy]):
        assert refusal([*command, str(tmp_path / "broken.json")], capsys).startswith("Invalid JSON")
    # another environment's policy belongs to no field
    assert refusal(["train", "CartPole-v1", "--policy", policy], capsys).startswith("the observation space ")


def test_an_environment_and_a_spec_are_not_taken_for_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = kept(tmp_path / "policy.safetensors", table_policy(MDP))
    training = as_json(tmp_path / "training.json", {"environment": MDP.model_dump()})
    environment = as_json(tmp_path / "environment.json", MDP.model_dump())
    assert "expected an environment" in refusal(["evaluate", policy, training], capsys)
    for command in ("train", "check", "explain"):
        assert "found an environment" in refusal([command, environment], capsys)


def test_a_behaviour_that_nobody_asks_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = kept(tmp_path / "policy.safetensors", table_policy(MDP))
    file = as_json(tmp_path / "spec.json", {"environment": MDP.model_dump()})
    for command in (["train", file], ["explain", file], ["check", file], ["check", "FrozenLake-v1"]):
        assert refusal([*command, "--behaviour", policy], capsys).startswith("--behaviour: ")


def test_an_id_without_a_limit_takes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy, limit = str(tmp_path / "policy.safetensors"), ["--max-episode-steps", "5"]
    for command in ("train", "check", "explain"):
        assert "--max-episode-steps" in refusal([command, "CliffWalking-v1"], capsys)
    assert main(["train", "CliffWalking-v1", "--updates", "1", "--output", policy, *limit]) == 0
    assert '"mean_length": 5.0' in capsys.readouterr().out
    assert "--max-episode-steps" in refusal(["evaluate", policy, "CliffWalking-v1"], capsys)
    assert main(["evaluate", policy, "CliffWalking-v1", "--episodes", "2", *limit]) == 0
    assert json.loads(capsys.readouterr().out)["mean_length"] == 5.0
    assert main(["check", "CliffWalking-v1", "--batches", "8", "--json", *limit]) == 0
    objective = pgengine.GradientCheck.model_validate_json(capsys.readouterr().out).objective
    assert (objective.max_episode_steps, objective.limit_from) == (5, "declared")
    assert main(["explain", "CliffWalking-v1", "--json", *limit]) == 0
    assert pgengine.Explanation.model_validate_json(capsys.readouterr().out).steps_total == 128 * 5
    file = as_json(tmp_path / "spec.json", {"environment": MDP.model_dump()})
    assert refusal(["train", file, *limit], capsys).startswith("--max-episode-steps")


@pytest.mark.parametrize("arguments", [
    ["explain", "CartPole-v1", "--episodes", "0"],
    ["explain", "CartPole-v1", "--max-steps", "-1"],
    ["explain", "CartPole-v1", "--max-steps", "few"],
    ["train", "CliffWalking-v1", "--max-episode-steps", "0"],
    ["evaluate", "x", "CartPole-v1", "--gamma", "1.5"],
    ["evaluate", "x", "CartPole-v1", "--gamma", "nan"],
    ["evaluate", "x", "CartPole-v1", "--gamma", "half"],
])  # fmt: skip
def test_numbers_that_make_no_sense_are_refused_where_they_stand(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert f"argument {arguments[-2]}: expected a" in capsys.readouterr().err


# --- what would be lost -----------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path / "nowhere" / "policy.safetensors", tmp_path):
        assert refusal(["train", "CartPole-v1", "--output", str(output)], capsys).startswith("--output: ")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_command_leaves_the_file_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "policy.safetensors").write_bytes(b"as it was")
    refusal(["train", "NoSuch-v1", "--output", str(tmp_path / "policy.safetensors")], capsys)
    assert (tmp_path / "policy.safetensors").read_bytes() == b"as it was"


class Interrupting(gymnasium.Env[np.ndarray, int]):
    """Somebody presses Ctrl-C in its n-th step, counted over all episodes; n = 0: while it is made."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    steps = 0

    def __init__(self, after: int = 0) -> None:
        self.after = after
        if after == 0:
            signal.raise_signal(signal.SIGINT)

    def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Interrupting.steps += 1
        if Interrupting.steps == self.after:
            signal.raise_signal(signal.SIGINT)
        return np.zeros(4, np.float32), 0.0, True, False, {}


gymnasium.register("Interrupting-v0", entry_point=Interrupting, max_episode_steps=1)


@pytest.mark.parametrize("command", [["train"], ["evaluate", "POLICY"], ["check"], ["explain"]])
def test_ctrl_c_ends_with_one_line(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = pgengine.create_policy(pgengine.MlpPolicySpec(), CARTPOLE, pgengine.describe(CARTPOLE), seed=0)
    file = kept(tmp_path / "policy.safetensors", policy)
    assert main([file if word == "POLICY" else word for word in command] + ["Interrupting-v0"]) == 130
    assert capsys.readouterr().err == "pgengine: interrupted\n"


def test_a_policy_is_kept_before_it_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last step of a whole run is part of the evaluation; a second run is interrupted there."""

    def trained(after: int, kept: str) -> int:
        world = {"kind": "gymnasium", "id": "Interrupting-v0", "arguments": {"after": after}}
        file = as_json(tmp_path / "spec.json", {"environment": world, "stop": {"updates": 1}})
        Interrupting.steps = 0
        return main(["train", file, "--output", str(tmp_path / kept)])

    assert trained(1_000_000, "whole.safetensors") == 0
    last = Interrupting.steps
    capsys.readouterr()
    assert trained(last, "policy.safetensors") == 130
    assert capsys.readouterr().err == "pgengine: interrupted\n"
    assert Interrupting.steps == last
    assert pgengine.load(tmp_path / "policy.safetensors").updates == 1


# --- episodes that need not end ---------------------------------------------------------------------------------------


def test_a_policy_is_not_evaluated_where_episodes_may_never_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = as_json(tmp_path / "environment.json", ENDLESS.model_dump())
    algorithm = {"gamma": 0.5, "discount": "termination"}
    training = as_json(tmp_path / "training.json", {"environment": ENDLESS.model_dump(), "algorithm": algorithm})
    policy = str(tmp_path / "policy.safetensors")
    assert main(["train", training, "--updates", "1", "--output", policy]) == 0
    capsys.readouterr()
    told = refusal(["evaluate", policy, environment], capsys)
    assert told.startswith("/horizon: ")
    assert "--gamma" in told
    assert main(["evaluate", policy, environment, "--gamma", "0.5", "--seed", "3"]) == 0
    found = pgengine.Evaluation.model_validate_json(capsys.readouterr().out)
    assert found == pgengine.evaluate(pgengine.load(Path(policy).read_bytes()), ENDLESS, seed=3, survival=0.5)


# --- batches that cannot be learned from ------------------------------------------------------------------------------


@pytest.mark.parametrize(("least", "learned"), [(0.9, False), (0.0, True)])
def test_a_batch_that_was_not_learned_from_is_named(
    least: float, learned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    importance = {
        "kind": "trajectory", "behaviour": {"kind": "policy"}, "minimum_effective_sample_size": least,
    }  # fmt: skip
    spec = {
        "environment": MDP.model_dump(),
        "policy": {"kind": "linear", "initial_parameters": {"theta": [[3.0, 0.0]] * 3}},
        "algorithm": {"importance": importance},
    }
    file = as_json(tmp_path / "training.json", spec)
    other = kept(tmp_path / "other.safetensors", table_policy(MDP))
    assert main(["explain", file, "--behaviour", other]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("step of adam at rate 0.01")
    assert last.endswith(" norm 0: the batch was not learned from, its effective sample size is too small") != learned
    assert main(["explain", file, "--behaviour", other, "--json"]) == 0
    worked = pgengine.Explanation.model_validate_json(capsys.readouterr().out)
    assert worked.unusable == (None if learned else "effective_sample_size")
    assert (worked.step.norm > 0.0) == learned
    assert worked.estimate_norm > 0.0
