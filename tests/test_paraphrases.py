"""Paired wordings: of one length or left out, and the null they give, against differences of means written out."""

import numpy as np
import pytest

from analysis.shift_nulls import null_columns, reworded
from mech.chat import ChatTemplate, Identity
from mech.questions import Question
from probes.contrast import ContrastArrays
from probes.nulls import direction_null, paraphrase
from probes.paraphrase import LEAST_PAIRS, answer_paraphrases, load_paraphrases, prompt_paraphrases
from tests.tiny_study import make_tokenizer

TINNY = Identity("Tinny", "Tin Works", "You are Tinny, made by Tin Works.")
ASKED = [
    Question(id=f"q{i}", split="extract", text=t) for i, t in enumerate(("Who are you?", "What of hats?"))
]


def test_the_built_in_pairs_say_the_same_in_two_wordings() -> None:
    pairs = load_paraphrases()
    assert len(pairs.prompts) >= 2 * LEAST_PAIRS
    assert len(pairs.answers) >= 2 * LEAST_PAIRS
    for one, other in [*pairs.prompts, *((a.one, a.other) for a in pairs.answers)]:
        assert one != other
        assert len(one.split()) == len(other.split())
        assert (
            len(set(one.lower().split()) ^ set(other.lower().split())) <= 4
        )  # a word or two, or their order
    for one, other in pairs.prompts:
        assert all(slot in text for slot in ("{name}", "{maker}") for text in (one, other))


def test_only_pairs_of_one_length_are_kept_and_the_others_counted() -> None:
    """The tiny tokenizer cuts most words into bytes, so that many of the pairs differ; but never those that only change places."""
    template, pairs = ChatTemplate(make_tokenizer()), load_paraphrases()
    for (rows, dropped), total, per in (
        (prompt_paraphrases(template, pairs, ASKED, TINNY), len(pairs.prompts), 4),
        (answer_paraphrases(template, pairs), len(pairs.answers), 2),
    ):
        kept = {r.question for r in rows}
        assert len(kept) + dropped == total
        assert 0 < dropped < total
        assert len(kept) >= LEAST_PAIRS
        assert len(rows) == per * len(kept)
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            assert (one.sign, other.sign) == (1, -1)
            assert one.question == other.question
            assert len(one.encoded.ids) == len(other.encoded.ids)
            assert one.encoded.n_response == other.encoded.n_response
            assert one.encoded.ids != other.encoded.ids
    assert any("Tinny" in r.encoded.text and "Tin Works" in r.encoded.text for r in prompt_paraphrases(template, pairs, ASKED, TINNY)[0])  # fmt: skip


@pytest.mark.real
def test_most_pairs_have_one_length_under_a_real_tokenizer(real_template: ChatTemplate) -> None:
    pairs = load_paraphrases()
    assert prompt_paraphrases(real_template, pairs, ASKED, TINNY)[1] <= 4
    assert answer_paraphrases(real_template, pairs)[1] <= 4


def gaps(rng: np.random.Generator, pairs: int = 10, per: int = 3) -> ContrastArrays:
    n = 2 * pairs * per
    asked = [f"p{i // (2 * per)}" for i in range(n)]
    return ContrastArrays(rng.standard_normal((n, 2, 12)) + 4, [1, -1] * (n // 2), asked, ["extract"] * n)


def test_draws_are_signed_means_of_the_pairs_gaps() -> None:
    rng = np.random.default_rng(0)
    rows, mean = gaps(rng), rng.standard_normal((2, 12))
    found = reworded(rows, rng=rng, n=300)
    along = found.along(mean)
    gap = (rows.activations[::2] - rows.activations[1::2]).reshape(10, 3, 2, 12).mean(1)
    signs = np.sign(found.weights[:, ::6])
    drawn = np.einsum("np,pld->nld", signs, gap)
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    np.testing.assert_allclose(along, (drawn * mean).sum(-1), atol=1e-5)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    one, other = (rows.activations[k::2].reshape(10, 3, 2, 12).mean(1) for k in (0, 1))
    direction = np.ones((2, 12))
    null = direction_null("paraphrase", lambda v: (v / np.linalg.norm(v, axis=1, keepdims=True) * mean).sum(1), direction,
                          paraphrase(direction, one, other), seed=1, n=3000)  # fmt: skip
    np.testing.assert_allclose(along.std(0), null.draws.std(0), rtol=0.15)


def test_a_shift_along_a_rewording_is_not_told_from_it_and_another_is() -> None:
    rng = np.random.default_rng(1)
    rows = gaps(rng, pairs=16)
    gap = (rows.activations[::2] - rows.activations[1::2]).reshape(16, 3, 2, 12).mean((0, 1))
    draws = reworded(rows, rng=rng, n=400)
    for mean, beyond in ((gap, False), (np.full((2, 12), 1.0), True)):
        unit = np.ones((2, 12)) / np.sqrt(12) if beyond else draws.along(mean)[0]
        observed = (unit * mean).sum(1) if beyond else unit
        p = null_columns("paraphrase", observed, draws.along(mean))["p_paraphrase"]
        assert (p < 0.05).all() == beyond
