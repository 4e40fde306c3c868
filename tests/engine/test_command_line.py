"""`python -m pgengine` trains, evaluates, checks gradients and explains updates without a server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pgengine
from pgengine.__main__ import main
from pgengine.spec import AlgorithmSpec, GradientCheckSpec, LqrSpec, TrainingSpec
from tests.engine.worlds import bandit, random_mdp, table_policy

MDP = random_mdp(0)
LQR = LqrSpec(
    dynamics=[[0.9]], control=[[1.0]], state_cost=[[1.0]], action_cost=[[0.1]], noise_deviation=[0.1], horizon=5
)
ESTIMATORS = [
    AlgorithmSpec(gamma=0.9, trajectories=2),
    AlgorithmSpec(gamma=0.9, discount_weight="none", trajectories=2),
]


def written(path: Path, spec: pgengine.TrainingSpec | GradientCheckSpec | LqrSpec) -> str:
    path.write_text(spec.model_dump_json(exclude_unset=True))
    return str(path)


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
    assert main(["explain", str(tmp_path / "training.json")]) == 2
    assert capsys.readouterr().err.startswith("pgengine: /algorithm/importance/behaviour: ")


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
