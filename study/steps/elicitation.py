"""Tables on how traits were elicited: what became of the rollouts, and which vector to believe."""

import numpy as np
import pandas as pd

from analysis.elicitation import elicitation_table
from mech.files import read_json
from probes.direction import Direction
from probes.rollout_filter import UNFILTERED
from study.bench import Bench
from study.frames import stacked
from study.step import Step
from study.steps.activations import SITE
from study.steps.judge import KEPT
from study.steps.texts import read_rollouts


def rollouts_table(step: Step, bench: Bench) -> pd.DataFrame:
    """For each trait: how many pairs of rollouts there were, and how many the filter dropped, and why."""
    rows = []
    for fitted in _elicited(step, "prompts").values():
        contrast = fitted.inputs["contrast"][0]
        about = {"trait": contrast.config["trait"]}
        if contrast.inputs["judged"]:
            found = read_json(bench.folder(contrast.inputs["judged"][0]) / KEPT)
            rows.append(
                {
                    **about,
                    "filter": f"trait {found['thresholds']['trait']:g}, coherence {found['thresholds']['coherence']:g}",
                    "judge": f"{found['judge']['model']} ({', '.join(found['judge']['how'])})",
                    **{k: found[k] for k in ("pairs", "kept", "questions")},
                    "dropped": _counts(found["dropped"]),
                    "trait_verdicts": _counts(found["verdicts"]["trait"]),
                    "coherence_verdicts": _counts(found["verdicts"]["coherence"]),
                }
            )
        else:
            asked, answers = read_rollouts(bench.folder(contrast.inputs["rollouts"][0]))
            empty = sum(not a.strip() for a in answers)
            with bench.store(contrast) as store:
                left = len(set(store.rows.questions))
            dropped = _counts({"empty answers": empty} if empty else {})
            counts = {"pairs": len(asked) // 2, "questions": left, "dropped": dropped}
            rows.append({**about, "filter": UNFILTERED, **counts})
    return pd.DataFrame(rows)


def elicitations(step: Step, bench: Bench) -> pd.DataFrame:
    """Traits elicited both ways: every vector on the evaluation half of the written answers."""
    frames = []
    asked, written = _elicited(step, "prompts"), _elicited(step, "text")
    for name in [trait for trait in written if trait in asked]:
        reference = f"{name}:text"
        vectors = {reference: bench.direction(written[name])}
        for file in asked[name].config["positions"]:
            path = bench.folder(asked[name]) / f"{file}.safetensors"
            vectors[f"{name}:prompts {file}"] = Direction.load(path)
        with bench.store(written[name].inputs["contrast"][0]) as store:
            test = np.array(store.metadata["sets"]) == "evaluate"
            if not test.any():
                continue
            activations = store.read(SITE, written[name].config["pooling"])[test]
            signs, questions = store.rows.columns["sign"][test], np.array(store.rows.questions)[test]
        found = elicitation_table(
            vectors,
            activations,
            signs.tolist(),
            questions.tolist(),
            reference=reference,
        )
        frames.append(found.rename(columns={"cosine": "cosine_with_text"}))
    return stacked(frames)


def _elicited(step: Step, way: str) -> dict[str, Step]:
    """Direction steps of one elicitation, by trait."""
    found = [s for s in step.inputs["directions"] if s.config.get("elicitation") == way]
    return {
        s.inputs["contrast"][0].config["trait"]: s
        for s in found
        if s.inputs["contrast"][0].config["contrast"] == way
    }


def _counts(counts: dict[str, int]) -> str:
    return "; ".join(f"{reason} {n}" for reason, n in sorted(counts.items())) or "none"
