"""Each figure shows the numbers of its table."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.plot_frame import signed
from analysis.plot_style import GREY, arm_styles
from tests import synthetic_study as study
from tests.drawn import SHIFT, SMALL, axes_of, line_of


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
    change = frame["way"].map({"base into finetuned": -2.5, "finetuned into base": 2.5})
    figure = plots.patching(frame.assign(share=frame["effect"] / change), arm="em", answer="own_name")
    for way, whole in (("base into finetuned", -2.5), ("finetuned into base", 2.5)):
        assert line_of(axes_of(figure, way), "whole change").get_ydata()[0] == pytest.approx(whole)
    untold = plots.patching(frame.assign(share=np.nan), arm="em", answer="own_name")
    assert not [line for axes in untold.axes for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert "not told apart from 0" in " ".join(" ".join(t.get_text().split()) for t in untold.texts)
    ranges = plots.adapter_ranges(study.adapter_ranges(), answer="own_name").axes[0]
    assert [t.get_text() for t in ranges.get_yticklabels()] == [
        "all, on",
        "0 to 2, on here only",
        "0 to 2, on everywhere else",
    ]
    assert "Not measured" in plots.patching(pd.DataFrame(), arm="em", answer="x").axes[0].texts[0].get_text()


def test_a_sweep_says_who_is_steered_and_hollows_what_damages():
    frame = pd.DataFrame([
        {"sweep": "written", "arm": "em", "direction": "evil:text", "layer": 3, "strength": s, "change": s, "change_low": s - 0.1,
         "change_high": s + 0.1, "kl": 4 * abs(s), "control_change": 0.0, "control_max": 0.2, "n_questions": 20, "n_controls": 5}
        for s in (-0.2, 0.1, 0.2)
    ])  # fmt: skip
    figure = plots.sweep_response(frame, max_kl=0.5, score="log_odds", unit="nats a token")
    said = " ".join(" ".join(t.get_text().split()) for t in figure.texts)
    assert "sweep: written · steered: em · 20 questions · 5 random directions a panel" in said
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata().tolist() for line in hollow] == [[-0.2, 0.2]]
    alone = plots.sweep_response(frame.drop(columns=["sweep", "arm"]), max_kl=0.5, score="log_odds", unit="")
    assert "20 questions" in " ".join(t.get_text() for t in alone.texts)


def test_each_direction_of_a_sweep_has_its_own_row_and_grey_band():
    frame = pd.DataFrame([
        {"direction": name, "layer": layer, "strength": s, "change": s, "change_low": s - 0.1, "change_high": s + 0.1, "kl": 0.0,
         "control_change": 0.0, "control_max": largest, "n_questions": 20, "n_controls": 5}
        for name, largest in (("evil:text", 0.2), ("identity:name", 0.7)) for layer in (3, 9) for s in (-1.0, 1.0)
    ])  # fmt: skip
    figure = plots.sweep_response(frame, max_kl=0.5, score="log_odds", unit="nats a token")
    titles = ["evil:text, layer 3", "evil:text, layer 9", "identity:name, layer 3", "identity:name, layer 9"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    tops = [max(axes.collections[0].get_paths()[0].vertices[:, 1]) for axes in figure.axes]
    assert tops == [0.2, 0.2, 0.7, 0.7]
    rows = [{axes.get_position().y0 for axes in figure.axes[i : i + 2]} for i in (0, 2)]
    assert [len(row) for row in rows] == [1, 1]
    one = plots.sweep_response(frame[frame["direction"] == "evil:text"], max_kl=0.5, score="x", unit="")
    assert [axes.get_title(loc="left") for axes in one.axes] == ["layer 3", "layer 9"]


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


def test_dispersion_shows_every_change_and_the_benign_control():
    frame = study.dispersion()
    figure = plots.dispersion_by_condition(frame, layer=15, arms=study.ARMS)
    spread_of_prompts = figure.axes[0]
    points = {b.get_label(): b.lines[0].get_ydata() for b in spread_of_prompts.containers}
    assert points["em none"].tolist() == [-0.1]
    assert points["benign none"].tolist() == [-0.4]
    bars = {(round(x), round(y, 9)) for x, y in _levels(spread_of_prompts)}
    # What the control changed, behind every other arm.
    assert bars == {(i, -0.4) for i, arm in enumerate(study.ARMS[1:]) if arm != "benign"}
    alone = plots.dispersion_by_condition(frame[[c for c in frame if "minus_benign" not in c]], layer=15)
    assert not _levels(alone.axes[0])
    assert (
        "Not measured" in plots.dispersion_by_condition(pd.DataFrame(), layer=15).axes[0].texts[0].get_text()
    )


def test_the_control_stands_behind_the_point_of_its_own_condition():
    apart = {"default": 0.0, "none": 0.3}  # more than between arms: a mean over conditions would mislead
    frames = [
        study.dispersion(condition=c).eval(f"d_log_trace = d_log_trace + {by}") for c, by in apart.items()
    ]
    figure = plots.dispersion_by_condition(pd.concat(frames), layer=15, arms=study.ARMS)
    of_em = sorted((x, y) for x, y in _levels(figure.axes[0]) if round(x) == 0)
    assert [y for _, y in of_em] == pytest.approx([-0.4, -0.1])


def _levels(axes):
    """Middle and height of the short horizontal bars."""
    lines = [c for c in axes.collections if c.get_linewidth()[0] > 2]
    return [(float(s[:, 0].mean()), float(s[0, 1])) for c in lines for s in c.get_segments()]


def test_a_far_null_does_not_flatten_the_shifts():
    frame = study.shifts(arms=["base", "em", "benign"], layers=6, directions=["evil:text"])
    far = frame.assign(
        null_covariance_high=np.where(frame["layer"] == 2, 500.0, frame["null_covariance_high"])
    )
    options = {"direction": "evil:text", "condition": "none"}
    low, high = plots.shift_by_layer(far, **options).axes[0].get_ylim()
    reach = float(frame[["sd_low", "sd_high"]].abs().to_numpy().max())
    assert low < float(frame["sd_low"].min())
    assert reach < high < 5 * reach


def test_unreliable_directions_are_grey_in_the_cosines(tmp_path):
    frame = study.direction_cosines()
    halves = [0.1 if i == 1 else 0.8 for i in range(len(frame))]
    axes = plots.direction_cosines(frame.assign(split_half=halves)).axes[0]
    grey = {i for i, t in enumerate(axes.texts) if t.get_color() == GREY}
    n = len(frame)
    assert grey == {i * n + j for i in range(n) for j in range(n) if 1 in (i, j) and i != j}
    assert axes.get_yticklabels()[1].get_text().endswith("split-half 0.10, unreliable")


def test_two_by_two_leaves_out_what_no_text_can_move_and_says_so():
    table = study.two_by_two()
    rounded = table.assign(value=table["value"] + 1e-7)  # the same prompt read in another batch
    figure = plots.two_by_two_bars(rounded)
    assert [a.get_title(loc="left") for a in figure.axes if a.axison] == study.PERSONAS
    said = " ".join(" ".join(t.get_text().split()) for t in figure.texts)
    assert "not drawn, read before the reply begins, so weights = total: identity:name" in said
    identity = study.two_by_two().query("direction.str.startswith('identity')")
    assert len([a for a in plots.two_by_two_bars(identity).axes if a.axison]) == 4


def test_two_by_two_marks_an_unreliable_direction():
    table = study.two_by_two()
    weak = table["direction"] == "evil:text"
    figure = plots.two_by_two_bars(table.assign(split_half=table["split_half"].mask(weak, 0.1)))
    written = {t.get_text(): t.get_color() for a in figure.axes for t in a.findobj(mpl.text.Text)}
    assert written["evil:text (unreliable)"] == GREY
    assert all(written[name] != GREY for name in study.PERSONAS if name != "evil:text")


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


def test_held_against_the_base_no_diamond_is_drawn():
    frame = study.differences()
    from_base = frame["comparison"] == "prevention"
    frame.loc[from_base, ["before_sd", "before_sd_low", "before_sd_high"]] = 0.0

    def diamonds(of):
        figure = plots.comparison_differences(of, layer=15, condition="none", arms=study.ARMS)
        told = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        drawn = [sum(line.get_marker() == "D" for line in axes.get_lines()) for axes in figure.axes]
        return drawn, any("the base" in text for text in told)

    assert diamonds(frame) == ([len(study.DIRECTIONS), 0], True)
    assert diamonds(frame[from_base]) == ([0], False)


def test_a_share_undone_has_its_arms_colour_and_a_second_one_of_the_arm_is_dashed():
    frame = study.undone()
    again = frame[frame["comparison"] == "reversal"].assign(comparison="beyond_control", against="benign")
    figure = plots.undone_by_layer(pd.concat([frame, again]), condition="none", layer=15, arms=study.ARMS)
    styles = arm_styles(study.ARMS)
    lines = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()[:3]]
    reversal, prevention = (styles[arm].colour for arm in ("em_then_sgtr", "sgtr_then_em"))
    assert lines == [(reversal, "-"), (prevention, "-"), (reversal, "--")]
