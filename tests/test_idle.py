"""Settings that would do nothing, given the rest of a study, are refused by name; what acts, and what nobody wrote, is not."""

from pathlib import Path

import pytest
import yaml

from mech.errors import InputError
from study.spec import dump_spec, load_spec
from tests.tiny_study import STUDY, write_study

STUDIES = Path(__file__).parent.parent / "studies"
NAME_ALONE = {"layer": 1, "traits": ["trait.yaml"], "identity": ["name"]}
SWEPT = STUDY["sweeps"]["written"]


@pytest.mark.parametrize(
    ("change", "idle"),
    [
        ({"directions": NAME_ALONE | {"authorship": {"articles": 5}}}, r"directions\.authorship"),
        ({"directions": NAME_ALONE | {"self_report_at": ["prompt_last"]}}, r"directions\.self_report_at"),
        ({"directions": NAME_ALONE | {"assistant_axis_at": ["fixed_answer"]}}, r"directions\.assistant_axis_at"),
        ({"directions": NAME_ALONE | {"roles": 3}}, r"directions\.roles"),
        ({"directions": NAME_ALONE | {"presence": ["none"]}}, r"directions\.presence"),
        ({"directions": NAME_ALONE | {"elicitation": ["text"], "rollout_tokens": 9}}, r"directions\.rollout_tokens"),
        (
            {"directions": NAME_ALONE | {"rollout_temperature": 0, "rollout_samples": 3}},
            r"directions\.rollout_samples",
        ),
        (
            {"directions": NAME_ALONE | {"traits": [], "elicitation": ["text"]}},
            r"directions\.elicitation",
        ),
        ({"directions": NAME_ALONE | {"judge": {"model": "m", "samples": 2}}}, r"directions\.judge\.samples"),
        (
            {"directions": NAME_ALONE | {"judge": {"model": "m", "api": {}, "how": "text", "samples": 2}}},
            r"directions\.judge\.samples",
        ),
        (
            {"directions": NAME_ALONE | {"judge": {"model": "m", "api": {"wait_hours": 2}}}},
            r"directions\.judge\.api\.wait_hours",
        ),
        ({"monitoring": STUDY["monitoring"] | {"samples": 3}}, r"monitoring\.samples"),
        ({"patching": STUDY["patching"] | {"answers": ["zest"]}}, r"patching\.names"),
        ({"sweeps": {"a": SWEPT | {"evaluation": "log_odds"}}}, r"sweeps\.a\.max_new_tokens"),
        ({"sweeps": {"a": SWEPT | {"judge": {"model": "m"}, "quantile": 0.5}}}, r"sweeps\.a\.quantile"),
        ({"sweeps": {"a": SWEPT | {"judge": {"model": "m", "trait": 9}}}}, r"sweeps\.a\.judge\.trait"),
        ({"embedding": {"methods": [], "pooling": "response_mean"}}, r"embedding\.pooling"),
        ({"behaviour": {"self_report": {"temperature": 0, "samples": 2}}}, r"behaviour\.self_report\.samples"),
        ({"measure": STUDY["measure"] | {"own_text": ["base"]}}, r"measure\.own_text"),
        ({"data": STUDY["data"] | {"sgtr": STUDY["data"]["sgtr"] | {"own": "x.json"}}}, r"data\.sgtr\.max_new_tokens"),
        (
            {"data": STUDY["data"] | {"sgtr": STUDY["data"]["sgtr"] | {"match_lengths": False, "max_words": 9}}},
            r"data\.sgtr\.max_words",
        ),
        ({"training": STUDY["training"] | {"method": "full"}}, r"training\.lora_r"),
        (
            {
                "arms": {"base": [], "given": ["given"]},
                "benign": None,
                "steering": None,
                "measure": STUDY["measure"] | {"own_text": ["given"]},
                "trackers": ["tensorboard"],
            },
            "trackers",
        ),
        (
            {"stages": STUDY["stages"] | {"em": {"data": "em", "training": {"method": "full", "lora_alpha": 3}}}},
            r"stages\.em\.training\.lora_alpha",
        ),
        ({"model": STUDY["model"] | {"device_map": "auto", "device": "cpu"}}, r"model\.device"),
        (
            {"directions": None, "monitoring": None, "sweeps": {}, "patching": None, "steering": None, "measure": {"questions": 2},
             "stages": {"em": {"data": "em"}}, "arms": {"base": [], "em": ["em"]}, "benign": None},
            r"measure\.questions",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_would_do_nothing_is_refused(
    tmp_path: Path, change: dict[str, object], idle: str
) -> None:
    with pytest.raises(InputError, match=rf"study\.yaml: {idle}(\.\w+)? would do nothing: \w"):
        load_spec(write_study(tmp_path, **change))


def test_what_acts_or_was_not_written_is_not_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Defaults, also spelled out; settings that an override leaves without effect are warned of, its own refused."""
    alone = load_spec(write_study(tmp_path, directions=NAME_ALONE))
    (tmp_path / "resolved.yaml").write_text(dump_spec(alone))
    assert load_spec(tmp_path / "resolved.yaml") == alone
    file = write_study(tmp_path)
    assert not caplog.text
    load_spec(file, ["directions.identity=[name]"])
    assert "directions.roles does nothing here: assistant_axis is not in directions.identity" in caplog.text
    with pytest.raises(InputError, match=r"directions\.authorship would do nothing"):
        load_spec(file, ["directions.identity=[name]", "directions.authorship.articles=6"])
    caplog.clear()
    load_spec(write_study(tmp_path, arms={"base": [], "em": ["em"]}, benign=None, measure={}))
    assert "not used: stages.sgtr, stages.benign, stages.given, data.benign" in caplog.text


@pytest.mark.parametrize("study", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_setting_of_the_studies_that_come_along_acts(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_spec(study)
    if yaml.safe_load(study.read_text()).get("fast"):
        load_spec(study, fast=True)
    assert not caplog.text
