"""Authorship: places and answers cancel, surprisal is matched away, right and wrong answers stand apart."""

import json
from pathlib import Path

import numpy as np
import pytest

from activations.capture import capture
from mech.errors import InputError
from mech.models import ChatModel
from probes.authorship import TextPair, authorship_contrast, by_answer
from probes.direction import fit_direction, paired_differences
from probes.matching import match_pairs
from tests.tiny_study import save_model


def choose(_pair: TextPair, first: str, second: str) -> tuple[str, tuple[str, str]]:
    return f"Which is yours?\n\nOne: {first}\n\nTwo: {second}", ("1", "2")


def pairs(n: int = 4, *, same: bool = False) -> list[TextPair]:
    return [TextPair(f"a{i}", "extract", f"the dog {i} went", f"the {'dog' if same else 'cat'} {i} went") for i in range(n)]  # fmt: skip


def test_each_side_of_a_pair_holds_each_place_and_answer_once(model: ChatModel) -> None:
    rows = authorship_contrast(model.template, pairs(), "pair_content", choose=choose)
    for row, (article, sign) in zip(rows, ((p, s) for p in pairs() for s in (1, -1, -1, 1)), strict=True):
        start, stop = row.encoded.spans["response"]
        read = model.template.tokenizer.decode(row.encoded.ids[start:stop])
        assert read.strip() == (article.own if sign > 0 else article.other)
        assert (row.sign, row.question) == (sign, article.article)
    places = {(r.sign, r.id[-1]) for r in rows}
    assert places == {(s, p) for s in (1, -1) for p in "01"}
    given = authorship_contrast(model.template, pairs(), "pair_answer", choose=choose)
    assert {(r.sign, r.encoded.ids[r.encoded.n_prompt]) for r in given} == {
        (s, model.template.ids(w)[0]) for s in (1, -1) for w in "12"
    }
    first, second, *_ = given
    assert "One: the dog" in first.encoded.text
    assert (first.sign, second.sign) == (1, -1)
    with pytest.raises(InputError, match="needs its question"):
        authorship_contrast(model.template, pairs(), "pair_answer")
    with pytest.raises(InputError, match="does not show its texts"):
        authorship_contrast(model.template, pairs(), "pair_content", choose=lambda *_: ("?", ("1", "2")))


@pytest.mark.parametrize("read_at", ["pair_content", "pair_answer"])
def test_place_and_answer_cancel_exactly(model: ChatModel, read_at: str) -> None:
    """Of a text against itself nothing is left, though the places differ; and a planted effect of the place changes nothing."""

    def differences(same: bool, bump: float = 0.0) -> np.ndarray:
        rows = authorship_contrast(model.template, pairs(same=same), read_at, choose=choose)
        h = capture(model, [r.encoded for r in rows], poolings=["response_mean"])[
            "resid_post", "response_mean"
        ]
        second = np.array([r.id.endswith("1") for r in rows])
        planted = np.asarray(h) + bump * second[:, None, None]
        assert np.abs(planted[second] - planted[~second]).max() > 0.01
        return paired_differences(planted, [r.question for r in rows], [r.sign for r in rows])[0]

    np.testing.assert_allclose(differences(True), 0, atol=1e-5)
    np.testing.assert_allclose(differences(False, 50.0), differences(False), atol=1e-4)
    assert np.abs(differences(False)).max() > 1e-3


def test_the_fewest_pairs_are_dropped_until_means_agree() -> None:
    own, other = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 2.5, 3.5, 9.0]  # gaps −1 −1 .5 .5 −4
    found = match_pairs(own, other, tolerance=0.3)
    assert found.kept == (0, 1, 2, 3)
    assert (found.n, found.before, found.after) == (5, -1.0, -0.25)
    assert match_pairs(other, own, tolerance=0.3).kept == found.kept
    assert match_pairs(own, other, tolerance=2.0).kept == (0, 1, 2, 3, 4)
    with pytest.raises(InputError, match=r"differ by -1\.000 in the mean \(-1\.000 to -1\.000\)"):
        match_pairs([1.0] * 6, [2.0] * 6, tolerance=0.1)


def test_a_direction_of_surprisal_alone_is_lost_by_matching() -> None:
    """Own texts are likelier on the whole, and the stream holds nothing but surprisal and noise."""
    rng = np.random.default_rng(0)
    n, axis = 120, np.eye(20)[0]
    own, other = rng.normal(3.0, 0.6, n), rng.normal(3.6, 0.6, n)

    def fit(kept: list[int]) -> tuple[float, float]:
        nats = np.stack([own[kept], other[kept]], 1).ravel()
        h = nats[:, None] * axis * 5 + rng.standard_normal((2 * len(kept), 20))
        asked = np.repeat([f"a{i}" for i in kept], 2).tolist()
        found = fit_direction("d", h[:, None], asked, [1, -1] * len(kept), rng=rng)
        return float(found.unit[0] @ axis), float(found.norms[0])

    raw = fit(list(range(n)))
    matched = match_pairs(own.tolist(), other.tolist(), tolerance=0.01)
    assert len(matched.kept) > n / 3
    assert abs(own[list(matched.kept)].mean() - other[list(matched.kept)].mean()) <= 0.01
    left = fit(list(matched.kept))
    assert raw[0] < -0.9
    assert abs(left[0] * left[1]) < 0.15 * abs(raw[0] * raw[1])


def test_right_and_wrong_answers_give_directions_of_their_own() -> None:
    rng = np.random.default_rng(1)
    asked = np.repeat([f"a{i}" for i in range(40)], 2)
    signs = np.tile([1, -1], 40)
    halves = np.where(np.arange(80) < 40, "extract", "evaluate")
    answered = np.where(np.arange(80) // 2 % 2, 1, -1)
    axis = np.where(answered[:, None] > 0, np.eye(12)[0], np.eye(12)[1])
    h = (3 * signs[:, None] * axis + rng.standard_normal((80, 12)))[:, None]

    def split(marks: np.ndarray) -> dict[tuple[str, str], object]:
        found = by_answer("d", h, signs.tolist(), asked.tolist(), halves.tolist(), marks.tolist(), rng=rng)
        return {(s.fitted_on, s.tested_on): s for s in found}

    found = split(answered)
    assert found["correct", "correct"].direction.unit[0, 0] > 0.9
    assert found["incorrect", "incorrect"].direction.unit[0, 1] > 0.9
    assert found["correct", "correct"].auroc.auroc[0] > 0.95
    assert found["correct", "incorrect"].auroc.low[0] < 0.6
    assert [(s.n_fitted, s.n_tested, s.note) for s in found.values()] == [(10, 10, "")] * 4
    few = split(np.where(np.arange(80) // 2 < 3, -1, 1))
    assert few["incorrect", "correct"].direction is None
    assert few["incorrect", "correct"].note == "3 articles answered incorrectly to fit: 4 needed"
    assert few["correct", "incorrect"].auroc is None
    assert few["correct", "incorrect"].note == "0 articles answered incorrectly to test on: 4 needed"


def test_a_piece_of_a_row_is_read_as_its_response(model: ChatModel) -> None:
    row = model.template.encode_prompt([{"role": "user", "content": "the old house by the river"}])
    at = row.text.index("house")
    piece = model.template.piece(row, at, at + 5)
    assert piece.ids == row.ids[: len(piece.ids)]
    assert model.template.tokenizer.decode(piece.ids[piece.n_prompt :]).strip() == "house"
    with pytest.raises(InputError, match="no token lies there"):
        model.template.piece(row, len(row.text), len(row.text) + 3)


def test_the_step_matches_and_splits(tmp_path: Path) -> None:
    from study.base import find_base
    from study.plan import make_plan
    from study.spec import load_spec
    from tests.tiny_study import STUDY, _article, run_needed, some_directions, write_study

    how = {"read_at": ["content", "pair_answer"], "articles": 8, "surprisal_within": 1.0, "by_answer": True}
    directions = some_directions(traits=[], identity=["authorship", "name"], authorship=how, probes=[])
    directions |= {
        "folds": 3,
        "adjust": {
            "authorship:content": {
                "regress_out": ["length", "surprisal"],
                "project_out": ["authorship:pair_answer"],
            },
            "name": {"regress_out": ["surprisal", "norm"]},
        },
    }
    changes = {"directions": directions, "arms": {"base": []}, "stages": {}, "benign": None, "steering": None}
    changes |= {"behaviour": {"self_recognition": "sgtr"}, "embedding": {"methods": []}}
    data = {"sgtr": {**STUDY["data"]["sgtr"], "held_out": 10}}
    study = write_study(tmp_path, **changes, data=data, measure={**STUDY["measure"], "own_text": []})
    articles = [{**_article(i), "id": f"a{i:02}"} for i in range(24)]
    (tmp_path / "articles.jsonl").write_text("".join(json.dumps(a) + "\n" for a in articles))
    save_model(tmp_path / "model")
    bench, steps = run_needed(load_spec(study), tmp_path / "out", "tables")
    tables = bench.folder(steps["tables"])
    import pandas as pd

    matched = pd.read_csv(tables / "authorship_matching.csv")
    assert (matched["gap_after"].abs() <= 1.0).all()
    assert (matched["kept"] <= matched["pairs"]).all()
    split = pd.read_csv(tables / "authorship_answers.csv")
    assert set(split["direction"]) == {"identity:authorship:content", "identity:authorship:pair_answer"}
    kept = matched[matched["half"] == "extract"].set_index("direction")["kept"]
    fitted = split.drop_duplicates(["direction", "fitted_on"]).groupby("direction")["n_fitted"].sum()
    assert (fitted == kept[fitted.index]).all()
    family = pd.read_csv(tables / "identity_transfer.csv")
    own = family[family["direction"] == family["contrast"]].set_index("direction")["n_questions"]
    assert (
        own["identity:authorship:content"]
        == matched[matched["direction"] == "identity:authorship:content"]["kept"].sum()
    )
    assert (
        own["identity:authorship:content:adjusted"] == own["identity:authorship:content"]
    )  # all, cross-fitted
    quality = pd.read_csv(tables / "directions.csv").groupby("direction")["folds"].first()
    assert quality["identity:name:adjusted"] == 3  # the surprisal of what is read there, the prompt
    assert (quality.loc[["identity:authorship:content", "identity:authorship:content:adjusted"]] == 3).all()
    blind = load_spec(study, ["directions.adjust={'assistant_axis': {'regress_out': ['length']}}"])
    with pytest.raises(InputError, match=r"adjust\.assistant_axis: 'assistant_axis' is not among"):
        make_plan(blind, find_base(blind.model))
