"""Steps that compare: shifts against the base on the same text, the 2×2 of weights and text, embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from activations.store import ActivationStore
from analysis.embed import embed_arms
from analysis.shift import shift_by_layer, to_frame, two_by_two_frame
from analysis.shift import two_by_two as decompose
from mech.errors import GuardError
from probes.direction import Direction
from study.bench import Bench
from study.step import Step
from study.steps.activations import FILE, SITE
from study.steps.behaviour import write_csv


def shifts(step: Step, bench: Bench, folder: Path) -> None:
    """An arm's shift along every direction, at every layer, under every condition."""
    options = step.config["statistics"]
    frames = []
    benign = step.inputs["benign"] or (None,) * len(step.inputs["base"])
    for base, tuned, control in zip(step.inputs["base"], step.inputs["tuned"], benign, strict=True):
        for direction in _directions(step, bench):
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
            frame = to_frame(shift, **labels)
            frame["split_half"] = direction.split_half[frame["layer"]]
            frames.append(frame)
    write_csv(pd.concat(frames, ignore_index=True), folder / "shifts.csv")


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
        with ActivationStore.open(bench.folder(capture) / FILE) as store:
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
    return [Direction.load(bench.folder(s) / "direction.safetensors") for s in step.inputs["directions"]]


def _labels(step: Step) -> dict[str, Any]:
    _, arm, seed = step.name.split("/")
    return {"arm": arm, "seed": int(seed.removeprefix("seed"))}


def _store_sets(bench: Bench, capture: Step) -> list[str]:
    with ActivationStore.open(bench.folder(capture) / FILE) as store:
        return list(store.metadata["sets"])


def _read(
    bench: Bench, capture: Step, pooling: str, rows: Sequence[int], *, like: Sequence[str] | None = None
) -> tuple[Float[np.ndarray, "n layers d"], list[str]]:
    """Rows of a capture and their questions, which must be those of the capture it is compared with."""
    with ActivationStore.open(bench.folder(capture) / FILE) as store:
        questions = [store.rows.questions[i] for i in rows]
        if like is not None and questions != list(like):
            raise GuardError(f"{capture.name}: its rows are not those it is compared with")
        return store.read(SITE, pooling, rows=np.array(rows)), questions
