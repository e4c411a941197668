"""The captions of figures: what is shown, how sure it is, and what it is compared with."""

import pandas as pd

from analysis.plot_table import seeds_text
from mech.errors import InputError

_BOOTSTRAP = "95 % intervals: studentised bootstrap or CR2 t, the wider, clustered by question"
_NULLS = (
    "Grey: the middle 95 % of shifts along random unit directions; dotted: along directions with the base's own "
    "covariance"
)
_SEEDS = "Of several seeds each is a small point with its interval, and the marker is their mean"
_NOTES: dict[str, tuple[str, str]] = {
    "shift_by_layer": (
        (
            "Shift: the projection of the tuned model's activations minus the base's on the same text, in SD of the base's "
            "projection over texts; positive = more of what the direction's name says"
        ),
        f"{_BOOTSTRAP}. {_NULLS}. Dotted lines that leave a panel lie farther out. Dashed: the benign control",
    ),
    "arm_direction_heatmap": (
        "Mean shift in SD of the base's projection; split-half: the direction's own split-half cosine",
        (
            "Star: in every seed the 95 % interval (clustered by question) excludes 0 and p < .05 "
            "against random unit directions; not corrected for the number of cells. Unreliable directions (split-half "
            "below 0.3): grey, never starred. Hatched: no value (the benign arm itself, or not measured)"
        ),
    ),
    "shift_by_condition": (
        (
            "Mean shift in SD of the base's projection, at the declared layer, each model reading the same text under each "
            f"system prompt condition. {_SEEDS}"
        ),
        f"{_BOOTSTRAP}. Grey: the middle 95 % of shifts along random unit directions",
    ),
    "comparison_differences": (
        (
            "The arm's projection minus the other arm's on the same text, in SD of the base's projection over texts. Diamond: the base, "
            "where nothing would be left of the other arm's own shift (none where that is the base). Grey names: unreliable directions (split-half below 0.3)"
        ),
        f"{_BOOTSTRAP}. Grey bars: the middle 95 % of differences along random unit directions",
    ),
    "undone_by_layer": (
        (
            "Share undone: how far the arm lies on the way from the other arm back to the base (1: there, 0: as far off as the other arm, "
            "below 0: farther); distance from the base, over the other arm's. Each dimension in units of the base's SD; products only "
            "between different questions, so that noise cancels. Gaps: the other arm's change is not told apart from none"
        ),
        "95 % intervals: delete-one-question jackknife; those that leave a panel go on. No null: 0 is nothing undone",
    ),
    "behaviour_differences": (
        "The arm's value minus the other arm's, on the same articles, questions and self-statements",
        (
            "95 % intervals: Newcombe's for paired rates at the effective sample size (accuracy, own-name rate), jackknife (distinct "
            "names, entropy; none where every reply claims the same), studentised bootstrap or CR2 t, the wider (the rest), clustered by "
            "article or question. 0: no difference"
        ),
    ),
    "dispersion_by_condition": (
        (
            "Spread: log of the mean squared distance of an arm's activations from their mean, less the base's on the same text. "
            "Dimensions in use: effective rank (exp of the spectrum's entropy), less the base's on the same questions. A point above the bar "
            f"behind it is more dispersed than the benign control under the same system prompt. {_SEEDS}"
        ),
        "95 % intervals: delete-one-question jackknife. No null but the benign control",
    ),
    "direction_cosines": (
        (
            "Cosine between directions at the declared layer. Two directions of the same thing should agree as far as their "
            "split-half cosines allow; grey: one of the two is unreliable (split-half below 0.3)"
        ),
        (
            "No interval and no null here. Directions that share texts (presence:none, presence:empty, ...) share noise too, which raises "
            "their cosine: whether identity directions agree is tested under 'Is identity one thing?'"
        ),
    ),
    "identity_cosines": (
        (
            "Cosine between two identity directions, each from questions that the other has not seen, so that shared rows cannot "
            "make them agree. Star: the two agree, which the transfer matrix must also show"
        ),
        (
            "Nulls, both ways: above 97.5 % of |cosines| with directions of the other contrast's covariance, and p < .05 against "
            "sign flips of its paired differences; two stars: also after correcting for the number of pairs (Holm, "
            "Bonferroni). Noise alone keeps a cosine below its ceiling (table)"
        ),
    ),
    "identity_transfer": (
        (
            "AUROC of a direction (row) on held-out rows of a contrast (column), none of whose questions it has seen; on the "
            "diagonal, its own contrast"
        ),
        "Star: 95 % score interval (whole questions independent) above one half. Random directions' range: table",
    ),
    "lora_alignment": (
        (
            "Energy: the share of a direction's squared length that lies in what an adapter's output maps can write, divided by "
            "that of a random direction, r/d; at 1 the adapter does not favour the direction"
        ),
        (
            "Null: directions drawn from the covariance of the base's activations (dotted: 97.5 % of them lie below, at one layer; some of "
            "many lines and layers cross it by chance). Weights have no interval over questions"
        ),
    ),
    "lora_overlap": (
        "Mean squared cosine of the principal angles between the spaces that two adapters can write into, over all output maps",
        (
            "Star: beyond random spaces of the same rank, p < .05 in every seed. Hatched: not compared, or, where there are many, "
            "shown at the other place of the pair"
        ),
    ),
    "patching": (
        (
            "Effect: the score of one model run with the other's activations at one layer and span, less its score without them. "
            "Base into finetuned: what is undone; finetuned into base: what is brought about. The base is the model under the "
            "last adapter"
        ),
        (
            "95 % intervals: t, by the delete-one-question jackknife. Null: an equally large change of the same tokens in a "
            "random direction (dotted). Dashed: the whole change between the two models, where told apart from 0"
        ),
    ),
    "adapter_ranges": (
        (
            "The score with the last adapter on in a range of layers only, or everywhere else only, less the score without it. "
            "Parts need not add up to the whole: layers act together"
        ),
        "95 % intervals: t, by the delete-one-question jackknife. No null: compare with the whole change, above",
    ),
    "monitoring": (
        (
            "Pearson correlation of the projection at the prompt's last token with the behaviour's score, over questions asked "
            "under graded system prompts. Within: each condition's mean subtracted from both, which leaves what the system "
            "prompt does not tell"
        ),
        "95 % intervals: delete-one-question jackknife on Fisher's z. Nulls: random and covariance-matched directions (table)",
    ),
    "two_by_two_bars": (
        (
            "Weights: the tuned model against the base on the base's text. Text: the base on the tuned model's text against "
            "its own. Interaction: what is left. Total: the sum. Text can do nothing to a direction read before the reply. Grey "
            "name: unreliable (split-half below 0.3)"
        ),
        f"{_BOOTSTRAP}. No null here: that of the weights' part is in the figures of the shifts",
    ),
    "embedding": (
        (
            "The map was fitted on the base's activations only, and the arms projected into it. It is descriptive: nothing is "
            "inferred from distances"
        ),
        "",
    ),
    "direction_quality": (
        (
            "Split-half cosine: the median cosine between the directions from two halves of the questions: how far to "
            "believe a direction. AUROC: on questions held out from the fit"
        ),
        "Bars: 95 % interval of the AUROC",
    ),
    "self_recognition_bars": (
        (
            "Each article is shown with the arm's own text and with another's. Margin: logit of Yes minus No, own minus "
            "other's text. Length shortcut: what answering by length alone reaches on the same texts. Where P(Yes) + P(No) "
            "is small the model hardly treats it as a yes-or-no question"
        ),
        "95 % intervals, clustered by article. Null: chance, .5",
    ),
    "self_report_bars": (
        (
            "Share and variety of names in replies to questions that ask the model who it is. Margin: log-probability of "
            "the own name minus the mean of invented names"
        ),
        (
            "95 % intervals, clustered by question: Wilson at the effective sample size (shares), jackknife (distinct "
            "names, entropy; none where every reply claims the same), bootstrap (margin)"
        ),
    ),
    "dose_response": (
        "Dose: norm of the added vector over the mean norm of the activation",
        (
            "95 % intervals, clustered by question: Wilson at the effective sample size (share), else studentised bootstrap or CR2 t. "
            "Null: random directions of the same norm, hollow and dashed"
        ),
    ),
    "sweep_response": (
        (
            "Change of the score from the unsteered model's; a broken answer counts as no change. Hollow: neutral answers "
            "damaged beyond what is allowed"
        ),
        "95 % intervals over questions. Null: random directions of the same norm, mean (line) and largest |change| (band)",
    ),
    "loss_curves": ("Loss on the assistant's tokens only", ""),
}
_COUNTS = (
    ("n_questions", "questions"), ("n_articles", "articles"), ("n_samples", "samples a point"), ("n_pairs", "pairs"),
    ("n_maps", "maps"),
)  # fmt: skip


def caption(figure: str, frame: pd.DataFrame, *, name: str) -> str:
    """The caption of a figure: what is shown, n, seeds, interval method, null, and where its numbers lie.

    Args:
        figure: Name of the function in `analysis.plots` that drew it.
        frame: The rows that it shows; n and seeds are read from them.
        name: The file stem it is saved under.

    Raises:
        InputError: there is no such figure.
    """
    if figure not in _NOTES:
        raise InputError(f"no figure {figure!r}; there are: {', '.join(_NOTES)}")
    what, doubt = _NOTES[figure]
    count, seeds = _count(frame), seeds_text(frame)
    size = "; ".join(part for part in (count, seeds if count else seeds.capitalize()) if part)
    return " ".join(f"{part}." for part in (what, size, doubt, f"Numbers: {name}.csv") if part)


def _count(frame: pd.DataFrame) -> str:
    statements = int(frame["n_statements"].max()) if "n_statements" in frame.columns else 0
    more = f" (margin: {statements:,} self-statements)" if statements else ""
    for column, word in _COUNTS:
        if column in frame.columns and frame[column].notna().any():
            low, high = int(frame[column].min()), int(frame[column].max())
            return f"n = {low:,} {word}{more}" if low == high else f"n = {low:,} to {high:,} {word}{more}"
    return f"n = {frame['row'].nunique():,} texts an arm" if "row" in frame.columns else ""
