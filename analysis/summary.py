"""What a study found, in plain sentences: numbers with interval, n, seeds and null, and no claim beyond them.

A shift is called found only where its direction is reliable and, in every seed, its interval excludes 0 and it
is larger than along random directions (p < .05); whether it also goes beyond covariance-matched directions and
beyond the benign control is said apart. Two groups are called different only where their 95 % intervals do not overlap, in every seed:
stricter than a test of the difference, so "not told apart" is not "equal".
"""

from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.comparison_summary import comparison_sentences
from analysis.plot_frame import signed
from analysis.plot_style import RELIABLE_COSINE
from analysis.plot_table import seeds_text
from analysis.words import (
    ALPHA,
    MOST_ARMS,
    MOST_SEEDS,
    apart_from,
    at,
    count_range,
    counted,
    interval,
    is_found,
    listed,
    plain,
    side_of,
    table_named,
    unreliable,
)


def summarise(
    tables: Mapping[str, pd.DataFrame], *, layer: int, condition: str, base: str = "base"
) -> list[str]:
    """Sentences on what was measured and found; also on what was not measured.

    Args:
        tables: Tidy tables by name (shifts, differences, undone, spread_differences, behaviour_differences, dispersion, self_recognition, self_report, steering, sweep_best); any may be
            missing or empty.
        layer: The layer declared before the run, 0-based: shifts are read there and nowhere else.
        condition: System prompt condition of the shifts.
        base: What the study calls the base arm.

    Returns:
        `told_of_arms`, then `told_of_steering`; each paragraph starts with what it is about and a colon, or is a single sentence.
    """
    return [*told_of_arms(tables, layer=layer, condition=condition, base=base), *told_of_steering(tables)]


def told_of_arms(
    tables: Mapping[str, pd.DataFrame], *, layer: int, condition: str, base: str = "base"
) -> list[str]:
    """What the tables of `analysis.glance` show, in sentences: one paragraph a comparison (what the study asks), then one an arm or a measure.

    Arguments are those of `summarise`.
    """
    here = {"layer": layer, "condition": condition}
    shifts = at(table_named(tables, "shifts"), **here, text="base")
    return [
        *_seeds_sentences(tables),
        *comparison_sentences(
            at(table_named(tables, "differences"), **here),
            at(table_named(tables, "undone"), **here),
            at(table_named(tables, "spread_differences"), **here),
            table_named(tables, "behaviour_differences"),
        ),
        *_recognition_sentences(table_named(tables, "self_recognition"), base),
        *_report_sentences(table_named(tables, "self_report"), base),
        *_shift_sentences(shifts, layer, condition),
        *_reliability_sentences(shifts, layer),
        *_dispersion_sentences(table_named(tables, "dispersion"), layer, condition),
    ]


def told_of_steering(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    """One paragraph a steered arm's end of the dose curve, and one a sweep."""
    return [
        *_steering_sentences(table_named(tables, "steering")),
        *_sweep_sentences(table_named(tables, "sweep_best")),
    ]


def _seeds_sentences(tables: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    most = max((t["seed"].nunique() for t in tables.values() if "seed" in t.columns), default=0)
    if most > MOST_SEEDS:
        yield (
            f"How {most} seeds are given: their mean, and in round brackets where the 95 % intervals of all of them lie. Each seed by itself is in "
            "the tables."
        )


def _spread(rows: pd.DataFrame, column: str) -> str:
    """One run's value with its interval; of several runs the mean and where all their intervals lie."""
    if len(rows) == 1:
        return interval(rows, column)
    low, high = rows[f"{column}_low"].min(), rows[f"{column}_high"].max()
    return f"{plain(rows[column].mean())} ({plain(low)} to {plain(high)} with intervals)"


def _shift_sentences(rows: pd.DataFrame, layer: int, condition: str) -> Iterator[str]:
    """One paragraph an arm: what was found along reliable directions, and in one clause what was not."""
    if rows.empty:
        yield f"Shifts were not measured at layer {layer} under the system prompt condition {condition}."
        return
    reliable = rows[~rows["direction"].isin(unreliable(rows))]
    if reliable.empty:
        return
    questions = count_range(reliable["n_questions"])
    yield (
        f"Shifts at layer {layer} (system prompt {condition}, n = {questions} questions a direction, {seeds_text(rows)}): "
        "a shift is called found where its interval excludes 0 and p < .05 against random directions"
        f"{', in every seed' if rows['seed'].nunique() > 1 else ''}. In brackets the 95 % interval; SD is the standard "
        "deviation of the base's projection; both models read the base's own replies."
    )
    brief = reliable["arm"].nunique() > MOST_ARMS
    for arm, mine in reliable.groupby("arm", sort=False):
        yield f"Arm {arm}: {' '.join(_arm_sentences(mine, brief=brief))}"
    count = len(reliable.groupby(["arm", "direction"]))
    yield (
        f"How to take these shifts: {counted(count, 'comparison')} with a null, not corrected for their number (about "
        f"{ALPHA * count:.1f} would pass p < .05 by chance). A shift that random directions do not give, but directions with "
        "the base's covariance do, is not shown to be special to its direction."
    )


def _arm_sentences(rows: pd.DataFrame, *, brief: bool) -> Iterator[str]:
    """What was found, the harder null's survivors first; then what was not. In brief, only those survivors have their intervals."""
    special: list[str] = []
    common: list[str] = []
    nothing: list[str] = []
    drawn = bool(rows["p_covariance"].notna().all())
    for direction, cell in rows.groupby("direction", sort=False):
        if not is_found(cell):
            nothing.append(f"{direction} ({signed(float(cell['sd'].mean()))})")
            continue
        beyond = drawn and bool((cell["p_covariance"] < ALPHA).all())
        shift = f"{direction} {interval(cell, 'sd', sign=True)} SD{_against_benign(cell, brief=brief)}"
        if brief and not beyond:
            shift = f"{direction} ({signed(float(cell['sd'].mean()))})"
        (special if beyond else common).append(shift)
    if not special and not common:
        yield "no shift found."
    if special:
        yield f"larger than along random and covariance-matched directions: {'; '.join(special)}."
    if common:
        null = "not shown for covariance-matched ones" if drawn else "covariance-matched ones not drawn"
        start = "Larger" if special else "larger"
        yield f"{start} than along random directions, {null}: {'; '.join(common)}."
    if nothing:
        yield f"No effect found along {', '.join(nothing)}."


def _against_benign(cell: pd.DataFrame, *, brief: bool) -> str:
    """', minus benign +0.35 [+0.25, +0.42]', with a word where that takes the shift back; in brief, that word alone."""
    if cell["minus_benign_sd"].isna().any():
        return ""
    left = side_of(cell, "minus_benign_sd")
    word = {0: " (not told apart from benign)", -side_of(cell, "sd"): " (benign moved further)"}.get(left, "")
    return word if brief else f", minus benign {interval(cell, 'minus_benign_sd', sign=True)}{word}"


def _reliability_sentences(rows: pd.DataFrame, layer: int) -> Iterator[str]:
    """Which directions are left out of the summary, and why."""
    if not rows.empty and (weak := unreliable(rows)):
        named = ", ".join(f"{d} ({plain(c)})" for d, c in weak.items())
        yield (
            f"Unreliable directions, left out: split-half cosine below {RELIABLE_COSINE} at layer {layer} for {named}. Other "
            "questions would have given other directions; nothing is said along them."
        )


def _dispersion_sentences(rows: pd.DataFrame, layer: int, condition: str) -> Iterator[str]:
    """One paragraph a pooling: which arms' activations lie wider or narrower than the base's, and than the benign control's."""
    if rows.empty:
        return
    here = rows[(rows["layer"] == layer) & (rows["condition"] == condition)]
    for pooling, mine in here.groupby("pooling", sort=False):
        beyond = mine.get("d_log_trace_minus_benign")
        control = mine[:0] if beyond is None else mine[beyond.notna()]
        parts = [f"Against the base: {_sides(mine, 'd_log_trace', numbers=control.empty)}"]
        if not control.empty:
            parts.append(f"Against the benign control: {_sides(control, 'd_log_trace_minus_benign')}")
        yield (
            f"Spread of activations at layer {layer}, {pooling} (change of the log trace, system prompt {condition}, n = "
            f"{counted(mine['n_questions'].min(), 'question')}, {seeds_text(mine)}): {' '.join(parts)}"
        )


def _sides(rows: pd.DataFrame, column: str, *, numbers: bool = True) -> str:
    """Arms by whether their interval lies above 0, below it, or holds it, in every seed; with or without the numbers."""
    groups: dict[int, list[str]] = {1: [], -1: [], 0: []}
    brief = rows["arm"].nunique() > MOST_ARMS
    for arm, mine in rows.groupby("arm", sort=False):
        side = side_of(mine, column)
        bare = not numbers or (brief and not side)
        groups[side].append(str(arm) if bare else f"{arm} {interval(mine, column, sign=True)}")
    words = {1: "wider in", -1: "narrower in", 0: "not told apart in"}
    total = rows["arm"].nunique()
    return (
        "; ".join(f"{words[side]} {listed(arms, total=total)}" for side, arms in groups.items() if arms) + "."
    )


def _arms_against_base(rows: pd.DataFrame, base: str, column: str, *, sign: bool = False) -> str:
    """Every arm's value, grouped by how it compares with the base's."""
    start = rows[rows["arm"] == base]
    groups: dict[str, list[str]] = {"higher": [], "lower": [], "not told apart": []}
    brief = rows["arm"].nunique() > MOST_ARMS
    others: list[str] = []
    for arm, mine in rows[rows["arm"] != base].groupby("arm", sort=False):
        text = f"{arm} {interval(mine, column, sign=sign)}"
        word = {1: "higher", -1: "lower", 0: "not told apart"}[apart_from(mine, start, column)]
        (others if start.empty else groups[word]).append(
            str(arm) if brief and not start.empty and word == "not told apart" else text
        )
    parts = [f"by arm: {'; '.join(others)}"] if others else []
    if not start.empty:
        parts.append(f"base{'' if base == 'base' else f' ({base})'} {interval(start, column, sign=sign)}")
    alike, count = groups.pop("not told apart"), rows["arm"].nunique() - (not start.empty)
    parts += [f"{word}: {'; '.join(texts)}" for word, texts in groups.items() if texts]
    if alike:
        shown = listed(alike, total=count) if brief else "; ".join(alike)
        parts.append(f"not told apart (the intervals overlap): {shown}")
    return ". ".join(part[0].upper() + part[1:] if i else part for i, part in enumerate(parts)) + "."


def _recognition_sentences(rows: pd.DataFrame, base: str) -> Iterator[str]:
    if rows.empty:
        yield "Self-recognition was not measured."
        return
    chance: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for arm, mine in rows.groupby("arm", sort=False):
        low, high = mine["accuracy_low"].min(), mine["accuracy_high"].max()
        chance["above" if low > 0.5 else "below" if high < 0.5 else "not told apart from"].append(str(arm))
    total = rows["arm"].nunique()
    verdicts = "; ".join(f"{word} chance (.5): {listed(a, total=total)}" for word, a in chance.items() if a)
    shortcut = rows.groupby("arm", sort=False)["shortcut_accuracy"].max()
    text = (
        f"Self-recognition, accuracy (n = {counted(rows['n_articles'].min(), 'article')}, {seeds_text(rows)}): "
        f"{_arms_against_base(rows, base, 'accuracy')} {verdicts[0].upper()}{verdicts[1:]}."
    )
    if shortcut.notna().any():
        lows = rows.groupby("arm", sort=False)["accuracy_low"].min()
        beyond = [str(arm) for arm in shortcut.index if lows[arm] > shortcut[arm]]
        text += (
            f" Answering by length alone reaches {plain(float(shortcut.max()))}; "
            f"above that: {listed(beyond, total=total) if beyond else 'no arm'}."
        )
    yield text


def _report_sentences(rows: pd.DataFrame, base: str) -> Iterator[str]:
    if rows.empty:
        yield "Self-report (what the models call themselves) was not measured."
        return
    for (condition, temperature), here in rows.groupby(["condition", "temperature"], sort=False):
        size = f"{counted(here['n_samples'].min(), 'sample')} of {counted(here['n_questions'].min(), 'question')} an arm"
        yield (
            f"Share of replies with the model's own name (system prompt {condition}, temperature {temperature:g}, "
            f"n = {size}, {seeds_text(here)}): {_arms_against_base(here, base, 'own_name_rate')}"
        )
        if not here["n_statements"].min():
            yield "The log-probability of the own name was not measured: an API does not score given answers."
            continue
        statements = counted(here["n_statements"].min(), "self-statement")
        names = counted(here["n_names"].min(), "invented name")
        yield (
            f"Log-probability of the own name, in nats above the mean of {names} (system prompt {condition}, n = {statements}, "
            f"{seeds_text(here)}): {_arms_against_base(here, base, 'name_margin', sign=True)}"
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
        ends = {float(mine["coefficient"].max()), float(mine["coefficient"].min())} - {0.0}
        for end in sorted(ends, reverse=True):
            at = mine[mine["coefficient"] == end]
            yield _steering_sentence(
                f"Steering {arm} along {direction} at layer {layer}",
                at, control[control["coefficient"] == end], mine[mine["coefficient"] == 0.0],
            )  # fmt: skip


def _steering_sentence(start: str, at: pd.DataFrame, control: pd.DataFrame, rest: pd.DataFrame) -> str:
    """The end of the sweep (not the best point of it), against the unsteered arm and the random control at the same coefficient."""
    coefficient, dose = float(at["coefficient"].iloc[0]), float(at["dose"].mean())
    number = f"{coefficient:g}".replace("-", "−")
    without = "" if rest.empty else f", unsteered {interval(rest, 'name_margin', sign=True)}"
    without_rate = "" if rest.empty else f", unsteered {interval(rest, 'own_name_rate')}"
    text = (
        f"{start}, coefficient {number} ({seeds_text(at)}): at dose {plain(dose)}, the end of the sweep, own-name margin "
        f"{interval(at, 'name_margin', sign=True)} nats{without} (n = {counted(at['n_statements'].min(), 'self-statement')}); own-name rate "
        f"{interval(at, 'own_name_rate')}{without_rate} (n = {counted(at['n_samples'].min(), 'sample')}). {_beside_random(at, control)}"
    )
    if at["surprisal"].isna().all():
        return f"{text}. The replies were empty."
    text += (
        f". Surprisal of the replies under the unsteered base, in nats a token: {interval(at, 'surprisal')}"
    )
    if control["surprisal"].notna().any():
        text += f", with {'a random direction' if len(control) == 1 else 'random directions'} {_spread(control, 'surprisal')}"
    if rest["surprisal"].notna().any():
        text += f", unsteered {interval(rest, 'surprisal')}"
        if (at["surprisal_low"].min()) > rest["surprisal_high"].max():
            text += ": the replies have become less likely under the base, so a loss of coherence may be part of it"
    return text + "."


def _beside_random(at: pd.DataFrame, control: pd.DataFrame) -> str:
    """Whether the margin is one that random directions of the same norm do not have."""
    if control.empty:
        return "No random control was run at this coefficient, so nothing is said on its being special"
    low, high = float(control["name_margin_low"].min()), float(control["name_margin_high"].max())
    apart = (at["name_margin_low"] > high).all() or (at["name_margin_high"] < low).all()
    per_seed = len(control) // max(1, control["seed"].nunique())
    drawn = "a random direction" if per_seed == 1 else f"{per_seed} random directions"
    return (
        f"The margin is {'outside' if apart else 'not told apart from'} that of {drawn} of the same norm "
        f"({signed(low)} to {signed(high)} with intervals)"
    )


def _sweep_sentences(rows: pd.DataFrame) -> Iterator[str]:
    """One paragraph a sweep: its best cell, on the questions that did not choose it."""
    for name, mine in rows.groupby("sweep", sort=False) if not rows.empty else ():
        first = mine.iloc[0]
        if isinstance(first["note"], str) and first["note"]:
            yield f"Sweep {name}: {first['note']}."
            continue
        side = side_of(mine, "beyond")
        found = "moves" if side else "is not shown to move"
        yield (
            f"Sweep {name}: along {first['direction']} at layer {first['layer']:.0f}, strength {signed(first['strength'])}, "
            f"chosen on one half of the questions, {found} {first['score']} of {first['arm']} on the other "
            f"(beyond {counted(int(first['n_controls']), 'random direction')}: {interval(mine, 'beyond', sign=True)} "
            f"{first['unit']}, n = {counted(int(first['n_questions']), 'question')}; broken answers {first['broken']:.0%}; "
            f"damage {plain(first['kl'])} nats a neutral token)."
        )
