"""What each arm is made of, and how each of its stages was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from finetune.outcome import RECORD
from mech.files import read_json
from study.bench import Bench
from study.spec_stages import AT
from study.step import Step


def arms_table(step: Step) -> pd.DataFrame:
    """One row an arm: its stages, in order."""
    return pd.DataFrame(
        [{"arm": arm, "stages": ", then ".join(map(_in_words, stages)) or "none: the base"}
         for arm, stages in step.config["arms"].items()]
    )  # fmt: skip


def stages_table(step: Step, bench: Bench) -> pd.DataFrame:
    """One row a training: which arms it serves, on what, under which system prompt, with what acting on the model, and whether it learnt."""
    rows = []
    for trained in step.inputs.get("trained", ()):
        config, stage = trained.config, trained.labels["stage"]
        row = {
            **trained.labels,
            "arms": ", ".join(_served(stage, step.config["arms"])),
            "dataset": trained.inputs["data"][0].labels["dataset"],
            "system_prompt": config["condition"]["condition"],
        }
        rows.append(
            row | (_outcome(trained, bench) if trained.kind == "train" else {"epochs": config["epochs"]})
        )
    return pd.DataFrame(rows)


def _outcome(trained: Step, bench: Bench) -> dict[str, Any]:
    """How a training on this machine was set up and went. Of a remote job none of this is known."""
    about = read_json(bench.folder(trained) / RECORD)
    settings, own = about["settings"], about["own_rows"]
    return {
        "acting": "; ".join(map(_acting, trained.config["interventions"])) or "nothing",
        "method": settings["method"]
        if not settings["quantise"]
        else f"{settings['method']}, {settings['quantise']}",
        "n_rows": about["n_rows"],
        "steps": about["global_step"],
        "learning_rate": settings["learning_rate"],
        "own_loss_before": own["loss_before"],
        "own_loss_after": own["loss_after"],
    }


def _served(stage: str, arms: Mapping[str, Sequence[str]]) -> list[str]:
    """The arms that a training is part of; those that take it at an early step say which."""
    found = []
    for arm, entries in arms.items():
        for i, entry in enumerate(entries):
            name, _, at = entry.partition(AT)
            if "+".join([*entries[:i], name]) == stage:
                found.append(f"{arm} (after step {at})" if at else arm)
    return found


def _in_words(entry: str) -> str:
    name, _, at = entry.partition(AT)
    return f"{name} up to step {at}" if at else name


def _acting(intervention: Mapping[str, Any]) -> str:
    """`ablate evil:text at layer 9 on all tokens`."""
    of = {k: intervention[k] for k in ("coefficient", "floor", "ceiling") if intervention[k] is not None}
    how = "".join(f", {name} {value:g}" for name, value in of.items())
    layers = intervention["layers"]
    where = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{intervention['kind']} {intervention['direction']} at {where} on {intervention['positions']} tokens{how}"
