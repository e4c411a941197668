"""Steps that compare: shifts against the base (or another arm) on the same text, the 2×2 of weights and text, embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from analysis.embed import embed_arms
from analysis.shift import shift_by_layer, to_frame, two_by_two_frame
from analysis.shift import two_by_two as decompose
from analysis.shift_nulls import Relabelled, null_columns, permuted, reworded, wrong_names
from mech.errors import GuardError
from probes.direction import Direction
from study.bench import Bench
from study.frames import write_csv
from study.step import Step
from study.steps.activations import SITE, questions_of
from study.steps.adjust import read_contrast
from study.steps.paraphrases import paraphrased

PROMPT_SETS = "prompt sets"
"""`question_set` of a direction that is measured on all prompt sets together."""


def shifts(step: Step, bench: Bench, folder: Path) -> None:
    """An arm's shift along every direction, at every layer, under every condition.

    From the base; or from another arm, where there is a `reference`, the base itself, that gives units and nulls.
    """
    found: dict[tuple[int, int], pd.DataFrame] = {}
    directions = _directions(step, bench)
    for read_at, members in _read_alike(directions, step.config["traits"]).items():
        fitted = {i: step.inputs["directions"][i] for i in members}
        others = {i: _Others.of(fitted[i], directions[i], directions, step, bench) for i in members}
        for j in range(len(step.inputs["base"])):
            rows = _paired(step, bench, j, *read_at)
            found |= {(j, i): _shift(step, j, directions[i], others[i], rows) for i in members}
    write_csv(pd.concat([found[place] for place in sorted(found)], ignore_index=True), folder / "shifts.csv")


@dataclass(frozen=True)
class _Others:
    """What a direction's shift is compared with, besides drawn directions."""

    permuted: Relabelled
    reworded: Relabelled | None
    """Two wordings of the same, read where the direction is read; None where too few pairs are left."""
    wrong: Relabelled | None
    """For a name direction: directions of the invented names, each put in the own name's place."""
    unrelated: Float[np.ndarray, "n layers d"] | None
    """For a trait's direction: the unit vectors of the other traits' directions."""

    @classmethod
    def of(
        cls, fitted: Step, direction: Direction, known: Sequence[Direction], step: Step, bench: Bench
    ) -> "_Others":
        options, traits = step.config["statistics"], step.config["traits"]
        rows = read_contrast(fitted, bench).of_split("extract")
        rng = np.random.default_rng(options["seed"])
        trait = direction.name.rpartition(":")[0]
        others = [d.unit for d in known if (t := d.name.rpartition(":")[0]) in traits and t != trait]
        named = direction.name.startswith("identity:name")
        pairs = [paraphrased(s, bench, fitted.config["pooling"]) for s in step.inputs["paraphrases"]]
        return cls(
            permuted(rows, rng=rng, n=options["n_null"]),
            next((reworded(p, rng=rng, n=options["n_null"]) for p in pairs if p), None),
            wrong_names(rows) if named else None,
            np.stack(others) if others and trait in traits else None,
        )

    def columns(
        self, observed: Float[np.ndarray, " layers"], mean: Float[np.ndarray, "layers d"]
    ) -> dict[str, Any]:
        """P values and largest shifts of each kind."""
        unrelated = None if self.unrelated is None else (self.unrelated * mean).sum(-1)
        return {
            **null_columns("permutation", observed, self.permuted.along(mean)),
            **null_columns("paraphrase", observed, self.reworded.along(mean) if self.reworded else None),
            **null_columns("wrong_name", observed, self.wrong.along(mean) if self.wrong else None),
            **null_columns("unrelated_trait", observed, unrelated),
        }


@dataclass(frozen=True)
class _Rows:
    """The same rows read by base, tuned model and benign control."""

    questions: list[str]
    base: Float[np.ndarray, "n layers d"]
    tuned: Float[np.ndarray, "n layers d"]
    benign: Float[np.ndarray, "n layers d"] | None
    reference: Float[np.ndarray, "n layers d"] | None


def _paired(step: Step, bench: Bench, which: int, pooling: str, asked: str) -> _Rows:
    """One condition's rows; read once for all directions that are measured on them."""
    base, questions = _read(bench, step.inputs["base"][which], pooling, asked)

    def others(role: str) -> Float[np.ndarray, "n layers d"] | None:
        captures = step.inputs.get(role)
        return _read(bench, captures[which], pooling, asked, like=questions)[0] if captures else None

    tuned, _ = _read(bench, step.inputs["tuned"][which], pooling, asked, like=questions)
    return _Rows(questions, base, tuned, others("benign"), others("reference"))


def _shift(step: Step, which: int, direction: Direction, others: _Others, rows: _Rows) -> pd.DataFrame:
    """One direction under one condition."""
    options, traits = step.config["statistics"], step.config["traits"]
    shift = shift_by_layer(
        rows.base, rows.tuned, direction.vectors, np.array(rows.questions), rng=np.random.default_rng(options["seed"]),
        n_boot=options["n_boot"], n_null=options["n_null"], benign=rows.benign, reference=rows.reference,
    )  # fmt: skip
    labels = {**step.labels, "condition": step.inputs["base"][which].config["condition"]["condition"], "text": "base",
              "pooling": direction.made_from["pooling"], "question_set": _question_set(direction.name, traits),
              "direction": direction.name}  # fmt: skip
    mean = (rows.tuned.astype(np.float64) - rows.base).mean(0)
    frame = to_frame(shift, **labels).assign(**others.columns(shift.raw.estimate, mean))
    frame["split_half"] = direction.split_half[frame["layer"]]
    return frame


def two_by_two(step: Step, bench: Bench, folder: Path) -> None:
    """Whose weights read whose text: the four cells, taken apart into effects."""
    options, found = step.config["statistics"], dict[int, pd.DataFrame]()
    (base_on_base,), (tuned_on_base,) = step.inputs["base"], step.inputs["tuned"]
    tuned_on_own, base_on_own = step.inputs["own"]
    directions = _directions(step, bench)
    condition = base_on_base.config["condition"]["condition"]
    for read_at, members in _read_alike(directions, step.config["traits"]).items():
        h_bb, questions = _read(bench, base_on_base, *read_at)
        h_bt, h_tb, h_tt = (
            _read(bench, c, *read_at, like=questions)[0] for c in (base_on_own, tuned_on_base, tuned_on_own)
        )
        for i in members:
            rng = np.random.default_rng(options["seed"])
            effects = decompose(
                h_bb, h_bt, h_tb, h_tt, directions[i].vectors, np.array(questions), rng=rng, n_boot=options["n_boot"]
            )  # fmt: skip
            labels = {**step.labels, "condition": condition, "direction": directions[i].name}
            found[i] = two_by_two_frame(effects, **labels)
            found[i]["split_half"] = directions[i].split_half[found[i]["layer"]]
    write_csv(pd.concat([found[i] for i in sorted(found)], ignore_index=True), folder / "two_by_two.csv")


def embedding(step: Step, bench: Bench, folder: Path) -> None:
    """PCA and UMAP of one layer, fitted on the base, every arm projected."""
    config, frames = step.config, []
    captures = dict(
        zip([f"{arm}/{seed}" for arm, seed in config["arms"]], step.inputs["captures"], strict=True)
    )
    points, about = {}, None
    for label, capture in captures.items():
        with bench.store(capture) as store:
            points[label] = store.read(SITE, config["pooling"], config["layer"])
            about = list(zip(store.rows.ids, store.metadata["sets"], strict=True))
    (base_label, base), *others = points.items()
    for method in config["methods"]:
        frame = embed_arms(base, {base_label: base, **dict(others)}, method, seed=config["seed"])
        frames.append(frame.assign(method=method))
    found = pd.concat(frames, ignore_index=True)
    found[["arm", "seed"]] = found["arm"].str.rsplit("/", n=1, expand=True)
    found["seed"] = found["seed"].astype(int)
    found["question_set"] = [about[row][1] for row in found["row"]] if about else ""
    found["layer"] = config["layer"]
    found["condition"] = step.inputs["captures"][0].config["condition"]["condition"]
    write_csv(found, folder / "embedding.csv")


def _read_alike(directions: Sequence[Direction], traits: Sequence[str]) -> dict[tuple[str, str], list[int]]:
    """Which directions are measured on the same rows at the same place: their places in the list by pooling and question set."""
    alike: dict[tuple[str, str], list[int]] = {}
    for i, direction in enumerate(directions):
        place = direction.made_from["pooling"], _question_set(direction.name, traits)
        alike.setdefault(place, []).append(i)
    return alike


def _question_set(direction: str, traits: Sequence[str]) -> str:
    """On what a direction is measured: a trait's own questions, or all prompt sets for identity."""
    trait = direction.rpartition(":")[0]
    return f"trait:{trait}" if trait in traits else PROMPT_SETS


def _directions(step: Step, bench: Bench) -> list[Direction]:
    return [bench.direction(s) for s in step.inputs["directions"]]


def _read(
    bench: Bench, capture: Step, pooling: str, asked: str, *, like: Sequence[str] | None = None
) -> tuple[Float[np.ndarray, "n layers d"], list[str]]:
    """A capture's rows of a question set and their questions, which must be those of the capture it is compared with."""
    with bench.store(capture) as store:
        sets = enumerate(store.metadata["sets"])
        rows = [i for i, name in sets if asked == (name if name.startswith("trait:") else PROMPT_SETS)]
        every = questions_of(store)
        questions = [every[i] for i in rows]
        if like is not None and questions != list(like):
            raise GuardError(f"{capture.name}: its rows are not those it is compared with")
        return store.read(SITE, pooling, rows=np.array(rows)), questions
