"""What holds of every figure: on disk, by groups, from empty tables and under hostile names."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import plots
from analysis.gallery import draw_figures
from analysis.plot_frame import label
from mech.errors import InputError
from tests import synthetic_study as study
from tests.drawn import SHIFT, SMALL, axes_of

HOSTILE = '"><img src=x onerror=alert(1)>$\\frac{'


def test_saved_files(tmp_path):
    frame = study.self_recognition()
    figure = plots.self_recognition_bars(frame)
    words = plots.caption("self_recognition_bars", frame, name="recognition")
    saved = plots.save_figure(figure, frame, tmp_path, "recognition", words)
    pd.testing.assert_frame_equal(pd.read_csv(saved.csv), frame)
    assert saved.title == "Does the model recognise its own text?"
    assert "n = 200 articles; one seed (0)" in words
    assert "Numbers: recognition.csv." in words
    assert saved.png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    again = plots.save_figure(
        figure, frame, tmp_path / "again", "recognition", words
    )  # the figure was left as it was
    assert again.svg.read_bytes() == saved.svg.read_bytes()
    assert again.png.read_bytes() == saved.png.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "again",
        "recognition.csv",
        "recognition.png",
        "recognition.svg",
    ]
    assert b"dc:date" not in saved.svg.read_bytes()
    with pytest.raises(InputError, match="figure name"):
        plots.save_figure(figure, frame, tmp_path, "../up", words)
    with pytest.raises(InputError, match="no figure 'nope'"):
        plots.caption("nope", frame, name="x")


def test_svg_is_byte_identical_in_another_process(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests import synthetic_study as s; from analysis import plots\n"
        "f = s.shifts(layers=5, directions=['evil:text'])\n"
        "plots.save_figure(plots.arm_direction_heatmap(f, layer=2, condition='none'), f, "
        "Path(sys.argv[1]), 'a', 'c')\n"
        "plots.save_figure(plots.shift_by_layer(f, direction='evil:text', condition='none'), f, "
        "Path(sys.argv[1]), 'b', 'c')\n"
    )
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "one")],
        check=True, timeout=120, env={"PYTHONPATH": f"{here}:{here.parent}", "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    frame, here = study.shifts(layers=5, directions=["evil:text"]), tmp_path / "two"
    plots.save_figure(plots.arm_direction_heatmap(frame, layer=2, condition="none"), frame, here, "a", "c")
    plots.save_figure(plots.shift_by_layer(frame, **SHIFT), frame, here, "b", "c")
    for file in ("a.svg", "b.svg"):
        assert (tmp_path / "one" / file).read_bytes() == (here / file).read_bytes()


def test_a_figure_is_laid_out_once_and_drawn_once_a_file(tmp_path, monkeypatch):
    drawn = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: drawn.append(1) or draw(self, renderer))
    frame = study.self_recognition()
    plots.save_figure(plots.self_recognition_bars(frame), frame, tmp_path, "recognition", "c")
    assert len(drawn) == 2


def test_names_from_files_are_only_text(tmp_path):
    frame = study.shifts(layers=4, arms=["base", "em"], directions=["evil:text"])
    frame = frame.assign(arm=HOSTILE, direction=HOSTILE + "\x00字")
    figure = plots.shift_by_layer(frame, **{**SHIFT, "direction": HOSTILE + "\x00字"})
    saved = plots.save_figure(figure, frame, tmp_path, "hostile", HOSTILE)
    tags = {element.tag.rsplit("}", 1)[-1] for element in ET.parse(saved.svg).iter()}
    assert tags.isdisjoint({"script", "img", "foreignObject", "a"})
    assert label("a\x00字b") == "a??b"
    assert label("x" * 50) == "x" * 27 + "…"


def test_the_callers_matplotlib_settings_survive():
    before = dict(mpl.rcParams)
    plots.loss_curves(study.training(steps=3))
    assert dict(mpl.rcParams) == before
    assert "matplotlib.pyplot" not in plots.__dict__


def test_gallery_draws_what_was_measured_and_nothing_else(tmp_path):
    shifts = study.shifts(**SMALL)
    tables = {
        "shifts": pd.concat([shifts, shifts.assign(condition="default")], ignore_index=True),
        "training": study.training(steps=4),
        "steering": study.steering().iloc[:0],
    }
    figures = draw_figures(tables, tmp_path, layer=3, condition="none")
    assert [f.name for f in figures] == [
        "arm_direction_heatmap", "shift_by_condition", "shift_by_layer_evil-text", "shift_by_layer_identity-name", "loss_curves",
    ]  # fmt: skip
    heat = pd.read_csv(figures[0].csv)
    assert set(heat["layer"]) == {3}
    both = pd.read_csv(figures[1].csv)
    assert set(both["condition"]) == {"none", "default"}
    assert set(both["layer"]) == {3}
    evil = pd.read_csv(figures[2].csv)
    assert set(evil["direction"]) == {"evil:text"}
    assert set(evil["condition"]) == {"none"}
    assert draw_figures({}, tmp_path, layer=3, condition="none") == []


def test_many_trainings_are_shown_some_at_a_time(tmp_path):
    stages = [f"em{i:02}" for i in range(25)]
    written = study.lora_alignment_by_layer(stages=stages, names=["evil:text"], layers=3)
    pairs = [(a, b) for i, a in enumerate(stages) for b in stages[:i]]
    shared = pd.DataFrame(pairs, columns=["stage", "other"]).assign(
        seed=0, n_maps=3, shared=0.1, expected=0.06, null_high=0.07, p_random=0.2
    )
    figures = draw_figures(
        {"lora_alignment_by_layer": written, "lora_overlap": shared}, tmp_path, layer=1, condition="none"
    )
    alone = [f"lora_alignment_0{i}" for i in (1, 2, 3)]
    assert [f.name for f in figures] == [
        *alone,
        "lora_overlap_01",
        "lora_overlap_02",
    ]  # the first is nobody's `stage`
    shown = [pd.read_csv(f.csv)["stage"].unique() for f in figures[:3]]
    assert max(map(len, shown)) <= 12
    assert [stage for part in shown for stage in part] == stages
    assert sum(len(pd.read_csv(f.csv)) for f in figures[3:]) == len(pairs)
    assert figures[1].title.endswith("· trainings 10 to 18 of 25")
    wide = plots.lora_overlap(shared[shared["stage"].isin(stages[18:])]).axes[0]
    assert len(wide.texts) == sum(range(18, 25))  # each pair once


def test_pictures_of_many_arms_are_wrapped_and_name_them_whole():
    arms = ["base", *(f"em_domain{i:02}_then_something" for i in range(13))]
    split = pd.concat([study.two_by_two(arms=["base", "em"]).assign(arm=arm) for arm in arms[1:]])
    figure = plots.two_by_two_bars(split, layer=15, arms=arms)
    names = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert names == arms[1:]
    figure.draw_without_rendering()
    boxes = [t.get_window_extent().x1 for t in figure.axes[0].get_xticklabels()]
    assert min(np.diff(boxes)) > 20  # their ends, which stand below their bars, keep apart
    points = pd.concat(
        [
            study.embedding(arms=["base", "em"], points=4, conditions=("none", "empty")).assign(arm=arm)
            for arm in arms
        ]
    )
    wide = plots.embedding(points, method="pca", layer=15, arms=arms)
    assert wide.get_size_inches()[0] < 12
    assert wide.axes[0].get_title(loc="left") == f"{arms[1]}\nnone"


def test_seeds_of_a_condition_stand_around_their_mean():
    frame = study.shifts(**{**SMALL, "seeds": (0, 1, 2)}).query("layer == 3")
    (axes, *_) = plots.shift_by_condition(frame, layer=3).axes
    em = frame[(frame["arm"] == "em") & (frame["direction"] == frame["direction"].iloc[0])]
    means = [line.get_ydata()[0] for line in axes.get_lines() if line.get_marker() == "o"]
    assert em["sd"].mean() in means
    (seeds,) = (c.lines[0].get_ydata() for c in axes.containers if c.get_label() == "em none")
    np.testing.assert_array_equal(seeds, em["sd"])


def test_nothing_sticks_out_of_the_figure():
    arms = ["base", "em", "an_arm_with_quite_a_long_name_for_a_key"]
    shifts = study.shifts(layers=6, directions=["evil:text", "identity:name"])
    shifts = shifts.assign(arm=shifts["arm"].replace({"sgtr": arms[-1]}))
    prompts = ["default", "none", "other:" + "x" * 40]
    conditions = [shifts.assign(condition=prompt) for prompt in prompts]
    recognition = study.self_recognition().assign(arm=[arms[i % len(arms)] for i in range(6)], seed=range(6))
    figures = [
        plots.shift_by_condition(pd.concat(conditions, ignore_index=True), layer=3),
        plots.direction_cosines(study.direction_cosines()),
        plots.identity_cosines(study.identity_cosines()),
        plots.identity_transfer(study.identity_transfer()),
        plots.loss_curves(study.training(steps=5)),
        plots.shift_by_layer(shifts, **SHIFT, layer=3),
        plots.arm_direction_heatmap(shifts, layer=3, condition="none"),
        plots.self_recognition_bars(recognition),
        plots.self_report_bars(study.self_report()),
        plots.dose_response(study.steering()),
        plots.direction_quality(study.directions(layers=6)),
        plots.embedding(study.embedding(points=6), method="umap", layer=15),
        plots.two_by_two_bars(study.two_by_two()),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert box.x0 >= -0.02
        assert box.y0 >= -0.02
        assert box.x1 <= width + 0.02
        assert box.y1 <= height + 0.02
        low = min(axes.get_tightbbox().y0 for axes in figure.axes if axes.axison)
        assert all(legend.get_window_extent().y1 <= low + 1 for legend in figure.legends)


def test_many_arms_are_drawn_by_groups(tmp_path):
    arms = ["base", *(f"{em}_then_{y}" for em in ("x", "y") for y in "abcde"), "alone"]
    groups = {"x first": arms[1:6], "y first": arms[6:11], "x/first": ["alone"], "nobody": ["absent"]}
    shifts = study.shifts(layers=4, arms=arms, directions=["evil:text"], seeds=(0, 1))
    report = pd.concat([study.self_report(arms=["base"], conditions=["none"]).assign(arm=a) for a in arms])
    few = study.two_by_two()
    training = pd.concat(
        [study.training(steps=3).assign(stage=f"{a}+em") for a in arms] + [study.training(steps=3)]
    )
    tables = {
        "shifts": shifts,
        "self_report": report,
        "two_by_two": few.assign(condition="none", layer=3),
        "training": training,
    }
    figures = {
        f.name: f for f in draw_figures(tables, tmp_path, layer=3, condition="none", arms=arms, groups=groups)
    }
    assert list(figures) == [
        *(f"arm_direction_heatmap_{g}" for g in ("01_x-first", "02_y-first", "03_x-first")), "shift_by_layer_evil-text",
        *(f"self_report_bars_{g}" for g in ("01_x-first", "02_y-first", "03_x-first")), "two_by_two_bars", "loss_curves"]  # fmt: skip
    assert figures["arm_direction_heatmap_02_y-first"].title.endswith("· y first")
    shown = pd.read_csv(figures["self_report_bars_02_y-first"].csv)
    assert set(shown["arm"]) == {"base", *arms[6:11]}
    assert set(pd.read_csv(figures["shift_by_layer_evil-text"].csv)["arm"]) == set(arms[1:])
    figure = plots.shift_by_layer_in_groups(
        shifts, groups=groups, direction="evil:text", condition="none", layer=3
    )
    titled = {axes.get_title("left"): axes for axes in figure.axes if axes.get_title("left")}
    assert list(titled) == ["x first", "y first", "x/first"]
    lines = {line.get_label(): line.get_ydata() for line in titled["y first"].lines}
    mean = shifts[shifts["arm"] == "y_then_c"].groupby("layer")["sd"].mean()
    np.testing.assert_allclose(lines["y_then_c"], mean)
    assert not (set(arms[1:6]) & set(lines))
    assert len({line.get_color() for line in titled["x first"].lines if line.get_label() in arms}) == 5
    panels = {axes.get_title("left") for axes in plots.loss_curves(training).axes}
    ends = {stage for stage in training["stage"] if stage.split("+")[-1] == "em"}
    assert {f"em, {len(ends)} trainings", "benign"} < panels


EMPTY_CALLS = [
    (plots.shift_by_layer, study.shifts, SHIFT),
    (
        plots.arm_direction_heatmap,
        study.shifts,
        {"layer": 0, "condition": "none"},
    ),
    (plots.two_by_two_bars, study.two_by_two, {}),
    (plots.self_report_bars, study.self_report, {}),
    (plots.self_recognition_bars, study.self_recognition, {}),
    (plots.embedding, study.embedding, {"method": "pca", "layer": 0}),
    (plots.dose_response, study.steering, {}),
    (plots.direction_quality, study.directions, {}),
    (plots.direction_cosines, study.directions, {}),
    (plots.shift_by_condition, study.shifts, {"layer": 0}),
    (plots.loss_curves, study.training, {}),
]


@pytest.mark.parametrize(("draw", "make", "options"), EMPTY_CALLS, ids=lambda v: getattr(v, "__name__", ""))
def test_empty_tables_say_not_measured(draw, make, options):
    for frame in (make().iloc[:0], pd.DataFrame()):
        (axes,) = draw(frame, **options).axes
        assert axes.texts[0].get_text() == "Not measured in this study."


def test_labels_that_fit_nothing_are_refused_with_what_there_is():
    frame = study.shifts(**SMALL)
    with pytest.raises(InputError, match=r"direction = 'evli'.*evil:text, identity:name"):
        plots.shift_by_layer(frame, **{**SHIFT, "direction": "evli"})
    both = pd.concat([frame, frame.assign(question_set="other")])
    with pytest.raises(InputError, match="several values of question_set"):
        plots.shift_by_layer(both, **SHIFT)
    with pytest.raises(InputError, match=r"lacks the column\(s\) condition"):
        plots.shift_by_layer(frame.drop(columns="condition"), **SHIFT)


def test_missing_values_are_not_drawn_as_zero():
    frame = study.self_report(conditions=("none",))
    columns = [c for c in frame if c.startswith("name_margin")]
    frame.loc[frame.arm == "em", columns] = np.nan
    axes = axes_of(plots.self_report_bars(frame), "own − invented")
    assert "em" not in [c.get_label() for c in axes.containers]
    assert [t.get_text() for t in axes.texts] == ["not measured"]
