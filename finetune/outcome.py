"""What a finished training leaves beside its weights: the loss curve, and a record of what made it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from finetune.labels import TrainingRow
from finetune.learnt import OwnRows
from finetune.loop import Job
from finetune.settings import TrainSettings
from finetune.state import FILE, StepRecord, loss_lines
from mech.errors import InputError
from mech.files import digest_of, read_json, write_json, write_text
from mech.interventions import Intervention, describe
from mech.models import ChatModel

RECORD = "trainer_state.json"
"""Written last: where it is, the training is complete."""


def stamp_of(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    seed: int,
    interventions: Sequence[Intervention],
) -> str:
    """Digest of all that determines what a training yields."""
    return digest_of(
        [
            model.checkpoint.key,
            str(model.dtype),
            digest_of([[r.ids, r.targets] for r in rows]),
            settings.model_dump(mode="json"),
            seed,
            [describe(i) for i in interventions],
        ]
    )


def done_before(folder: Path, stamp: str) -> list[StepRecord]:
    """The records of the same training where the folder holds it complete; empty where it holds none.

    Raises:
        InputError: it holds another one, or another program's.
    """
    if not (folder / RECORD).is_file():
        return []
    about = read_json(folder / RECORD)
    # Hugging Face's trainer writes a file of this name too.
    if not isinstance(about, dict) or "stamp" not in about:
        raise InputError(f"{folder / RECORD}: another program's: name another folder")
    if about["stamp"] != stamp:
        raise InputError(
            f"{folder}: holds another training (other data, settings, seed or parent model): name another folder"
        )
    return [StepRecord(**r) for r in about["log_history"]]


def write_outcome(
    folder: Path,
    job: Job,
    records: Sequence[StepRecord],
    interventions: Sequence[Intervention],
    own_rows: OwnRows,
) -> None:
    """Write the loss curve and the record, and remove the resume point."""
    systems = Counter(row.system for row in job.rows)
    write_text(folder / "loss.jsonl", loss_lines(records))
    write_json(
        folder / RECORD,
        {
            "stamp": job.stamp,
            "trained_on": job.model.checkpoint.to_json(),
            "seed": job.seed,
            "settings": job.settings.model_dump(mode="json"),
            "interventions": [describe(i) for i in interventions],
            "n_rows": len(job.rows),
            "system_turns": [{"text": text, "rows": n} for text, n in systems.most_common(20)],
            "processes": job.team.size,
            "global_step": len(records),
            "tokens": sum(r.tokens for r in records),
            "seconds": round(sum(r.seconds for r in records), 3),
            "final_loss": records[-1].loss,
            "own_rows": asdict(own_rows),
            "log_history": [vars(r) for r in records],
        },
    )
    (folder / FILE).unlink(missing_ok=True)
