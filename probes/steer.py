"""What steering is compared with: a random direction of the same norm, and the strength relative to the stream."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from activations.capture import capture
from mech.chat import Encoded
from mech.errors import InputError
from mech.interventions import Add, intervene
from mech.models import ChatModel
from mech.score import response_logprobs
from probes.contrast import ContrastRow
from probes.nulls import isotropic_directions


def control(vector: Float[np.ndarray, " d"], seed: int) -> Float[np.ndarray, " d"]:
    """A random direction with exactly the vector's norm."""
    (unit,) = isotropic_directions(1, len(vector), np.random.default_rng(seed))
    scaled: np.ndarray = (unit * np.linalg.norm(vector)).astype(np.float32)
    return scaled


def relative_dose(
    model: ChatModel, rows: Sequence[Encoded], vector: Float[np.ndarray, " d"], layer: int, coefficient: float
) -> float:
    """‖coefficient · v‖ / mean ‖h‖ at the layer's output, last prompt token, unsteered."""
    h = np.asarray(capture(model, rows, layers=[layer])["resid_post", "prompt_last"])
    return float(abs(coefficient) * np.linalg.norm(vector) / np.linalg.norm(h[:, 0], axis=1).mean())


def trait_log_odds(model: ChatModel, rows: Sequence[ContrastRow]) -> dict[str, float]:
    """By question: mean log-probability (nats a token) of its trait-high answers less that of its trait-low ones.

    Teacher-forced, so it is defined even where free text would be broken. It also rises when the distribution merely flattens, so
    compare it with a random direction's.

    Raises:
        InputError: a question without both answers.
    """
    scores = [float(s.mean()) for s in response_logprobs(model, [r.encoded for r in rows])]
    found = {}
    for question in dict.fromkeys(r.question for r in rows):
        sides = {
            sign: [s for s, r in zip(scores, rows, strict=True) if r.question == question and r.sign == sign]
            for sign in (1, -1)
        }
        if not all(sides.values()):
            raise InputError(f"question {question}: log-odds need a trait-high and a trait-low answer")
        found[question] = float(np.mean(sides[1]) - np.mean(sides[-1]))
    return found


def dose_response(
    model: ChatModel,
    rows: Sequence[ContrastRow],
    vector: Float[np.ndarray, " d"],
    layer: int,
    coefficients: Sequence[float],
) -> dict[float, dict[str, float]]:
    """`trait_log_odds` at each strength; 0 is the model as it is."""
    found = {}
    for coefficient in coefficients:
        if not coefficient:
            found[coefficient] = trait_log_odds(model, rows)
            continue
        with intervene(model, Add(vector, [layer], coefficient)):
            found[coefficient] = trait_log_odds(model, rows)
    return found
