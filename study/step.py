"""A step of a study: what it does, from what, and the key that says when it must run again.

The key is a digest of the step's kind and version, its resolved config and its inputs' keys. A finished step
lies in a folder named by its key, so a changed study finds every step that the change does not touch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mech.files import digest_of
from study.kinds import KINDS


@dataclass(frozen=True)
class Asked:
    """What a judge behind an API is asked by a step of this machine."""

    calls: int
    read: int
    """Tokens it is given."""
    written: int
    """Tokens it answers with, at most."""
    cost: float | None
    """What it costs, in the currency of the API's `price`; None where no price is given."""


@dataclass(frozen=True)
class Work:
    """How much a step has to do, in tokens; what an estimate of its time is made from."""

    read: int = 0
    """Tokens through the model without gradient."""
    trained: int = 0
    """Tokens through the model with gradient."""
    generated: int = 0
    """Tokens generated."""
    adapter_parameters: int = 0
    """Parameters of an adapter that it trains."""
    fixed_seconds: float = 0.1
    """What does not depend on the model."""
    stored_bytes: int = 10_000
    """What it leaves on disk."""
    asked: Asked | None = None
    """The part of the work that a judge behind an API does."""


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the plan."""

    kind: str
    """Which function runs it (`study.kinds.KINDS`)."""
    name: str
    """What a person calls it; unique within the plan."""
    config: Mapping[str, Any]
    """Everything but the inputs that determines its output; JSON-able."""
    inputs: Mapping[str, tuple["Step", ...]] = field(default_factory=dict)
    """Steps whose output it reads, by role."""
    work: Work = Work()
    """How much it has to do, for the estimate of its time."""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """What its tables call it: arm and seed, stage and seed, a dataset, a sweep. They do not change what it writes otherwise, so they are not in the
    key; the name holds them."""

    @cached_property
    def key(self) -> str:
        """Digest of all that determines the output."""
        inputs = {role: [s.key for s in steps] for role, steps in self.inputs.items()}
        return digest_of([self.kind, KINDS[self.kind].version, self.config, inputs])
