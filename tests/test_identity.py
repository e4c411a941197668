"""Identity directions: contrasts that differ in one thing, planted truths told apart, agreement only where there is any."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from activations.capture import capture
from analysis.dispersion import spread, spread_change
from mech.chat import Identity
from mech.errors import InputError
from mech.identities import load_invented
from mech.models import ChatModel, load_model
from mech.questions import Question
from probes.authorship import TextPair, authorship_contrast
from probes.contrast import ContrastRow
from probes.direction import Direction, fit_direction
from probes.identity import name_contrast, presence_contrast
from probes.residual import project_out, regress_out, without
from probes.roles import FIXED_ANSWER, Role, Roles, assistant_contrast, load_roles
from probes.self_report import load_reports, self_report_contrast
from study.base import find_base
from study.plan import make_plan
from study.spec import load_spec
from study.steps.activations import questions_of
from tests.drawn_at_random import given_direction
from tests.tiny_study import save_model, some_directions, write_study

TINNY = Identity("Tinny", "Tin Works", "You are Tinny, made by Tin Works.")
MAKERS = load_invented().makers
NAMES = list(MAKERS)[:3]


def questions(n: int = 8) -> list[Question]:
    return [Question(id=f"q{i}", split="extract" if i % 2 else "evaluate", text=f"What of number {i * i}?") for i in range(n)]  # fmt: skip


def fitted(
    model: ChatModel, name: str, rows: list[ContrastRow], pooling: str
) -> tuple[Direction, np.ndarray]:
    h = np.asarray(capture(model, [r.encoded for r in rows], poolings=[pooling])["resid_post", pooling])
    made = [i for i, r in enumerate(rows) if r.split == "extract"]
    direction = fit_direction(
        name,
        h[made],
        [rows[i].question for i in made],
        [rows[i].sign for i in made],
        rng=np.random.default_rng(0),
    )
    return direction, h


# -- contrasts -------------------------------------------------------------------------------------------


def test_the_built_in_material_is_whole() -> None:
    roles, reports = load_roles(), load_reports()
    assert len(roles.roles) >= 40
    assert {q.split for q in roles.questions} == {"extract", "evaluate"}
    assert len(reports) == 16
    for report in reports:
        texts = [report.first.question, report.first.answer, report.third.question, report.third.answer]
        filled = [t.format(name="N", maker="M") for t in texts]
        assert not any("{" in t for t in filled)
        assert any(slot in "".join(texts[2:]) for slot in ("{name}", "{maker}"))
        assert abs(len(filled[1].split()) - len(filled[3].split())) <= 3


def test_the_assistant_is_contrasted_with_every_role(model: ChatModel) -> None:
    roles = load_roles()
    rows = assistant_contrast(model.template, roles, TINNY, MAKERS, n_roles=5, n_questions=2)
    assert len(rows) == 4 * (1 + 5)
    assert sum(r.sign > 0 for r in rows) == 4
    prompts = {p for role in roles.roles[:5] for p in role.prompts}
    for row in rows:
        assert ("You are Tinny" in row.encoded.text) == (row.sign > 0)
        assert any(p in row.encoded.text for p in prompts) == (row.sign < 0)
    with pytest.raises(InputError, match="65 roles asked for, 64 known"):
        assistant_contrast(model.template, roles, TINNY, MAKERS, n_roles=65)


def test_every_role_gives_the_same_answer(model: ChatModel) -> None:
    asked = assistant_contrast(model.template, load_roles(), TINNY, MAKERS, n_roles=3, n_questions=1)
    rows = assistant_contrast(
        model.template, load_roles(), TINNY, MAKERS, n_roles=3, n_questions=1, answered=True
    )
    (answer,) = {r.encoded.ids[slice(*r.encoded.spans["response"])] for r in rows}
    assert model.template.tokenizer.decode(answer) == FIXED_ANSWER
    for row, prompt in zip(rows, asked, strict=True):  # so that one capture serves both places
        assert row.encoded.ids[: row.encoded.n_prompt] == prompt.encoded.ids
        assert (row.id, row.sign) == (prompt.id, prompt.sign)


def test_members_are_named_by_place(tmp_path: Path) -> None:
    asked = some_directions(
        self_report_at=["answer", "prompt_last"], traits=[],
        assistant_axis_at=["prompt_last", "fixed_answer"], identity=["self_report", "assistant_axis"],
    )  # fmt: skip
    save_model(tmp_path / "model")
    alone = {"steering": None, "arms": {"base": []}, "stages": {}, "benign": None, "measure": {}}
    spec = load_spec(write_study(tmp_path, directions=asked, **alone))
    steps = make_plan(spec, find_base(spec.model))
    read = {
        s.config["direction"]: (s.config["pooling"], s.inputs["contrast"][0].name)
        for s in steps
        if s.kind == "direction"
    }
    assert read == {
        "identity:self_report:third": ("response_mean", "contrast/identity:self_report:third"),
        "identity:self_report:other": ("response_mean", "contrast/identity:self_report:other"),
        "identity:self_report:third@prompt_last": ("prompt_last", "contrast/identity:self_report:third"),
        "identity:self_report:other@prompt_last": ("prompt_last", "contrast/identity:self_report:other"),
        "identity:assistant_axis": ("prompt_last", "contrast/identity:assistant_axis"),
        "identity:assistant_axis@fixed_answer": ("response_mean", "contrast/identity:assistant_axis"),
    }


def test_self_reports_differ_in_person_or_name_alone(model: ChatModel) -> None:
    reports = load_reports()
    third = self_report_contrast(model.template, reports, TINNY, MAKERS, NAMES, "third")
    assert all("Tinny" in r.encoded.text or "Tin Works" in r.encoded.text for r in third)
    other = self_report_contrast(model.template, reports, TINNY, MAKERS, NAMES, "other")
    own = {r.question: r.encoded.text for r in other if r.sign > 0}
    for row in (r for r in other if r.sign < 0):
        name = row.id.split("/")[-1]
        assert row.encoded.text.replace(name, "Tinny").replace(MAKERS[name], "Tin Works") == own[row.question]
    assert len(other) == 16 * 4
    with pytest.raises(InputError, match="contrasted with third, other"):
        self_report_contrast(model.template, reports, TINNY, MAKERS, NAMES, "fourth")


def test_authorship_differs_in_the_text_alone(model: ChatModel) -> None:
    pairs = [TextPair(f"a{i}", "extract", f"own words {i}", f"their words {i}") for i in range(3)]
    content = authorship_contrast(model.template, pairs, "content")
    assert [r.sign for r in content] == [1, -1] * 3
    for mine, theirs in zip(content[::2], content[1::2], strict=True):
        assert mine.encoded.text.replace("own", "their") == theirs.encoded.text
        assert mine.encoded.n_response > 0
    asked = authorship_contrast(model.template, pairs, "judgement", judge=lambda t: f"Yours? {t}")
    assert all(r.encoded.n_response == 0 and "Yours?" in r.encoded.text for r in asked)
    with pytest.raises(InputError, match="judgement needs its question"):
        authorship_contrast(model.template, pairs, "judgement")


# -- planted truths --------------------------------------------------------------------------------------


def test_two_planted_directions_are_told_apart(tmp_path: Path) -> None:
    """The own name's token carries one direction, a role's word another, not parallel: each member finds its own."""
    model = load_model(str(save_model(tmp_path / "m")))
    rng = np.random.default_rng(3)
    name, role = rng.standard_normal((2, model.d_model))
    role += 0.3 * name  # not orthogonal either
    name, role = name / np.linalg.norm(name), role / np.linalg.norm(role)
    weight = model.causal.get_input_embeddings().weight
    with torch.no_grad():
        for text, planted in (("@", name), ("~", role)):
            (token,) = model.template.ids(text)
            weight[token] += torch.tensor(600 * planted, dtype=torch.float32)
    own = Identity("@@@", "Tin Works", "You are @@@, made by Tin Works.")
    makers = {"###": "Ore Works", "%%%": "Zinc Works"}
    asked, template, others = questions(12), model.template, list(makers)
    played = tuple(Role(name=w, prompts=(f"Play the ~~~ {w} now.",)) for w in ("cat", "dog"))
    texts = [TextPair(f"a{i}", "extract", f"@@@ {i * i}", f"### {i * i}") for i in range(4)]
    generic = "You are some one, made of some thing."
    contrasts = {
        "name": (name_contrast(template, asked, own, makers, others), "span:prompt"),
        "presence": (presence_contrast(template, asked, own, "generic", generic), "span:prompt"),
        "self_report": (
            self_report_contrast(template, load_reports(), own, makers, others, "other"),
            "response_mean",
        ),
        "authorship": (authorship_contrast(template, texts, "content"), "response_mean"),
        "assistant_axis": (
            assistant_contrast(template, Roles(roles=played, questions=tuple(asked)), own, makers, n_roles=2),
            "span:prompt",
        ),
    }
    for member, (rows, pooling) in contrasts.items():
        found = fitted(model, member, rows, pooling)[0].unit[0]
        is_role = member == "assistant_axis"
        assert found @ (-role if is_role else name) > 0.95, member
        assert abs(found @ (name if is_role else role)) < 0.5, member


# -- residuals -------------------------------------------------------------------------------------------


def test_what_is_projected_out_is_gone_and_the_rest_stays() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (given_direction(rng.standard_normal((3, 20)), n) for n in "abc")
    left = project_out(a, [b, c])
    for other in (b, c):
        np.testing.assert_allclose((left.vectors * other.vectors).sum(1), 0, atol=1e-4)
    for layer in range(3):  # least squares takes out the same
        basis = np.stack([b.vectors[layer], c.vectors[layer]], 1)
        expected = a.vectors[layer] - basis @ np.linalg.lstsq(basis, a.vectors[layer], rcond=None)[0]
        np.testing.assert_allclose(left.vectors[layer], expected, atol=1e-5)
    assert left.made_from["projected_out"] == ["b", "c"]
    assert np.isnan(left.split_half).all()
    with pytest.raises(InputError, match="nothing is left"):
        project_out(a, [given_direction(a.vectors * -3, "e")])


def test_a_covariate_is_regressed_out_within_questions() -> None:
    rng = np.random.default_rng(1)
    asked = np.repeat([f"q{i}" for i in range(50)], 4).tolist()
    length, truth = rng.integers(5, 50, 200).astype(float), rng.standard_normal((200, 2, 6))
    slope = rng.standard_normal((2, 6))
    bent = truth + length[:, None, None] * slope
    cleaned = regress_out(bent, {"length": length}, asked)
    deviation = length - np.array([length[np.array(asked) == q].mean() for q in asked])
    assert np.abs(np.einsum("n,nld->ld", deviation, cleaned)).max() < 1e-6
    centred = [(x - x.mean(0)).ravel() for x in (cleaned, truth)]
    assert np.corrcoef(*centred)[0, 1] > 0.97
    with pytest.raises(InputError, match="do not vary within any question"):
        regress_out(bent, {"length": np.repeat(length[:50], 4)}, asked)


def test_slopes_of_one_half_are_taken_out_of_both() -> None:
    """A contrast made of length alone is gone from rows that had no part in the fit; one beside length stays."""
    rng = np.random.default_rng(4)
    asked, signs = np.repeat([f"q{i}" for i in range(60)], 2).tolist(), np.tile([1, -1], 60)
    length = 20 + 2 * signs + rng.normal(0, 4, 120)
    h = (
        length[:, None] * np.eye(8)[0] * 3
        + signs[:, None] * np.eye(8)[1]
        + 0.3 * rng.standard_normal((120, 8))
    )[:, None]
    fit_on = np.arange(120) < 60
    cleaned = regress_out(h, {"length": length}, asked, fit_on=fit_on)
    changed = h.copy()
    changed[~fit_on] += 5
    again = regress_out(changed, {"length": length}, asked, fit_on=fit_on)
    np.testing.assert_array_equal(again[fit_on], cleaned[fit_on])
    np.testing.assert_allclose(again[~fit_on], cleaned[~fit_on] + 5)
    raw, clean = (
        fit_direction("d", x[~fit_on], asked[60:], signs[60:].tolist(), rng=rng).unit[0] for x in (h, cleaned)
    )
    assert abs(raw[0]) > 0.9
    assert abs(clean[0]) < 0.3
    assert clean[1] > 0.9


def test_projecting_rows_is_projecting_their_direction() -> None:
    rng = np.random.default_rng(6)
    h, asked, signs = rng.standard_normal((12, 3, 20)), np.repeat(list("abcdef"), 2).tolist(), [1, -1] * 6
    others = [given_direction(rng.standard_normal((3, 20)), n) for n in "xy"]
    whole = fit_direction("d", h, asked, signs, rng=rng)
    left = fit_direction("d", without(h, others), asked, signs, rng=rng)
    np.testing.assert_allclose(left.vectors, project_out(whole, others).vectors, atol=1e-5)
    one = without(h[:, [1]], [o.at_layers([1]) for o in others])
    np.testing.assert_allclose(one[:, 0], without(h, others)[:, 1])
    with pytest.raises(InputError, match="not of the model"):
        without(h[:, :2], others)


# -- dispersion ------------------------------------------------------------------------------------------


def test_spread_has_its_closed_forms_and_does_not_turn() -> None:
    rng = np.random.default_rng(0)
    h = rng.standard_normal((40, 12)) @ np.diag(np.linspace(1, 3, 12)) + 5
    found = spread(h)
    eigenvalues = np.linalg.eigvalsh(np.cov(h.T))
    assert found.trace == pytest.approx(np.trace(np.cov(h.T)))
    assert found.participation == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())
    p = eigenvalues / eigenvalues.sum()
    assert found.entropy_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    turned = spread(h @ ortho_group.rvs(12, random_state=1))
    assert turned.trace == pytest.approx(found.trace)
    assert turned.entropy_rank == pytest.approx(found.entropy_rank)
    line = spread(np.outer(np.arange(9.0), np.ones(4)))
    assert line.participation == pytest.approx(1)
    with pytest.raises(InputError, match="all rows are equal"):
        spread(np.ones((5, 3)))


def test_a_planted_change_of_spread_is_covered_and_none_is_none() -> None:
    rng, hits = np.random.default_rng(2), 0
    asked = np.arange(30)
    for _ in range(60):
        base = rng.standard_normal((30, 10))
        wider = np.sqrt(1.5) * rng.standard_normal((30, 10))
        change = spread_change(base, wider, asked)["log_trace"]
        hits += change.low <= np.log(1.5) <= change.high
    assert hits >= 52
    same = spread_change(base, base + 3, asked, benign=base)
    for interval in same.values():
        assert interval.estimate == pytest.approx(0, abs=1e-9)


def test_intervals_of_spread_cover_where_rows_of_a_question_are_alike() -> None:
    """24 questions of four rows, two of which are the question's own: rows as units are sure too often, questions are not."""
    rng, by_question, by_row = np.random.default_rng(4), 0, 0
    asked = np.repeat(np.arange(24), 4)
    for _ in range(80):
        base, tuned = (
            (rng.standard_normal((24, 6)) * size)[asked] + 0.2 * rng.standard_normal((96, 6))
            for size in (1.0, np.sqrt(1.5))
        )
        truth = np.log((1.5 + 0.04) / (1 + 0.04))
        for questions in (asked, np.arange(96)):
            change = spread_change(base, tuned, questions)["log_trace"]
            held = change.low <= truth <= change.high
            by_question, by_row = (
                by_question + (held and questions is asked),
                by_row + (held and questions is not asked),
            )
    assert by_question >= 70, by_question
    assert by_row <= 64, by_row


def test_questions_of_two_sets_with_one_id_are_two() -> None:
    rows = SimpleNamespace(questions=["q1", "q2", "q1", "q1"])
    store: Any = SimpleNamespace(
        rows=rows, metadata={"sets": ["trait:evil", "trait:evil", "trait:kind", "trait:kind"]}
    )
    assert questions_of(store) == ["trait:evil/q1", "trait:evil/q2", "trait:kind/q1", "trait:kind/q1"]
