"""Identity directions: contrasts between system prompts, read at the last token of the prompt.

- *name*: the model's own name and maker against invented ones, in the same sentence, so that what is left is
  whose name it is. Invented identities whose prompt has as many tokens as the own one come first.
- *presence*: the identity prompt against no system turn, an empty one, and a generic one: three contrasts.
"""

from collections.abc import Mapping, Sequence

from mech.chat import ChatTemplate, Identity, SystemPrompt, system_text
from mech.errors import InputError
from mech.identities import nearest_names
from mech.questions import Question
from mech.turns import user_turn
from probes.contrast import ContrastRow

PRESENCE = ("none", "empty", "generic")
"""What the identity prompt is contrasted with."""


def matched_names(
    template: ChatTemplate, identity: Identity, makers: Mapping[str, str], n: int
) -> dict[str, int]:
    """The `n` invented names whose identity prompt is nearest to the own one in tokens, each with the gap (`mech.identities.nearest_names`).

    Raises:
        InputError: fewer names than asked for.
    """

    def prompt(name: str) -> list[str]:
        own = name == identity.name
        return [identity.prompt if own else identity.renamed(name, makers[name]).prompt]

    return nearest_names(template, prompt, identity.name, makers, n)


def name_contrast(
    template: ChatTemplate,
    questions: Sequence[Question],
    identity: Identity,
    makers: Mapping[str, str],
    names: Sequence[str],
) -> list[ContrastRow]:
    """Each question under the own identity prompt (+) and under each invented one (−)."""
    rows = []
    for q in questions:
        rows.append(_row(template, q, 1, SystemPrompt("identity"), identity, makers))
        rows += [_row(template, q, -1, SystemPrompt("other", name), identity, makers) for name in names]
    return rows


def presence_contrast(
    template: ChatTemplate, questions: Sequence[Question], identity: Identity, against: str, generic: str
) -> list[ContrastRow]:
    """Each question under the own identity prompt (+) and under `none`, `empty` or `generic` (−).

    Raises:
        InputError: `against` is none of these.
    """
    if against not in PRESENCE:
        raise InputError(f"presence is contrasted with {', '.join(PRESENCE)}, not with {against!r}")
    other = SystemPrompt("text", generic) if against == "generic" else SystemPrompt.parse(against)
    rows = []
    for q in questions:
        rows.append(_row(template, q, 1, SystemPrompt("identity"), identity, {}))
        rows.append(_row(template, q, -1, other, identity, {}))
    return rows


def _row(
    template: ChatTemplate,
    question: Question,
    sign: int,
    condition: SystemPrompt,
    identity: Identity,
    makers: Mapping[str, str],
) -> ContrastRow:
    turn = [user_turn(question.text)]
    encoded = template.encode_prompt(turn, condition, identity=identity, others=makers)
    label = "none" if condition.kind == "none" else system_text(condition, identity, makers)
    return ContrastRow(f"{question.id}/{condition.kind}/{label}", question.id, question.split, sign, encoded)
