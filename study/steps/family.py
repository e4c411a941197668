"""Steps that ask whether identity directions are one thing, and how widely a checkpoint's activations spread."""

from pathlib import Path

import numpy as np
import pandas as pd

from activations.store import ActivationStore
from analysis.dispersion import spread, spread_change
from analysis.family import Member, Part, cosines, transfer, verdicts
from mech.errors import GuardError
from probes.contrast import ContrastArrays
from probes.crossfit import cross_fit
from probes.direction import Direction
from study.bench import Bench
from study.step import Step
from study.steps.activations import FILE, SITE
from study.steps.adjust import read_contrast
from study.steps.behaviour import write_csv


def agreement(step: Step, bench: Bench, folder: Path) -> None:
    """Cosines, transfer and the verdict on every pair of identity directions, at the declared layer."""
    layer, options = step.config["layer"], step.config["statistics"]
    members = [_member(bench, fitted, layer) for fitted in step.inputs["directions"]]
    rng = np.random.default_rng(options["seed"])
    found = cosines(members, layer, rng=rng, n_null=options["n_null"])
    moved = transfer(members, layer, rng=rng, n_null=options["n_null"])
    verdict = verdicts(found, moved).drop(columns="share_of_ceiling")
    other_way = verdict.rename(columns={"direction": "other", "other": "direction"})
    write_csv(found.merge(pd.concat([verdict, other_way])), folder / "identity_cosines.csv")
    write_csv(moved, folder / "identity_transfer.csv")


def _member(bench: Bench, fitted: Step, layer: int) -> Member:
    """A direction with its rows at a layer; a raw one is cross-fitted where it was scored so."""
    direction = Direction.load(bench.folder(fitted) / "direction.safetensors")
    rows = read_contrast(fitted, bench, [layer])
    folds, seed = fitted.config.get("folds", 1), fitted.config["statistics"]["seed"]
    if folds == 1:
        return Member(direction, _part(rows.of_split("extract")), _part(rows.of_split("evaluate")))
    rng = np.random.default_rng(seed)
    crossed = cross_fit(rows.activations, rows.questions, rows.signs, k=folds, rng=rng)
    fold_of = dict(zip(rows.questions, crossed.fold.tolist(), strict=True))
    return Member(direction, _part(rows.of_split("extract")), _part(rows), crossed.vectors[:, 0], fold_of)


def _part(rows: ContrastArrays) -> Part:
    return Part(rows.activations[:, 0], rows.signs, rows.questions)


def dispersion(step: Step, bench: Bench, folder: Path) -> None:
    """Spread of an arm's activations under every condition, beside the base's and the benign control's."""
    layer, rows = step.config["layer"], []
    _, arm, seed = step.name.split("/")
    benign = step.inputs["benign"] or (None,) * len(step.inputs["base"])
    for base, tuned, control in zip(step.inputs["base"], step.inputs["tuned"], benign, strict=True):
        for pooling in ("prompt_last", "response_mean"):
            h_base, questions = _read(bench, base, pooling, layer)
            h_tuned, same = _read(bench, tuned, pooling, layer)
            if same != questions:
                raise GuardError(f"{tuned.name}: its rows are not those of {base.name}")
            h_benign = _read(bench, control, pooling, layer)[0] if control else None
            now, before = spread(h_tuned), spread(h_base)
            row = {
                "arm": arm, "seed": int(seed.removeprefix("seed")), "condition": base.config["condition"]["condition"],
                "pooling": pooling, "layer": layer, "n_questions": len(set(questions)), "trace": now.trace,
                "trace_base": before.trace, "participation": now.participation, "entropy_rank": now.entropy_rank,
            }  # fmt: skip
            for name, change in spread_change(h_base, h_tuned, np.array(questions), benign=h_benign).items():
                row |= {
                    f"d_{name}": change.estimate,
                    f"d_{name}_low": change.low,
                    f"d_{name}_high": change.high,
                }
            rows.append(row)
    write_csv(pd.DataFrame(rows), folder / "dispersion.csv")


def _read(bench: Bench, capture: Step, pooling: str, layer: int) -> tuple[np.ndarray, list[str]]:
    with ActivationStore.open(bench.folder(capture) / FILE) as store:
        return store.read(SITE, pooling, layer), list(store.rows.ids)
