"""A judge on this machine: a checkpoint, read off the logits of its next token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.judge import LEAST_MASS, Case, Rubric, Status, Verdict, judge_prompt
from mech.errors import InputError
from mech.models import ChatModel
from mech.progress import track
from mech.score import next_token_logits
from mech.turns import user_turn

_DIGIT_FORM = "Reply with one digit and nothing else: 0 stands for a score of 0, 9 for a score of 100, the digits between in proportion."


@dataclass(frozen=True)
class LocalJudge:
    """A checkpoint that gives a digit.

    Its scale is one digit: tokenizers differ in how they cut longer numbers, and single digits are one token in nearly all.
    The score is Σ d p(d) / Σ p(d) · 100 / 9 over the digits d = 0 … 9, so 0 is a score of 0 and 9 of 100; `mass` is Σ p(d), the
    share of the next token's probability that is on digits at all. Under a quarter there is no score.
    """

    model: ChatModel
    batch: int = 32
    """Cases that are written down together."""

    @property
    def about(self) -> Mapping[str, Any]:
        """The checkpoint and the scale."""
        return {"judge": self.model.checkpoint.key, "how": "digits", "dtype": str(self.model.dtype)}

    def ask(self, rubric: Rubric, cases: Sequence[Case]) -> Iterator[Verdict]:
        """Batch by batch.

        Raises:
            InputError: the tokenizer writes a digit with several tokens.
        """
        template = self.model.template
        digits = [template.ids(str(d)) for d in range(10)]
        if any(len(ids) != 1 for ids in digits):
            raise InputError(
                f"{self.model.checkpoint}: its tokenizer writes a digit with several tokens: take another judge"
            )
        for start in track(range(0, len(cases), self.batch), f"judging {rubric.name}"):
            block = cases[start : start + self.batch]
            asked = [[user_turn(judge_prompt(rubric, case, _DIGIT_FORM))] for case in block]
            logits = next_token_logits(self.model, [template.encode_prompt(turns) for turns in asked])
            shares = logits.double().softmax(-1)[:, [ids[0] for ids in digits]].tolist()
            for case, share in zip(block, shares, strict=True):
                mass = math.fsum(share)
                score = (
                    math.fsum(d * p for d, p in enumerate(share)) / mass * 100 / 9
                    if mass >= LEAST_MASS
                    else None
                )
                status: Status = "scored" if score is not None else "unreadable"
                yield Verdict(case.id, rubric.name, score, status, "digits", mass, {"digits": share})
