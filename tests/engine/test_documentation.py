"""What the engine makes public is documented."""

import inspect
import re
from pathlib import Path
from typing import get_args

import pgengine
from pgengine import labels
from pgengine.findings import FindingCode
from pgengine.spec import StopSpec, TrainingSpec
from tests.engine.worlds import PENDULUM, bandit

DOCS = Path(__file__).parents[2] / "docs"


def table_names(page: str) -> list[str]:
    return re.findall(r"^\| `([a-z_]+)` \|", (DOCS / "engine" / page).read_text(), flags=re.MULTILINE)


def test_every_public_name_has_a_docstring_and_the_list_is_sorted() -> None:
    names = pgengine.__all__
    assert names == sorted(names)
    assert set(names) == set(pgengine._HOME)
    for name in names:
        assert inspect.getdoc(getattr(pgengine, name)), name


def test_every_public_function_names_its_arguments_and_errors() -> None:
    for name in ("train", "evaluate", "create_policy", "describe", "resolve", "label"):
        function = getattr(pgengine, name)
        text = inspect.getdoc(function)
        assert text is not None
        for parameter in inspect.signature(function).parameters:
            if name != "describe":
                assert f"{parameter}: " in text, f"{name}: {parameter}"


def test_every_metric_is_documented() -> None:
    measured: set[str] = set()
    for environment in (bandit(0.0, 1.0), PENDULUM.model_copy(update={"max_episode_steps": 3})):
        (update,) = pgengine.train(TrainingSpec(environment=environment, stop=StopSpec(updates=1)))
        measured |= set(update.metrics)
    assert sorted(measured) == sorted(table_names("metrics.md"))


def test_every_reason_of_a_label_is_documented() -> None:
    kinds = [
        name for name in table_names("labels.md") if name in get_args(labels.Label.model_fields["kind"].annotation)
    ]
    assert kinds == list(get_args(labels.Label.model_fields["kind"].annotation))
    assert set(get_args(labels.ReasonCode)) == set(table_names("labels.md")) - set(kinds)


def test_every_code_of_a_finding_is_documented() -> None:
    assert table_names("findings.md") == list(get_args(FindingCode))


def test_every_field_of_a_setting_has_a_docstring() -> None:
    from pgengine import spec

    for name in spec.__all__:
        model = getattr(spec, name)
        if inspect.isclass(model):
            assert inspect.getdoc(model), name
            for field, info in model.model_fields.items():
                assert info.description, f"{name}.{field}"


def test_every_code_of_an_error_is_documented() -> None:
    source = "\n".join(path.read_text() for path in Path(pgengine.__file__).parent.rglob("*.py"))
    raised = re.findall(
        r"(?:SpecError|ObservationError)\((?:[^\"()]|\"[^\"]*\"|\([^()]*\))*?\s\"([a-z]+_?[a-z_]*)\",", source
    )
    documented = set(re.findall(r"`([a-z_]+)`", (DOCS / "errors.md").read_text()))
    assert len(set(raised)) >= 20
    assert set(raised) <= documented
