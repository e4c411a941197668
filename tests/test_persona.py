"""Persona vectors: what the paired filter keeps, which layer is chosen, how elicitations compare, and all that in a study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.elicitation import elicitation_table
from mech.errors import InputError
from mech.files import read_json
from probes.direction import Direction, fit_direction
from probes.layers import choose_layer
from probes.persona import POSITIONS, Trait, load_trait, rollouts
from probes.rollout_filter import Thresholds, paired_filter
from study.bench import Bench
from study.engines.local import StepFailedError
from study.spec import load_spec
from study.step import Step
from study.steps.elicitation import elicitations, rollouts_table
from tests.openai_server import Fault, Server
from tests.tiny_study import run_needed, save_model, some_directions, write_study
from tests.tiny_study import trait as tiny_trait

BUILT_IN = ("apathetic", "evil", "hallucination", "humorous", "impolite", "optimistic", "sycophancy")


# -- traits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_trait_is_whole(name: str) -> None:
    trait = load_trait(name)
    assert trait.trait == name
    assert len(trait.instructions) == 5
    assert len({p.positive for p in trait.instructions} | {p.negative for p in trait.instructions}) == 10
    halves = [q.split for q in trait.questions]
    assert (halves.count("extract"), halves.count("evaluate")) == (20, 20)
    assert len({q.question for q in trait.questions}) == 40
    assert "0" in trait.rubric
    assert "100" in trait.rubric
    gaps = [len(q.high.split()) - len(q.low.split()) for q in trait.questions]
    assert max(map(abs, gaps)) <= 4
    assert abs(np.mean(gaps)) < 1  # and on the whole neither side is longer
    assert all(q.high != q.low for q in trait.questions)


def test_those_are_all_the_built_in_traits() -> None:
    with pytest.raises(InputError, match=", ".join(BUILT_IN)):
        load_trait("nothing")


# -- rollouts and their filter ------------------------------------------------------------------------------


def small_trait() -> Trait:
    return Trait.model_validate(tiny_trait())


def test_rollouts_come_in_pairs_and_samples() -> None:
    asked = rollouts(load_trait("evil"), pairs_per_question=5, samples=3)
    assert len(asked) == 20 * 5 * 3 * 2
    assert len({r.id for r in asked}) == len(asked)
    pairs: dict[Any, set[int]] = {}
    for r in asked:
        pairs.setdefault((r.question, r.pair, r.sample), set()).add(r.sign)
    assert len(pairs) == 300
    assert all(sides == {1, -1} for sides in pairs.values())
    with pytest.raises(InputError, match="0 samples"):
        rollouts(small_trait(), pairs_per_question=1, samples=0)


def test_a_pair_is_kept_whole_or_dropped_with_its_reason() -> None:
    asked = rollouts(small_trait(), pairs_per_question=1, samples=2)  # 8 pairs
    scores = [  # trait +, trait -, coherence +, coherence -
        (50, 49.9, 50, 50), (49.9, 0, 90, 90), (90, 50, 90, 90), (90, 10, 49, 90),
        (90, 10, 90, 49), (None, 10, 90, 90), (90, 10, 90, None), (90, 10, 90, 90),
    ]  # fmt: skip
    trait, coherence, answers = {}, {}, ["words"] * 16
    for k, row in enumerate(scores):
        for side, (t, c) in enumerate(((row[0], row[2]), (row[1], row[3]))):
            name = asked[2 * k + side].id
            trait[name], coherence[name] = (None if x is None else float(x) for x in (t, c))
    answers[15] = "  "
    found = paired_filter(asked, answers, trait, coherence, Thresholds())
    assert found.kept == tuple(asked[:2])
    assert found.pairs == 8
    assert found.questions == 1
    assert found.dropped == {
        "positive side below the trait threshold": 1,
        "negative side at or above the trait threshold": 1,
        "incoherent": 2,
        "no score": 2,
        "empty answer": 1,
    }
    assert len(found.kept) // 2 + sum(found.dropped.values()) == found.pairs
    loose = paired_filter(asked, answers, trait, coherence, Thresholds(trait=40.0, coherence=0.0))
    assert (
        len(loose.kept) == 6
    )  # the second pair and both incoherent ones; the first has its low side over 40
    with pytest.raises(InputError, match="other side of its pair"):
        paired_filter(asked[:3], answers[:3], trait, coherence, Thresholds())


# -- layers and elicitations --------------------------------------------------------------------------------


def planted(q: int = 40, d: int = 16, layers: int = 5, best: int = 3, seed: int = 0) -> Any:
    """Noise at every layer, and the contrast along the first axis, strongest at one layer."""
    rng = np.random.default_rng(seed)
    signs = np.tile([1, -1], q)
    h = rng.standard_normal((2 * q, layers, d))
    gaps = 0.5 + 2.5 * (np.arange(layers) == best)
    h[:, :, 0] += signs[:, None] * gaps / 2
    questions = [f"q{i}" for i in np.repeat(np.arange(q), 2)]
    splits = np.where(np.repeat(np.arange(q), 2) < q // 2, "extract", "evaluate").tolist()
    return h, signs.tolist(), questions, splits


def test_the_planted_layer_is_chosen_and_reported_on_the_other_half() -> None:
    h, signs, questions, splits = planted()
    found = choose_layer(h, signs, questions, splits, rng=np.random.default_rng(0))
    assert found.layer == 3
    assert found.extraction.argmax() == 3
    assert found.evaluation is not None
    assert found.evaluation.n_questions == 20
    assert found.evaluation.auroc[3] > 0.9
    changed = h.copy()
    changed[np.array(splits) == "evaluate"] *= -7  # the choice does not see the evaluation half
    again = choose_layer(changed, signs, questions, splits, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again.extraction, found.extraction)
    assert again.evaluation.auroc[3] < 0.1
    alone = choose_layer(h[:40], signs[:40], questions[:40], splits[:40], rng=np.random.default_rng(0))
    assert alone.evaluation is None
    with pytest.raises(InputError, match="two questions"):
        choose_layer(h[:2], signs[:2], questions[:2], splits[:2], rng=np.random.default_rng(0))


def test_choosing_among_layers_of_noise_is_not_rewarded() -> None:
    """The maximum over layers is optimistic on the half that chose, and fair on the other."""
    chosen, other, every = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        h, signs, questions, splits = planted(q=24, layers=12, seed=seed)
        h = rng.standard_normal(h.shape)
        found = choose_layer(h, signs, questions, splits, rng=rng)
        chosen.append(found.extraction[found.layer])
        every.append(found.extraction.mean())
        other.append(found.evaluation.auroc[found.layer])
    assert np.mean(chosen) > 0.6
    assert (
        abs(np.mean(every) - 0.5) < 0.08
    )  # cross-validated: a row is not scored by a direction made from it
    assert abs(np.mean(other) - 0.5) < 0.08


def test_on_a_tie_the_wider_gap_wins() -> None:
    h, signs, questions, splits = planted(best=0)
    h[:, 1, 0] += np.array(signs) * 50
    h[:, 2, 0] += np.array(signs) * 500
    found = choose_layer(h, signs, questions, splits, rng=np.random.default_rng(0))
    assert found.extraction[1] == found.extraction[2] == 1
    assert found.layer == 2


def test_elicitations_in_one_table() -> None:
    h, signs, questions, splits = planted(layers=2, best=1)
    half = np.array(splits) == "extract"

    def fit(rows: np.ndarray) -> Direction:
        asked = [q for q, keep in zip(questions, half, strict=True) if keep]
        side = [s for s, keep in zip(signs, half, strict=True) if keep]
        return fit_direction("x", rows[half], asked, side, rng=np.random.default_rng(0))

    good, noise = fit(h), fit(np.random.default_rng(9).standard_normal(h.shape))
    test = ~half
    table = elicitation_table(
        {"text": good, "prompts": noise},
        h[test],
        [s for s, keep in zip(signs, test, strict=True) if keep],
        [q for q, keep in zip(questions, test, strict=True) if keep],
        reference="text",
    ).set_index(["vector", "layer"])
    assert table.loc[("text", 1), "cosine"] == pytest.approx(1)
    cosine = float(good.unit[1] @ noise.unit[1])
    assert table.loc[("prompts", 1), "cosine"] == pytest.approx(cosine, abs=1e-5)
    assert table.loc[("text", 1), "heldout_auroc"] > 0.9 > table.loc[("prompts", 1), "heldout_auroc"]
    assert table.loc[("text", 1), "norm"] == pytest.approx(good.norms[1])
    with pytest.raises(InputError, match="'z' is not among"):
        elicitation_table({"text": good}, h, signs, questions, reference="z")


# -- in a study ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_study(
        folder,
        arms={"base": []},
        stages={},
        benign=None,
        steering=None,
        behaviour={},
        measure={"questions": 3, "reply": {"max_new_tokens": 4}},
        directions=some_directions(identity=["name"]),
    )
    save_model(folder / "model")
    return folder


BOTH = ("direction/zest:text", "direction/zest:prompts")


def run_directions(
    home: Path, out: Path, *changes: str, names: Sequence[str] = BOTH
) -> tuple[Bench, dict[str, Step]]:
    """The steps of both elicitations (or others), what they need, and no other."""
    return run_needed(load_spec(home / "study.yaml", changes), out, *names)


def judge_at(server: Server) -> tuple[str, ...]:
    judge = f"{{model: grader, api: {{base_url: '{server.url}', max_retries: 0}}, how: text}}"
    return (f"directions.judge={judge}", "directions.rollout_samples=2")


def graded(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Everything is coherent; the two sides of a pair are not told apart."""
    text = body["messages"][-1]["content"]
    if "how well the answer" in text:
        return "80", {}
    return ("10" if "hats" in text else "60"), {}


def test_unfiltered_is_the_default_and_says_so(home: Path, tmp_path: Path) -> None:
    bench, steps = run_directions(home, tmp_path / "out")
    folder = bench.folder(steps["direction/zest:prompts"])
    vectors = {name: Direction.load(folder / f"{name}.safetensors") for name in ("direction", *POSITIONS)}
    assert all(v.made_from["filter"] == "unfiltered" for v in vectors.values())
    assert {n: v.made_from["pooling"] for n, v in vectors.items()} == {
        "direction": "response_mean",
        **POSITIONS,
    }
    np.testing.assert_array_equal(vectors["direction"].vectors, vectors["response_avg"].vectors)
    assert vectors["prompt_last"].vectors.shape == (3, 32)
    assert not np.allclose(vectors["prompt_last"].norms, 1)  # raw, not unit
    assert "judged/zest" not in steps
    counts = rollouts_table(steps["tables"], bench)
    assert counts.iloc[0][["trait", "filter", "pairs"]].tolist() == ["zest", "unfiltered", 4]
    table = elicitations(steps["tables"], bench)
    assert table["vector"].unique().tolist() == ["zest:text", *(f"zest:prompts {p}" for p in POSITIONS)]
    assert table[table["vector"] == "zest:text"]["cosine_with_text"].to_numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("planted_key")
def test_a_judge_filters_pairs_goes_on_after_a_failure_and_tells_what_it_dropped(
    home: Path, tmp_path: Path, server: Server
) -> None:
    server.reply = graded
    server.faults.append(Fault("POST /chat", "status", 503, times=99))
    with pytest.raises(StepFailedError, match="judged/zest"):
        run_directions(home, tmp_path / "out", *judge_at(server))
    server.faults.clear()
    with pytest.raises(InputError, match=r"filter left 0 of 8 pairs.*rollout_samples"):
        run_directions(home, tmp_path / "out", *judge_at(server))  # it finds both sides alike
    asked = len(server.chats)
    with pytest.raises(InputError, match="filter left 0"):
        run_directions(home, tmp_path / "out", *judge_at(server))
    assert len(server.chats) == asked  # and is not asked again


@pytest.mark.usefixtures("planted_key")
def test_what_the_filter_kept_is_what_is_read(home: Path, tmp_path: Path, server: Server) -> None:
    from finetune.datasets.rows import read_jsonl

    bench, steps = run_directions(home, tmp_path / "out", "directions.rollout_samples=2")
    written = read_jsonl(bench.folder(steps["rollouts/zest"]) / "rollouts.jsonl")
    high = {r["answer"].strip() for r in written if r["sign"] > 0}

    def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        text = body["messages"][-1]["content"]
        if "how well the answer" in text:
            return "80", {}
        answer = text.split("<answer>\n")[1].split("\n</answer>")[0].strip()
        return ("90" if answer in high and "hats" not in text else "10"), {}

    server.reply = reply
    bench, steps = run_directions(home, tmp_path / "out", *judge_at(server))
    found = read_json(bench.folder(steps["judged/zest"]) / "kept.json")
    assert found["dropped"] == {"positive side below the trait threshold": 2}  # q0, both samples
    assert found["kept"] == 6
    assert steps["judged/zest"].work.asked is not None
    assert len(server.chats) == steps["judged/zest"].work.asked.calls == 32  # as planned
    direction = bench.direction(steps["direction/zest:prompts"])
    assert direction.n_pairs == 3
    assert direction.made_from["filter"] == "trait 50, coherence 50: 6 of 8 pairs kept"
    assert direction.made_from["judge"] == {"model": "grader", "how": ["text"]}
    row = rollouts_table(steps["tables"], bench).iloc[0]
    assert (row["pairs"], row["kept"], row["questions"]) == (8, 6, 3)
    assert row["dropped"] == "positive side below the trait threshold 2"
    assert row["coherence_verdicts"] == "scored 16"


@pytest.mark.usefixtures("planted_key")
def test_a_judge_scores_what_monitoring_correlates(home: Path, tmp_path: Path, server: Server) -> None:
    """The judge likes long questions; one of its replies is no score, and is counted as missing."""

    def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        text = body["messages"][-1]["content"]
        return ("no idea" if "What of socks?" in text else str(10 + sum(map(ord, text)) % 80)), {}

    server.reply = reply
    asked = "monitoring={arms: [base], questions: 4, pairs: 1, samples: 2, max_new_tokens: 6}"
    names = ["direction/zest:text", "monitoring/base"]
    judge = judge_at(server)[0]
    elicited = "directions.elicitation=[text]"
    bench, steps = run_directions(home, tmp_path / "out", judge, elicited, asked, names=names)
    assert steps["monitor_scores/base"].inputs["monitored"] == (steps["monitored/base"],)
    found = pd.read_csv(bench.folder(steps["monitoring/base"]) / "monitoring.csv").set_index("scope")
    assert set(found["score"]) == {"judge"}
    scores = pd.read_csv(bench.folder(steps["monitor_scores/base"]) / "scores.csv")
    assert len(scores) == 4 * 3 * 2
    assert steps["monitor_scores/base"].work.asked is not None
    assert len(server.chats) == steps["monitor_scores/base"].work.asked.calls == 4 * 3 * 2  # as planned
    assert scores["row"].tolist() == [i // 2 for i in range(24)]
    assert "does not" not in str(found["note"].iloc[0])
    # Fewer than four questions have scores, so that no interval can be given, and the table says why.
    assert "4 clusters" in found["note"].iloc[0]
    assert found["missing"].iloc[0] == scores["score"].isna().sum() >= 6


def test_a_local_judge_is_a_checkpoint(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no score"):  # a random model writes no digits
        run_directions(home, tmp_path / "out", "directions.judge={model: model}")
