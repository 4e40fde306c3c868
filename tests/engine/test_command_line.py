"""`python -m pgengine` trains and evaluates without a server."""

import json
from pathlib import Path

import pytest

from pgengine.__main__ import main
from tests.engine.worlds import bandit


def test_train_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "policy.safetensors"
    assert main(["train", "CartPole-v1", "--seed", "1", "--updates", "2", "--output", str(policy)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("label: exact\nupdate     1  mean return")
    assert '"stopped_by": "updates"' in printed
    assert main(["evaluate", str(policy), "CartPole-v1", "--episodes", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 5


def test_a_spec_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"environment": bandit(0.0, 1.0).model_dump(), "stop": {"updates": 1}}))
    assert main(["train", str(file)]) == 0
    assert "update     1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["train", "NoSuch-v1"], ["train", "missing.json"], ["evaluate", "x", "y"]])
def test_mistakes_end_with_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("pgengine: ")
    assert error.count("\n") == 1
