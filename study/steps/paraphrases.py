"""The step in which the base reads pairs of wordings of one length, and what it found of them."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd

from activations.store import ActivationStore
from mech.files import read_json, write_json
from probes.contrast import ContrastArrays, ContrastRow
from probes.paraphrase import LEAST_PAIRS, answer_paraphrases, load_paraphrases, prompt_paraphrases
from study.bench import Bench
from study.questions import identity_questions
from study.step import Step
from study.steps.activations import SITE, write_capture

log = logging.getLogger(__name__)

FOUND = "paraphrases.json"
"""By pooling: how many pairs there are, how many are left, and a note where these are too few."""


def read_pairs(step: Step, bench: Bench, folder: Path) -> None:
    """Capture the pairs that have one length under the model's tokenizer, by the pooling at which they are read."""
    model, pairs = bench.model(step.inputs["checkpoint"]), load_paraphrases()
    questions = [q for q in identity_questions(bench.spec) if q.split == "extract"][
        : step.config["questions_used"]
    ]
    made = {
        "prompt_last": prompt_paraphrases(model.template, pairs, questions, bench.identity),
        "response_mean": answer_paraphrases(model.template, pairs),
    }  # fmt: skip
    found = {pooling: _facts(rows, dropped) for pooling, (rows, dropped) in made.items()}
    for pooling, (rows, _) in made.items():
        if found[pooling]["note"]:
            log.warning("paraphrases read at %s: %s", pooling, found[pooling]["note"])
            continue
        about = [{"id": r.id, "question": r.question, "set": r.split, "sign": r.sign} for r in rows]
        metadata = {"step": step.name, "key": step.key, "contrast": "paraphrase", **found[pooling]}
        write_capture(folder / f"{pooling}.h5", model, [r.encoded for r in rows], about, [pooling], metadata)
    write_json(folder / FOUND, found)


def _facts(rows: list[ContrastRow], dropped: int) -> dict[str, Any]:
    kept = len({r.question for r in rows})
    note = ""
    if kept < LEAST_PAIRS:
        note = f"off: {kept} of {kept + dropped} pairs of wordings have one length under this tokenizer, {LEAST_PAIRS} are needed"
    return {"pairs": kept + dropped, "kept": kept, "dropped": dropped, "note": note}


def paraphrased(step: Step, bench: Bench, pooling: str) -> ContrastArrays | None:
    """The pairs' rows at a pooling, both wordings of each; None where too few are left."""
    path = bench.folder(step) / f"{pooling}.h5"
    if not path.is_file():
        return None
    with ActivationStore.open(path) as store:
        signs, questions = store.rows.columns["sign"].tolist(), list(store.rows.questions)
        return ContrastArrays(store.read(SITE, pooling), signs, questions, list(store.metadata["sets"]))


def paraphrase_table(step: Step, bench: Bench) -> pd.DataFrame:
    """How many pairs are left at each pooling, of the study's paraphrases."""
    rows: list[dict[str, Any]] = []
    for made in step.inputs.get("paraphrases", ()):
        found = read_json(bench.folder(made) / FOUND)
        rows += [{"pooling": pooling, **facts} for pooling, facts in found.items()]
    return pd.DataFrame(rows)
