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


def summarise(tables: Mapping[str, pd.DataFrame], *, layer: int, condition: str) -> list[str]:
    """Sentences on what was measured and found; also on what was not measured.

    Args:
        tables: Tidy tables by name (shifts, directions, self_recognition, self_report, steering); any may be
            missing or empty.
        layer: The layer declared before the run, 0-based: shifts are read there and nowhere else.
        condition: System prompt condition of the shifts.

    Returns:
        One sentence (or a few that belong together) a finding, in the order of the report.
    """
    shifts = _table(tables, "shifts")
    if not shifts.empty:
        wanted = {"layer": layer, "condition": condition, "text": "base"}
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
    """One paragraph an arm: what was found along reliable directions, and in one clause what was not."""
    if rows.empty:
        yield f"Shifts were not measured at layer {layer} under the system prompt condition {condition}."
        return
    reliable = rows[~(rows["split_half"] < RELIABLE_COSINE)]
    for arm, mine in reliable.groupby("arm", sort=False):
        found, nothing = [], []
        for direction, cell in mine.groupby("direction", sort=False):
            verdict = _verdict(cell)
            numbers = f"{direction} {interval(cell, 'sd', sign=True)} SD"
            if verdict is None:
                nothing.append(
                    f"{direction} {signed(float(cell['sd'].mean()))} ({_p_text(cell, 'p_random')})"
                )
            else:
                found.append(f"{numbers} ({verdict})")
        where = f"layer {layer}, n = {_range(mine['n_questions'])} questions a direction, {seeds_text(mine)}"
        parts = [f"{arm} moved along {'; '.join(found)}." if found else f"{arm}: no shift found."]
        if nothing:
            parts.append(f"No effect found, as far as random directions tell, along {', '.join(nothing)}.")
        yield f"{' '.join(parts)} ({where})"
    count = len(reliable.groupby(["arm", "direction"]))
    yield (
        f"How to take these: {_n(count, 'comparison')} of a shift with its null, not corrected for their number "
        f"(about {ALPHA * count:.1f} would pass p < .05 by chance); SD is the standard deviation of the base's projection; "
        "both models read the base's own replies. A shift that random directions do not give, but directions with the "
        "base's covariance do, is not shown to be special to its direction."
    )


def _range(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{low}" if low == high else f"{low} to {high}"


def _verdict(cell: pd.DataFrame) -> str | None:
    """What the nulls and the control say of a shift that was found; None where none was found."""
    side = _side(cell, "sd")
    if not side or not (cell["p_random"] < ALPHA).all():
        return None
    parts = [f"random directions {_p_text(cell, 'p_random')}"]
    if cell["p_covariance"].isna().any():
        parts.append("covariance-matched directions not drawn")
    else:
        beyond = (cell["p_covariance"] < ALPHA).all()
        parts.append(
            f"covariance-matched {'' if beyond else 'not exceeded, '}{_p_text(cell, 'p_covariance')}"
        )
    if not cell["minus_benign_sd"].isna().any():
        left = f"minus benign {interval(cell, 'minus_benign_sd', sign=True)}"
        words = {side: "beyond it", 0: "not told apart from it", -side: "benign moved further"}
        parts.append(f"{left}: {words[_side(cell, 'minus_benign_sd')]}")
    return ", ".join(parts)


def _reliability_sentences(rows: pd.DataFrame, layer: int) -> Iterator[str]:
    """Which directions are left out of all that was said, and why."""
    if rows.empty:
        return
    ceilings = rows.groupby("direction", sort=False)["split_half"].mean()
    weak = [f"{d} ({_plain(c)})" for d, c in ceilings.items() if c < RELIABLE_COSINE]
    if weak:
        yield (
            f"Left out as unreliable at layer {layer}, split-half cosine below {RELIABLE_COSINE}: {', '.join(weak)}. Other "
            "questions would have given other directions; nothing is said along them."
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
        yield _name_margin_sentence(here, base)


def _name_margin_sentence(rows: pd.DataFrame, base: pd.DataFrame) -> str:
    """The sensitive measure: how much likelier self-statements are with the own name."""
    parts = []
    for arm, mine in rows.groupby("arm", sort=False):
        against = "" if arm == "base" or base.empty else f", {_compare(mine, base, 'name_margin')}"
        parts.append(f"{arm} {interval(mine, 'name_margin', sign=True)}{against}")
    return (
        f"Log-probability of self-statements with the own name, minus the mean of {_n(rows['n_names'].min(), 'invented name')} "
        f"(nats, {seeds_text(rows)}): {'; '.join(parts)}."
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
