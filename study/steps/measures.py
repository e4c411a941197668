"""Steps that compare: shifts against the base on the same text, the 2×2 of weights and text, embeddings."""

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
from analysis.shift_nulls import Relabelled, null_columns, permuted, wrong_names
from mech.errors import GuardError
from probes.direction import Direction
from study.bench import Bench
from study.step import Step
from study.steps.activations import SITE
from study.steps.adjust import read_contrast
from study.steps.behaviour import write_csv


def shifts(step: Step, bench: Bench, folder: Path) -> None:
    """An arm's shift along every direction, at every layer, under every condition."""
    found: dict[tuple[int, int], pd.DataFrame] = {}
    members = list(zip(step.inputs["directions"], _directions(step, bench), strict=True))
    for i, (fitted, direction) in enumerate(members):
        others = _Others.of(fitted, direction, [d for _, d in members], step, bench)
        for j in range(len(step.inputs["base"])):
            found[j, i] = _shift(step, bench, j, direction, others)
    write_csv(pd.concat([found[place] for place in sorted(found)], ignore_index=True), folder / "shifts.csv")


@dataclass(frozen=True)
class _Others:
    """What a direction's shift is compared with, besides drawn directions."""

    permuted: Relabelled
    wrong: Relabelled | None
    """Of a name direction: those of the invented names."""
    unrelated: Float[np.ndarray, "n layers d"] | None
    """Of a trait's direction: unit vectors of the other traits'."""

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
        return cls(
            permuted(rows, rng=rng, n=options["n_null"]),
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
            **null_columns("wrong_name", observed, self.wrong.along(mean) if self.wrong else None),
            **null_columns("unrelated_trait", observed, unrelated),
        }


def _shift(step: Step, bench: Bench, which: int, direction: Direction, others: _Others) -> pd.DataFrame:
    """One direction under one condition."""
    options = step.config["statistics"]
    base, tuned = step.inputs["base"][which], step.inputs["tuned"][which]
    control = step.inputs["benign"][which] if step.inputs["benign"] else None
    pooling = direction.made_from["pooling"]
    rows = measured_rows(_store_sets(bench, base), direction.name, step.config["traits"])
    h_base, questions = _read(bench, base, pooling, rows)
    h_tuned, _ = _read(bench, tuned, pooling, rows, like=questions)
    h_benign = _read(bench, control, pooling, rows, like=questions)[0] if control else None
    shift = shift_by_layer(
        h_base, h_tuned, direction.vectors, np.array(questions), rng=np.random.default_rng(options["seed"]),
        n_boot=options["n_boot"], n_null=options["n_null"], benign=h_benign,
    )  # fmt: skip
    labels = {**_labels(step), "condition": base.config["condition"]["condition"], "text": "base",
              "pooling": pooling, "question_set": _question_set(direction.name, step.config["traits"]),
              "direction": direction.name}  # fmt: skip
    mean = (h_tuned.astype(np.float64) - h_base).mean(0)
    frame = to_frame(shift, **labels).assign(**others.columns(shift.raw.estimate, mean))
    frame["split_half"] = direction.split_half[frame["layer"]]
    return frame


def two_by_two(step: Step, bench: Bench, folder: Path) -> None:
    """Whose weights read whose text: the four cells, taken apart into effects."""
    options, frames = step.config["statistics"], []
    (base_on_base,), (tuned_on_base,) = step.inputs["base"], step.inputs["tuned"]
    tuned_on_own, base_on_own = step.inputs["own"]
    for direction in _directions(step, bench):
        pooling = direction.made_from["pooling"]
        rows = measured_rows(_store_sets(bench, base_on_base), direction.name, step.config["traits"])
        h_bb, questions = _read(bench, base_on_base, pooling, rows)
        h_bt, h_tb, h_tt = (
            _read(bench, c, pooling, rows, like=questions)[0]
            for c in (base_on_own, tuned_on_base, tuned_on_own)
        )
        rng = np.random.default_rng(options["seed"])
        effects = decompose(
            h_bb, h_bt, h_tb, h_tt, direction.vectors, np.array(questions), rng=rng, n_boot=options["n_boot"]
        )
        labels = {
            **_labels(step),
            "condition": base_on_base.config["condition"]["condition"],
            "direction": direction.name,
        }
        frames.append(two_by_two_frame(effects, **labels))
    write_csv(pd.concat(frames, ignore_index=True), folder / "two_by_two.csv")


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


def measured_rows(sets: Sequence[str], direction: str, traits: Sequence[str]) -> list[int]:
    """Which rows a direction is measured on: a trait's own questions, or the prompt sets for identity."""
    wanted = _question_set(direction, traits)
    if wanted.startswith("trait:"):
        return [i for i, name in enumerate(sets) if name == wanted]
    return [i for i, name in enumerate(sets) if not name.startswith("trait:")]


def _question_set(direction: str, traits: Sequence[str]) -> str:
    trait = direction.rpartition(":")[0]
    return f"trait:{trait}" if trait in traits else "prompt sets"


def _directions(step: Step, bench: Bench) -> list[Direction]:
    return [bench.direction(s) for s in step.inputs["directions"]]


def _labels(step: Step) -> dict[str, Any]:
    _, arm, seed = step.name.split("/")
    return {"arm": arm, "seed": int(seed.removeprefix("seed"))}


def _store_sets(bench: Bench, capture: Step) -> list[str]:
    with bench.store(capture) as store:
        return list(store.metadata["sets"])


def _read(
    bench: Bench, capture: Step, pooling: str, rows: Sequence[int], *, like: Sequence[str] | None = None
) -> tuple[Float[np.ndarray, "n layers d"], list[str]]:
    """Rows of a capture and their questions, which must be those of the capture it is compared with."""
    with bench.store(capture) as store:
        questions = [store.rows.questions[i] for i in rows]
        if like is not None and questions != list(like):
            raise GuardError(f"{capture.name}: its rows are not those it is compared with")
        return store.read(SITE, pooling, rows=np.array(rows)), questions
