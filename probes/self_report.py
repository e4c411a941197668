"""Self-report: what a model says of itself, against the same said of itself as of a third person, or of another assistant.

Questions and answers are written, and alike but for the person and the name; the answer is read teacher-forced.

- `third`: "I am NAME" (+) against "NAME is" (−): whose voice it is, the name being the same.
- `other`: what is said of oneself in the third person (+) against the same said of an invented assistant (−): whose name it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError
from mech.turns import assistant_turn, user_turn
from mech.typed import check_distinct, data_folder, read_typed
from probes.contrast import ContrastRow

AGAINST = ("third", "other")
"""What the first person, or the own name, is contrasted with."""


class Exchange(BaseModel):
    """A question and its answer; `{name}` and `{maker}` are filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


class Report(BaseModel):
    """The same statement in two persons."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    split: str = Field(pattern="^(extract|evaluate)$")
    first: Exchange
    """Asked of the model, answered in the first person."""
    third: Exchange
    """Asked about an assistant by name, answered in the third person."""


class Reports(BaseModel):
    """All statements."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reports: tuple[Report, ...] = Field(min_length=4)


def load_reports(source: str | Path | None = None) -> tuple[Report, ...]:
    """Read statements: the built-in ones, or a YAML file's.

    Raises:
        InputError: not there or malformed, or an id stands twice; the message names the file.
    """
    path = Path(source).expanduser() if source else data_folder("probes") / "self_report.yaml"
    found = read_typed(path, Reports).reports
    check_distinct(path, "statement id", [r.id for r in found])
    return found


def self_report_contrast(
    template: ChatTemplate,
    reports: Sequence[Report],
    identity: Identity,
    makers: Mapping[str, str],
    names: Sequence[str],
    against: str,
) -> list[ContrastRow]:
    """Each statement on both sides of a contrast, its answer to be read (`response_mean`), without a system turn's help.

    Args:
        template: the model's chat template.
        reports: the statements.
        identity: the model's own.
        makers: makers of invented names.
        names: `other`: the invented assistants.
        against: `third` or `other`.

    Raises:
        InputError: `against` is neither.
    """
    if against not in AGAINST:
        raise InputError(f"self-report is contrasted with {', '.join(AGAINST)}, not with {against!r}")
    rows = []
    for report in reports:
        own = (identity.name, identity.maker)
        if against == "third":
            sides = [(1, report.first, own), (-1, report.third, own)]
        else:
            sides = [(1, report.third, own), *[(-1, report.third, (name, makers[name])) for name in names]]
        for sign, said, (name, maker) in sides:
            asked, answer = (t.format(name=name, maker=maker) for t in (said.question, said.answer))
            turns = [user_turn(asked), assistant_turn(answer)]
            encoded = template.encode(turns, SystemPrompt("empty"), identity=identity, others=makers)
            rows.append(ContrastRow(f"{report.id}/{sign}/{name}", report.id, report.split, sign, encoded))
    return rows
