"""The step that patches between an arm and what lies under its last adapter, both ways."""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.patching import equal_ranges, patching_table, ranges_table
from mech.chat import ChatTemplate
from mech.identities import load_invented, names_for_statements
from mech.progress import track
from probes.answers import Case, own_name_cases, patch_case, trait_cases
from study.bench import Bench, prompt_of
from study.frames import write_csv
from study.plan_patching import OWN_NAME
from study.questions import trait_named
from study.step import Step


def patch(step: Step, bench: Bench, folder: Path) -> None:
    """`patching.csv` and `adapter_ranges.csv`: one model in memory, its last adapter switched by layer."""
    config = step.config
    model = bench.model(step.inputs["checkpoint"], merge=False)
    layers = config["layers"] or list(range(model.n_layers))
    ranges = equal_ranges(model.n_layers, config["ranges"])
    rng = np.random.default_rng(config["seed_of_control"])
    labels = {k: config[k] for k in ("arm", "seed", "reference")}
    patched, ranged = [], []
    for named in config["answers"]:
        answer = named["answer"]
        found = [
            patch_case(model, case, layers=layers, spans=config["spans"], ranges=ranges, rng=rng, token_budget=config["token_budget"])
            for case in track(_cases(answer, step, bench, model.template), f"patching ({answer})")
        ]  # fmt: skip
        about = {**labels, "answer": answer}
        patched.append(patching_table(found, layers, config["spans"]).assign(**about))
        ranged.append(ranges_table(found, ranges).assign(**about))
    for name, frames in (("patching", patched), ("adapter_ranges", ranged)):
        frame = pd.concat(frames, ignore_index=True)
        first = [*labels, "answer"]
        write_csv(frame[[*first, *frame.columns.drop(first)]], folder / f"{name}.csv")


def _cases(answer: str, step: Step, bench: Bench, template: ChatTemplate) -> list[Case]:
    config = step.config
    condition, names = prompt_of(config["condition"]), bench.names(config["condition"])
    if answer != OWN_NAME:
        questions = trait_named(bench.spec, answer).half("evaluate", config["questions"])
        return trait_cases(template, questions, condition, names)
    invented = load_invented()
    statements, own = invented.self_statements[: config["questions"]], bench.identity.name
    others = names_for_statements(template, statements, own, invented.makers, config["names"])
    return own_name_cases(template, statements, own, others, condition, names)
