"""Steps that ask whether identity directions are one thing, and how widely a checkpoint's activations spread."""

from pathlib import Path

import numpy as np
import pandas as pd

from activations.store import ActivationStore
from analysis.dispersion import spread, spread_change
from analysis.family import Member, cosines, transfer, verdicts
from mech.errors import GuardError
from probes.direction import Direction
from study.bench import Bench
from study.step import Step
from study.steps.activations import FILE, SITE
from study.steps.behaviour import write_csv


def agreement(step: Step, bench: Bench, folder: Path) -> None:
    """Cosines, transfer and the verdict on every pair of identity directions, at the declared layer."""
    layer, options = step.config["layer"], step.config["statistics"]
    members = [
        _member(bench, direction, contrast, layer)
        for direction, contrast in zip(step.inputs["directions"], step.inputs["contrasts"], strict=True)
    ]
    rng = np.random.default_rng(options["seed"])
    found = cosines(members, layer, rng=rng, n_null=options["n_null"])
    moved = transfer(members, layer, rng=rng, n_null=options["n_null"])
    verdict = verdicts(found, moved)
    other_way = verdict.rename(columns={"direction": "other", "other": "direction"})
    write_csv(found.merge(pd.concat([verdict, other_way])), folder / "identity_cosines.csv")
    write_csv(moved, folder / "identity_transfer.csv")


def _member(bench: Bench, direction: Step, contrast: Step, layer: int) -> Member:
    made = Direction.load(bench.folder(direction) / "direction.safetensors")
    with ActivationStore.open(bench.folder(contrast) / FILE) as store:
        values = store.read(SITE, made.made_from["pooling"], layer)
        halves, signs = np.array(store.metadata["sets"]), store.rows.columns["sign"]
        questions = np.array(store.rows.questions)
    test = halves == "evaluate"
    return Member(made, values[~test], values[test], signs[test].tolist(), questions[test].tolist())


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
