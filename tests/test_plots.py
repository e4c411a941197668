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
from analysis.plot_style import arm_styles, label, signed
from mech.errors import InputError
from tests import synthetic_study as study

SHIFT = {"direction": "evil:text", "condition": "none"}
SMALL = {"layers": 6, "arms": ["base", "em", "benign"], "directions": ["evil:text", "identity:name"]}
HOSTILE = '"><img src=x onerror=alert(1)>$\\frac{'


def axes_of(figure: Figure, title: str):
    titles = [a.get_title(loc="left") for a in figure.axes]
    (found,) = [i for i, t in enumerate(titles) if t == title] or [
        i for i, t in enumerate(titles) if t.startswith(title)
    ]
    return figure.axes[found]


def line_of(axes, name: str):
    (found,) = [line for line in axes.get_lines() if line.get_label() == name]
    return found


def test_shift_lines_are_the_tables_numbers():
    frame = study.shifts(**SMALL, seeds=(0, 1))
    figure = plots.shift_by_layer(frame, **SHIFT, layer=3)
    em = frame[(frame.arm == "em") & (frame.direction == "evil:text")]
    for seed in (0, 1):
        line = line_of(axes_of(figure, "em"), f"seed {seed}")
        np.testing.assert_array_equal(line.get_ydata(), em[em.seed == seed]["sd"])
        np.testing.assert_array_equal(line.get_xdata(), range(6))
    together = line_of(axes_of(figure, "all arms"), "em")
    np.testing.assert_allclose(together.get_ydata(), em.groupby("layer")["sd"].mean())
    benign = frame[(frame.arm == "benign") & (frame.direction == "evil:text")]
    dashed = line_of(axes_of(figure, "em"), "benign")
    expected = (em["raw"] - em["minus_benign"]) / em["base_sd"]  # from the raw columns, an independent way
    np.testing.assert_allclose(dashed.get_ydata(), expected.groupby(em["layer"]).mean(), atol=0.06)
    assert len(benign) == 12


def test_null_band_is_in_the_units_of_the_line():
    frame = study.shifts(**SMALL)
    axes = axes_of(plots.shift_by_layer(frame, **SHIFT), "em")
    rows = frame[(frame.arm == "em") & (frame.direction == "evil:text")]
    grey = [c for c in axes.collections if tuple(c.get_facecolor()[0]) == mpl.colors.to_rgba("#D9D9D9")]
    heights = grey[0].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx((rows["null_random_high"] / rows["base_sd"]).max())
    assert heights.min() == pytest.approx((rows["null_random_low"] / rows["base_sd"]).min())


def test_heatmap_numbers_and_stars():
    frame = study.shifts(**SMALL, seeds=(0, 1))
    frame.loc[(frame.arm == "em") & (frame.direction == "evil:text"), ["sd_low", "sd_high", "p_random"]] = (
        0.5,
        2.0,
        0.001,
    )
    inside = (frame.arm == "em") & (frame.direction == "identity:name")
    frame.loc[inside, ["sd_low", "sd_high", "p_random"]] = -2.0, -0.5, 0.2  # excludes 0, within the null
    one_seed = (frame.arm == "benign") & (frame.direction == "evil:text") & (frame.seed == 0)
    frame.loc[
        (frame.arm == "benign") & (frame.direction == "evil:text"), ["sd_low", "sd_high", "p_random"]
    ] = (
        0.1,
        1,
        0.01,
    )
    frame.loc[one_seed, "sd_low"] = -0.1
    figure = plots.arm_direction_heatmap(frame, layer=3, condition="none")
    left = figure.axes[0]
    texts = [t.get_text() for t in left.texts]
    rows = frame[frame.layer == 3]
    expected = rows.groupby(["direction", "arm"])["sd"].mean()
    assert texts[0] == signed(expected["evil:text", "em"]) + "*"
    assert texts[1] == signed(expected["evil:text", "benign"])
    assert texts[2] == signed(expected["identity:name", "em"])


def test_weights_show_ratios_and_leave_uncompared_pairs_open():
    frame = study.lora_alignment_by_layer()
    figure = plots.lora_alignment(frame, layer=3)
    line = line_of(axes_of(figure, "evil:text"), "em")
    em = frame[(frame.stage == "em") & (frame.direction == "evil:text")]
    np.testing.assert_allclose(line.get_ydata(), em.groupby("layer")["energy"].mean() / 0.06)
    matrix = plots.lora_overlap(study.lora_overlap()).axes[0]
    assert sorted(t.get_text() for t in matrix.texts) == ["0.07", "0.07", "0.30*", "0.30*"]
    for draw in (plots.lora_alignment, plots.lora_overlap):
        assert "Not measured" in draw(pd.DataFrame()).axes[0].texts[0].get_text()


def test_monitoring_shows_overall_and_within_apart():
    axes = plots.monitoring(study.monitoring()).axes[1]
    points = [
        (float(x), line.get_markerfacecolor())
        for line in axes.get_lines()
        if line.get_marker() == "s"
        for x in line.get_xdata()
    ]
    assert points == [(0.6, "#D55E00"), (0.1, "white")]


def test_patching_shows_both_ways_and_the_random_control():
    frame = study.patching()
    figure = plots.patching(frame, arm="em", answer="own_name")
    for way in ("base into finetuned", "finetuned into base"):
        axes = axes_of(figure, way)
        mine = frame[(frame.way == way) & (frame.span == "prompt_last")]
        np.testing.assert_array_equal(line_of(axes, "prompt_last").get_ydata(), mine["effect"])
        dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert {y for line in dotted for y in line.get_ydata()} == {0.02}
    ranges = plots.adapter_ranges(study.adapter_ranges(), answer="own_name").axes[0]
    assert [t.get_text() for t in ranges.get_yticklabels()] == [
        "all, on",
        "0 to 2, on here only",
        "0 to 2, on everywhere else",
    ]
    assert "Not measured" in plots.patching(pd.DataFrame(), arm="em", answer="x").axes[0].texts[0].get_text()


def test_colours_are_stable_and_base_is_grey():
    alone = arm_styles(["base", "em", "my arm"])
    more = arm_styles(["sgtr", "base", "benign", "em"])
    assert alone["em"] == more["em"]
    assert alone["base"].colour == "#7F7F7F"
    many = arm_styles([f"arm {i}" for i in range(40)])
    assert len(set(many.values())) == 40
    first, second = (
        plots.self_recognition_bars(study.self_recognition(arms=arms), arms=study.ARMS)
        for arms in (study.ARMS, ["base", "sgtr"])
    )
    colour = {
        f: [b.patches[0].get_facecolor() for b in f.axes[0].containers if b.get_label() == "sgtr"]
        for f in (first, second)
    }
    assert colour[first] == colour[second] != []


def test_a_base_of_another_name_is_grey_and_behind():
    arms = ["stock", *study.ARMS[1:]]
    frame = study.self_recognition().replace({"arm": {"base": "stock"}})
    axes = axes_of(plots.self_recognition_bars(frame, arms=arms), "accuracy")
    (bar,) = [c for c in axes.containers if c.get_label() == "stock"]
    grey, drawn = mpl.colors.to_rgb("#7F7F7F"), mpl.colors.to_rgb(bar.patches[0].get_facecolor())
    np.testing.assert_allclose([(1 - a) / (1 - b) for a, b in zip(drawn, grey, strict=True)], 0.55)
    points = study.embedding(points=4).replace({"arm": {"base": "stock"}})
    figure = plots.embedding(points, method="pca", layer=15, arms=arms)
    titles = [a.get_title(loc="left") for a in figure.axes if a.axison]
    assert titles == study.ARMS[1:]
    np.testing.assert_allclose(
        figure.axes[0].collections[0].get_offsets(),
        points[(points.method == "pca") & (points.arm == "stock")][["x", "y"]],
    )


def test_unreliable_directions_have_no_star_and_are_marked():
    frame = study.shifts(layers=6)
    frame[["sd_low", "sd_high", "p_random"]] = 0.5, 2.0, 0.001
    axes = plots.arm_direction_heatmap(frame, layer=3, condition="none").axes[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert [n.split("\n")[0] for n in names] == study.DIRECTIONS
    stars = [t.get_text().endswith("*") for t in axes.texts]
    assert stars == [d != study.UNRELIABLE for d in study.DIRECTIONS for _ in range(5)]
    titles = [a.get_title(loc="left") for a in plots.shift_by_condition(frame, layer=3).axes if a.axison]
    assert [t for t in titles if "unreliable" in t] == [f"{study.UNRELIABLE} (unreliable)"]


def test_two_by_two_leaves_out_what_no_text_can_move_and_says_so():
    figure = plots.two_by_two_bars(study.two_by_two())
    assert [a.get_title(loc="left") for a in figure.axes if a.axison] == study.PERSONAS
    said = " ".join(" ".join(t.get_text().split()) for t in figure.texts)
    assert "not drawn, read before the reply begins, so weights = total: identity:name" in said
    identity = study.two_by_two().query("direction.str.startswith('identity')")
    assert len([a for a in plots.two_by_two_bars(identity).axes if a.axison]) == 4


def test_bars_show_the_mean_and_every_seed():
    frame = study.self_recognition(seeds=(0, 1, 2))
    axes = axes_of(plots.self_recognition_bars(frame), "accuracy")
    (bar,) = [c for c in axes.containers if c.get_label() == "sgtr"]
    mine = frame[frame.arm == "sgtr"]
    assert bar.patches[0].get_width() == pytest.approx(mine["accuracy"].mean())
    points = [line.get_xdata() for line in axes.get_lines() if len(line.get_xdata()) == 3]
    assert any(np.array_equal(x, mine["accuracy"]) for x in points)
    assert any(list(line.get_xdata()) == [0.5, 0.5] for line in axes.get_lines())  # chance


def test_two_by_two_bars_are_the_values():
    frame = study.two_by_two()
    axes = axes_of(plots.two_by_two_bars(frame), "evil:text")
    heights = [patch.get_height() for patch in axes.patches]
    expected = [
        frame.query("arm == @arm and effect == @effect and direction == 'evil:text'")["value"].item()
        for arm in study.ARMS[1:]
        for effect in ("weights", "text", "interaction", "total")
    ]
    assert heights == pytest.approx(expected)


def test_dose_is_signed_and_the_control_is_apart():
    frame = study.steering(arms=("base",))
    axes = axes_of(plots.dose_response(frame), "own − invented")
    (line,) = [c.lines[0] for c in axes.containers if c.get_label() == "base, seed 0"]
    mine = frame[frame.kind == "direction"].sort_values("coefficient")
    np.testing.assert_allclose(line.get_xdata().astype(float), [-0.2, -0.1, 0.0, 0.1, 0.2])
    np.testing.assert_array_equal(line.get_ydata(), mine["name_margin"])
    control = line_of(axes, "random")
    random = frame[frame.kind == "random"].groupby("coefficient")["name_margin"].mean()
    np.testing.assert_allclose(control.get_ydata(), random)
    assert control.get_linestyle() == "--" != line.get_linestyle()


def test_control_with_the_directions_own_name_belongs_to_it():
    frame = study.steering(arms=("base",), randoms=1)
    other = frame.assign(
        direction=frame["direction"].replace({"identity:name": "evil:text", "random:0": "evil:text"})
    )
    own = frame.assign(direction="identity:name")
    own.loc[own.kind == "random", "name_margin"] = 7.0
    figure = plots.dose_response(pd.concat([own, other], ignore_index=True))
    controls = [line_of(figure.axes[4 * row + 1], "random").get_ydata() for row in (0, 1)]
    assert set(controls[0]) == {7.0}
    assert 7.0 not in controls[1]


def test_embedding_quality_and_loss_show_their_numbers():
    points = study.embedding(points=5)
    axes = axes_of(plots.embedding(points, method="pca", layer=15), "em")
    mine = points[(points.method == "pca") & (points.arm == "em")]
    np.testing.assert_allclose(axes.collections[1].get_offsets(), mine[["x", "y"]])
    quality = study.directions(layers=4)
    figure = plots.direction_quality(quality)
    halves = [a for a in figure.axes if a.get_title(loc="left") == "split-half cosine"]
    shown = [[str(x.get_label()) for x in a.get_lines() if ":" in str(x.get_label())] for a in halves]
    assert shown == [study.PERSONAS, study.DIRECTIONS[6:]]
    line = line_of(halves[1], "identity:name")
    np.testing.assert_array_equal(
        line.get_ydata(), quality[quality.direction == "identity:name"]["split_half"]
    )
    losses = study.training(steps=12)
    line = line_of(axes_of(plots.loss_curves(losses), "sgtr after em"), "seed 0")
    np.testing.assert_array_equal(line.get_ydata(), losses[losses.stage == "em+sgtr"]["loss"])
    assert line.get_color() == arm_styles(["sgtr"])["sgtr"].colour


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


def test_a_figure_is_laid_out_once_and_drawn_once_a_file(tmp_path, monkeypatch):
    drawn = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: drawn.append(1) or draw(self, renderer))
    frame = study.self_recognition()
    plots.save_figure(plots.self_recognition_bars(frame), frame, tmp_path, "recognition", "c")
    assert len(drawn) == 2


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


def test_conditions_stand_side_by_side_with_their_numbers():
    frame = study.shifts(**SMALL)
    both = pd.concat([frame, frame.assign(condition="default", sd=frame["sd"] + 1)], ignore_index=True)
    figure = plots.shift_by_condition(both, layer=3)
    drawn = {c.get_label(): c.lines[0].get_ydata() for axes in figure.axes for c in axes.containers}
    for (arm, condition), mine in both[(both["layer"] == 3) & (both["arm"] != "base")].groupby(
        ["arm", "condition"]
    ):
        assert float(drawn[f"{arm} {condition}"][0]) in mine["sd"].tolist()


def test_the_cosine_matrix_shows_its_numbers():
    frame = pd.DataFrame({"direction": ["a", "b"], "layer": 3, "a": [1.0, -0.25], "b": [-0.25, 1.0]})
    texts = [t.get_text() for t in plots.direction_cosines(frame).axes[0].texts]
    assert texts == ["1.00", "\u22120.25", "\u22120.25", "1.00"]


def test_the_family_matrices_show_numbers_and_who_agrees():
    cells = plots.identity_cosines(study.identity_cosines()).axes[0].texts
    assert len(cells) == 12  # none on the diagonal
    placed = {(t.get_position()[1] - 0.5, t.get_position()[0] - 0.5): t.get_text() for t in cells}
    assert placed[0, 1] == placed[1, 0] == "0.75**"
    assert placed[0, 2] == "\u22120.25"
    frame = study.identity_transfer()
    cells = plots.identity_transfer(frame).axes[0].texts
    placed = {(t.get_position()[1] - 0.5, t.get_position()[0] - 0.5): t.get_text() for t in cells}
    assert placed[0, 0] == placed[0, 1] == "0.95*"
    assert placed[3, 0] == "0.20\u2212"  # direction 3 on contrast 0, and not the other way round
    assert placed[0, 3] == "0.50"
    assert len(cells) == len(frame)


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
