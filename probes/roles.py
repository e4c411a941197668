"""The assistant axis: the default assistant against roles that it can be asked to play.

It is role-ness, not identity: what all roles have in common and the plain assistant lacks. It is kept beside the identity
directions so that these can be told from it (method: the assistant-axis line of work, safety-research/assistant-axis).
We wrote the roles and questions ourselves.
"""

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from mech.chat import ChatTemplate, Identity, SystemPrompt
from mech.errors import InputError
from mech.questions import Question
from mech.turns import assistant_turn, user_turn
from mech.typed import check_distinct, data_folder, read_typed
from probes.contrast import ContrastRow

FIXED_ANSWER = "Let me think about that for a moment. There are a few things to say about it, and I will take them one by one."
"""What anybody could begin with, whatever was asked."""


class Role(BaseModel):
    """Somebody the assistant can be asked to be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    prompts: tuple[str, ...] = Field(min_length=1)
    """System prompts that ask for the role; questions take turns among them."""


class Roles(BaseModel):
    """Roles, and questions that anybody could answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    roles: tuple[Role, ...] = Field(min_length=2)
    questions: tuple[Question, ...] = Field(min_length=4)


def load_roles(source: str | Path | None = None) -> Roles:
    """Read roles: the built-in 64, or a YAML file's.

    Raises:
        InputError: not there or malformed, or a name or id stands twice; the message names the file.
    """
    path = Path(source).expanduser() if source else data_folder("probes") / "roles.yaml"
    found = read_typed(path, Roles)
    check_distinct(path, "role", [r.name for r in found.roles])
    check_distinct(path, "question", [q.id for q in found.questions])
    return found


def assistant_contrast(
    template: ChatTemplate,
    roles: Roles,
    identity: Identity,
    makers: Mapping[str, str],
    *,
    n_roles: int,
    n_questions: int | None = None,
    answered: bool = False,
) -> list[ContrastRow]:
    """Each question asked of the default assistant (+) and of each role (−), to be read at the prompt's last token, or over an answer.

    Args:
        template: the model's chat template.
        roles: roles and questions.
        identity: the model's own.
        makers: makers of invented names, for the template.
        n_roles: use the first so many.
        n_questions: use the first so many of each half.
        answered: every prompt is followed by one and the same answer (`FIXED_ANSWER`), token by token, whoever is asked.

    Raises:
        InputError: fewer roles than asked for.
    """
    if n_roles > len(roles.roles):
        raise InputError(f"{n_roles} roles asked for, {len(roles.roles)} known")
    rows = []
    halves = [
        [q for q in roles.questions if q.split == split][:n_questions] for split in ("extract", "evaluate")
    ]
    for at, q in enumerate(q for half in halves for q in half):
        conditions = {"default": (1, SystemPrompt())}
        for role in roles.roles[:n_roles]:
            prompt = role.prompts[at % len(role.prompts)]
            conditions[role.name] = (-1, SystemPrompt("text", prompt))
        for name, (sign, condition) in conditions.items():
            turns = [user_turn(q.text)]
            if answered:
                turns.append(assistant_turn(FIXED_ANSWER))
            encode = template.encode if answered else template.encode_prompt
            encoded = encode(turns, condition, identity=identity, others=makers)
            rows.append(ContrastRow(f"{q.id}/{name}", q.id, q.split, sign, encoded))
    return rows
