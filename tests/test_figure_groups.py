"""Which arms stand together in a picture: as a study says, or by what they have in common."""

from pathlib import Path
from typing import Any

import pytest

from mech.errors import InputError
from study.figure_groups import MOST_ARMS, figure_groups
from study.spec import load_spec
from tests.tiny_study import write_study

STUDIES = Path(__file__).parent.parent / "studies"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("own", [True, False])
def test_every_arm_of_a_shipped_study_is_in_a_readable_picture(path: Path, own: bool) -> None:
    spec = load_spec(path, [] if own else ["figures.groups={}"])
    groups = figure_groups(spec)
    trained = {name for name, stages in spec.arms.items() if stages}
    if len(trained) <= MOST_ARMS and not spec.figures.groups:
        assert groups == {}
        return
    assert {arm for members in groups.values() for arm in members} == trained
    assert all(0 < len(members) <= MOST_ARMS + 1 for members in groups.values())
    if not own:
        assert sum(map(len, groups.values())) == len(trained), "by default each arm stands in one picture"
        assert max(map(len, groups.values())) <= MOST_ARMS


def test_arms_are_grouped_by_what_they_share(tmp_path: Path) -> None:
    spec = load_spec(STUDIES / "paper_qwen2.5_32b.yaml", ["figures.groups={}"])
    groups = figure_groups(spec)
    for name, members in groups.items():
        common = name.partition(" ")[0]
        if name.startswith("others"):
            assert all(len(spec.arms[arm]) == 1 for arm in members)
        else:
            place = 0 if " first" in name else -1
            assert all(spec.arms[arm][place] == common for arm in members)
    few = load_spec(write_study(tmp_path))
    assert figure_groups(few) == {}


def study(tmp_path: Path, groups: dict[str, Any]) -> dict[str, list[str]]:
    return figure_groups(load_spec(write_study(tmp_path, figures={"groups": groups})))


def test_a_study_says_which_arms_go_into_which_picture(tmp_path: Path) -> None:
    groups = {"em": ["em", "em_*", "!em_early"], "rest": ["benign", "given"], "none": ["no_such_*"]}
    assert study(tmp_path, groups) == {"em": ["em", "em_then_sgtr"], "rest": ["benign", "given"]}
    gridded = write_study(tmp_path, grid={"x": ["em", "benign"]}, figures={"groups": {"{x}": ["{x}*"]}})
    assert figure_groups(load_spec(gridded)) == {
        "em": ["em", "em_then_sgtr", "em_early"],
        "benign": ["benign"],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": ["emm"]}, r"figures\.groups\.a: 'emm' is not defined"),
        ({"a": ["*", "!emm"]}, "'emm' is not defined"),
        ({"a": ["x*"], "b": ["y*"]}, "no pattern fits an arm"),
        ({"{x}": ["em"]}, r"figures\.groups.*the grid has no 'x'"),
        ({"a": "em"}, r"figures\.groups\.a"),
    ],
)
def test_a_group_that_cannot_be_is_refused(tmp_path: Path, groups: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study(tmp_path, groups)
