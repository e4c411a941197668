"""Turns of a conversation, in the form that chat templates take."""

from collections.abc import Mapping

Message = Mapping[str, str]


def user_turn(text: str) -> dict[str, str]:
    """What the user says."""
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> dict[str, str]:
    """What the assistant says."""
    return {"role": "assistant", "content": text}
