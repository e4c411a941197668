"""What a study found, in plain sentences: numbers with interval, n, seeds and null, and no word beyond them.

A shift is called found only where, in every seed, its interval excludes 0 and it is larger than along random
directions (p < .05); whether it goes beyond the benign control and beyond covariance-matched directions is
said apart. Two groups are called different only where their 95 % intervals do not overlap, in every seed:
stricter than a test of the difference, so "not told apart" is not "equal".
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from analysis.plot_style import RELIABLE_COSINE, seeds_text, signed

ALPHA = 0.05


def summarise(tables: Mapping[str, pd.DataFrame], *, layer: int, condition: str, pooling: str) -> list[str]:
    """Sentences on what was measured and found; also on what was not measured.

    Args:
        tables: Tidy tables by name (shifts, directions, self_recognition, self_report, steering); any may be
            missing or empty.
        layer: The layer declared before the run, 0-based: shifts are read there and nowhere else.
        condition: System prompt condition of the shifts.
        pooling: Pooling of the shifts.

    Returns:
        One sentence (or a few that belong together) a finding, in the order of the report.
    """
    shifts = _table(tables, "shifts")
    if not shifts.empty:
        wanted = {"layer": layer, "condition": condition, "pooling": pooling, "text": "base"}
        for column, value in wanted.items():
            shifts = shifts[shifts[column] == value]
        shifts = shifts[shifts["arm"] != "base"]
    return [
        *_shift_sentences(shifts, layer, condition),
        *_reliability_sentences(shifts, layer),
        *_recognition_sentences(_table(tables, "self_recognition")),
        *_report_sentences(_table(tables, "self_report")),
        *_steering_sentences(_table(tables, "steering")),
    ]


def _table(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    return tables.get(name, pd.DataFrame())


def _plain(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def interval(rows: pd.DataFrame, column: str, *, sign: bool = False) -> str:
    """'0.42 [0.30, 0.55]' for one seed; 'mean 0.42 (seeds: 0.40 [0.30, 0.50]; ...)' for several."""
    write = signed if sign else _plain
    each = [
        f"{write(v)} [{write(low)}, {write(high)}]"
        for v, low, high in zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"], strict=True)
    ]
    if len(each) == 1:
        return each[0]
    return f"{write(rows[column].mean())} (mean of {len(each)} seeds: {'; '.join(each)})"


def _side(rows: pd.DataFrame, column: str) -> int:
    """+1 or -1 where every row's interval lies above or below 0, else 0."""
    if (rows[f"{column}_low"] > 0).all():
        return 1
    return -1 if (rows[f"{column}_high"] < 0).all() else 0


def _p_text(rows: pd.DataFrame, column: str) -> str:
    if rows[column].isna().any():
        return "p not measured"
    worst = float(rows[column].max())
    return "p < .001" if worst < 0.001 else f"p = {worst:.3f}"


def _n(value: object, word: str) -> str:
    count = int(str(value))
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _shift_sentences(rows: pd.DataFrame, layer: int, condition: str) -> Iterator[str]:
    if rows.empty:
        yield f"Shifts were not measured at layer {layer} under the system prompt condition {condition}."
        return
    count = 0
    for (arm, _), mine in rows.groupby(["arm", "question_set"], sort=False):
        size = _n(mine["n_questions"].min(), "question")
        where = f"layer {layer}, n = {size} of {mine['question_set'].iloc[0]}, {seeds_text(mine)}"
        nothing = []
        for direction, cell in mine.groupby("direction", sort=False):
            count += 1
            verdict = _verdict(cell)
            numbers = f"{interval(cell, 'sd', sign=True)} SD"
            if verdict is None:
                nothing.append(f"{direction} {numbers}, {_p_text(cell, 'p_random')}")
            else:
                yield f"{arm} along {direction}: shift {numbers} ({where}). {verdict}"
        if nothing:
            yield (
                f"{arm}, no effect found: along {'; '.join(nothing)} ({where}). "
                "The interval includes 0, or the shift is within what random directions give."
            )
    chance = ALPHA * count
    yield (
        f"These are {_n(count, 'comparison')} of a shift with its null, not corrected for their number: "
        f"about {chance:.1f} would pass p < .05 by chance. SD: standard deviation of the base's projection. "
        "Every shift is on the base's own replies, read by both models."
    )
    if rows["seed"].nunique() == 1:
        yield "There is one seed of training: how much another seed would differ was not measured."


def _verdict(cell: pd.DataFrame) -> str | None:
    """What the nulls and the control say of a shift that was found; None where none was found."""
    side = _side(cell, "sd")
    if not side or not (cell["p_random"] < ALPHA).all():
        return None
    parts = [f"It exceeds random directions ({_p_text(cell, 'p_random')})"]
    if cell["p_covariance"].isna().any():
        parts.append("covariance-matched directions were not drawn")
    elif (cell["p_covariance"] < ALPHA).all():
        parts.append(f"and covariance-matched ones ({_p_text(cell, 'p_covariance')})")
    else:
        parts.append(
            f"but not directions with the base's own covariance ({_p_text(cell, 'p_covariance')}), so it is "
            "not shown to be special to this direction"
        )
    first = ", ".join(parts) + "."
    if cell["minus_benign_sd"].isna().any():
        return f"{first} The benign control was not subtracted."
    left = interval(cell, "minus_benign_sd", sign=True)
    beyond = _side(cell, "minus_benign_sd")
    if beyond == side:
        return f"{first} Minus the benign control {left} SD: it goes beyond benign finetuning."
    if beyond == 0:
        return f"{first} Minus the benign control {left} SD: not told apart from benign finetuning."
    return f"{first} Minus the benign control {left} SD: the benign control moved further the same way."


def _reliability_sentences(rows: pd.DataFrame, layer: int) -> Iterator[str]:
    if rows.empty:
        return
    for direction, ceiling in rows.groupby("direction", sort=False)["split_half"].mean().items():
        if np.isnan(ceiling):
            yield f"The reliability of {direction} was not measured."
        elif ceiling < RELIABLE_COSINE:
            yield (
                f"{direction} is unreliable at layer {layer}: its split-half cosine is {_plain(ceiling)} "
                f"(below {RELIABLE_COSINE}), so what is said along it, found or not found, should not be leaned on."
            )


def _compare(rows: pd.DataFrame, base: pd.DataFrame, column: str) -> str:
    """How an arm stands to the base: 'higher', 'lower' (no interval overlaps, in any seed) or 'not told apart'."""
    if (rows[f"{column}_low"].min()) > base[f"{column}_high"].max():
        return "higher than the base's"
    if (rows[f"{column}_high"].max()) < base[f"{column}_low"].min():
        return "lower than the base's"
    return "not told apart from the base's (the intervals overlap)"


def _recognition_sentences(rows: pd.DataFrame) -> Iterator[str]:
    if rows.empty:
        yield "Self-recognition was not measured."
        return
    base = rows[rows["arm"] == "base"]
    for arm, mine in rows.groupby("arm", sort=False):
        low, high = mine["accuracy_low"].min(), mine["accuracy_high"].max()
        chance = (
            "above chance (.5)"
            if low > 0.5
            else "below chance (.5)"
            if high < 0.5
            else "not told apart from chance (.5)"
        )
        shortcut = float(mine["shortcut_accuracy"].max())
        parts = [f"{interval(mine, 'accuracy')}, {chance}"]
        if not np.isnan(shortcut):
            reach = "above" if low > shortcut else "not above"
            parts.append(f"{reach} the {_plain(shortcut)} that answering by length alone reaches")
        if arm != "base" and not base.empty:
            parts.append(f"{_compare(mine, base, 'accuracy')} {_plain(base['accuracy'].mean())}")
        size = _n(mine["n_articles"].min(), "article")
        yield f"Self-recognition of {arm} (n = {size}, {seeds_text(mine)}): accuracy {'; '.join(parts)}."


def _report_sentences(rows: pd.DataFrame) -> Iterator[str]:
    if rows.empty:
        yield "Self-report (what the models call themselves) was not measured."
        return
    for (condition, temperature), here in rows.groupby(["condition", "temperature"], sort=False):
        base = here[here["arm"] == "base"]
        parts = []
        for arm, mine in here.groupby("arm", sort=False):
            against = "" if arm == "base" or base.empty else f", {_compare(mine, base, 'own_name_rate')}"
            parts.append(f"{arm} {interval(mine, 'own_name_rate')}{against}")
        size = (
            f"{_n(here['n_samples'].min(), 'sample')} of {_n(here['n_questions'].min(), 'question')} an arm"
        )
        yield (
            f"Share of replies with the model's own name (system prompt: {condition}, temperature {temperature:g}, "
            f"n = {size}, {seeds_text(here)}): {'; '.join(parts)}."
        )


def _steering_sentences(rows: pd.DataFrame) -> Iterator[str]:
    if rows.empty or not (rows["kind"] == "direction").any():
        yield "Steering was not measured."
        return
    steered, random = rows[rows["kind"] == "direction"], rows[rows["kind"] == "random"]
    names = set(steered["direction"])
    for (arm, direction, layer), mine in steered.groupby(["arm", "direction", "layer"], sort=False):
        control = random[(random["arm"] == arm) & (random["layer"] == layer)]
        named = control["direction"] == direction
        control = control[named if named.any() else ~control["direction"].isin(names)]
        same = (rows["arm"] == arm) & (rows["layer"] == layer) & (rows["coefficient"] == 0.0)
        ends = {float(mine["coefficient"].max()), float(mine["coefficient"].min())} - {0.0}
        for end in sorted(ends, reverse=True):
            at = mine[mine["coefficient"] == end]
            yield _steering_sentence(
                f"Steering {arm} along {direction} at layer {layer}",
                at, control[control["coefficient"] == end], rows[same],
            )  # fmt: skip


def _steering_sentence(start: str, at: pd.DataFrame, control: pd.DataFrame, rest: pd.DataFrame) -> str:
    """The end of the sweep (not the best point of it) against the random control at the same coefficient."""
    coefficient, dose = float(at["coefficient"].iloc[0]), float(at["dose"].mean())
    number = f"{coefficient:g}".replace("-", "−")
    text = (
        f"{start}, coefficient {number} (dose {_plain(dose)}, the end of the sweep; n = "
        f"{_n(at['n_samples'].min(), 'sample')}, {seeds_text(at)}): own-name margin "
        f"{interval(at, 'name_margin', sign=True)} nats, own-name rate {interval(at, 'own_name_rate')}"
    )
    if control.empty:
        text += "; no random control was run at this coefficient, so nothing is said on its being special"
    else:
        low, high = float(control["name_margin_low"].min()), float(control["name_margin_high"].max())
        apart = (at["name_margin_low"] > high).all() or (at["name_margin_high"] < low).all()
        word = "outside" if apart else "not told apart from"
        text += (
            f"; the margin is {word} the random directions of the same norm "
            f"(intervals of {_n(len(control), 'run')} reach from {signed(low)} to {signed(high)})"
        )
    text += f". Surprisal under the unsteered base {_plain(at['surprisal'].mean())} nats per token"
    if not control.empty:
        text += f", with random directions {_plain(control['surprisal'].mean())}"
    if not rest.empty:
        text += f", unsteered {_plain(rest['surprisal'].mean())}"
        if (at["surprisal_low"].min()) > rest["surprisal_high"].max():
            text += ": the replies have become less likely under the base, so a loss of coherence may be part of it"
    return text + "."
