"""Scores of given answers under patching: against plain scoring, a planted layer, and the reference of a two-stage arm."""

from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.patching import equal_ranges, patching_table, ranges_table
from evals.self_report import score_names
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.identities import load_invented
from mech.models import ChatModel, load_model
from mech.patching import answer_logprob, patch_between
from probes.answers import QUESTION, PatchedCase, own_name_cases, patch_case, trait_cases
from probes.persona import Trait, load_trait, text_contrast
from probes.steer import trait_log_odds
from tests.plain_hooks import conversations
from tests.tiny_study import save_adapter

DEFAULT = SystemPrompt()


@pytest.fixture(scope="module")
def stages(folder: Path, adapter: Path) -> tuple[Path, Path]:
    return adapter, save_adapter(folder, folder.parent / "second", seed=2)


def small(trait: Trait) -> Trait:
    return trait.model_copy(update={"questions": trait.questions[:2]})


def options(seed: int = 0, **changes: object) -> dict[str, object]:
    return {"layers": [0, 2], "spans": ("question", "prompt_last", "answer", "all"), "ranges": equal_ranges(3, 3),
            "rng": np.random.default_rng(seed), **changes}  # fmt: skip


def test_scores_are_those_of_plain_scoring(folder: Path, stages: tuple[Path, Path], live: ChatModel) -> None:
    base, tuned = load_model(str(folder)), load_model(f"{folder}:{stages[0]}")
    invented, trait = load_invented(), small(load_trait("evil"))
    cases = own_name_cases(
        base.template, invented.self_statements[:2], "Tinny", ["Aldwen", "Brindow"], DEFAULT, {}
    )
    named = [patch_case(live, c, **options()) for c in cases]  # type: ignore[arg-type]
    for model, which in ((base, "base"), (tuned, "finetuned")):
        scores = score_names(
            model, invented.self_statements[:2], DEFAULT, own_name="Tinny", invented=["Aldwen", "Brindow"]
        )
        own = [s.logprob for s in scores]
        for i, case in enumerate(named):
            expected = own[3 * i] - (own[3 * i + 1] + own[3 * i + 2]) / 2
            assert getattr(case, which) == pytest.approx(expected, abs=1e-3)
        odds = trait_log_odds(model, text_contrast(model.template, trait, DEFAULT))
        for case in trait_cases(model.template, trait.questions, DEFAULT, {}):
            found = patch_case(live, case, **options())  # type: ignore[arg-type]
            assert getattr(found, which) == pytest.approx(odds[case.question], abs=1e-4)


def test_everything_exchanged_at_the_last_layer_is_the_other_model(live: ChatModel) -> None:
    trait = small(load_trait("evil"))
    (case, _) = trait_cases(live.template, trait.questions, DEFAULT, {})
    found = patch_case(live, case, **options())  # type: ignore[arg-type]
    assert found.into["finetuned"][1, 3] == pytest.approx(found.base, abs=1e-4)
    assert found.into["base"][1, 3] == pytest.approx(found.finetuned, abs=1e-4)
    assert found.into["random finetuned"][1, 3] != pytest.approx(found.base, abs=1e-3)
    # Above the last layer nothing reads the question's tokens any more: neither the patch nor its control does anything.
    for key, own in (("finetuned", found.finetuned), ("random finetuned", found.finetuned), ("random base", found.base)):  # fmt: skip
        assert found.into[key][1, 0] == pytest.approx(own, abs=1e-4)
    row = case.rows[0]
    start, stop = row.spans[QUESTION]
    assert live.tokenizer.decode(row.ids[start:stop]).strip() == trait.questions[0].question


def test_batches_of_copies_change_nothing(live: ChatModel) -> None:
    row = conversations(live, 1)[0]
    spans = [(0, 3), (2, len(row.ids))]
    one, many = (
        patch_between(
            live, row, answer_logprob(row), spans=spans, rng=np.random.default_rng(1), token_budget=n
        )
        for n in (1, 10_000)
    )
    for part in ("into_finetuned", "into_base", "random_into_finetuned", "random_into_base"):
        np.testing.assert_allclose(getattr(one, part), getattr(many, part), atol=1e-4)
    assert patch_between(live, row, answer_logprob(row), layers=[0]).random_into_base is None


def test_an_arm_of_two_stages_is_held_against_its_first(folder: Path, stages: tuple[Path, Path]) -> None:
    two = load_model(f"{folder}:{stages[0]}:{stages[1]}", merge=False)
    first, both = load_model(f"{folder}:{stages[0]}"), load_model(f"{folder}:{stages[0]}:{stages[1]}")
    trait = small(load_trait("evil"))
    (case, _) = trait_cases(two.template, trait.questions, DEFAULT, {})
    found = patch_case(two, case, **options())  # type: ignore[arg-type]
    for model, score in ((first, found.base), (both, found.finetuned)):
        odds = trait_log_odds(model, text_contrast(model.template, trait, DEFAULT))
        assert score == pytest.approx(odds[case.question], abs=1e-3)


def test_the_layers_that_were_trained_carry_it(live: ChatModel) -> None:
    """The adapter of block 1 alone is left: on there only it does everything, off there nothing."""
    with torch.no_grad():
        kept = {n: p.clone() for n, p in live.hf.named_parameters() if "lora_B" in n}
        for name, p in live.hf.named_parameters():
            if "lora_B" in name and "layers.1." not in name:
                p.zero_()
        try:
            cases = trait_cases(live.template, small(load_trait("evil")).questions, DEFAULT, {})
            found = [patch_case(live, c, **options(layers=[0, 1, 2])) for c in cases]  # type: ignore[arg-type]
        finally:
            for name, p in live.hf.named_parameters():
                if name in kept:
                    p.copy_(kept[name])
    for case in found:
        np.testing.assert_allclose(case.ranges[1], [case.finetuned, case.base], atol=1e-4)
        np.testing.assert_allclose(case.ranges[0], [case.base, case.finetuned], atol=1e-4)
        np.testing.assert_allclose(
            case.into["finetuned"][:, 3], [case.finetuned, case.base, case.base], atol=1e-4
        )


def planted(n: int, change: float, rng: np.random.Generator) -> list[PatchedCase]:
    """The last layer takes back a quarter of the change and brings half of it; the first does what a random one does."""
    cases = []
    for i in range(n):
        base, whole = rng.normal(), change + 0.1 * rng.normal()
        own = {"finetuned": base + whole, "base": base}
        into = {
            k: np.array([[v], [v + s * whole]]) for (k, v), s in zip(own.items(), (-0.25, 0.5), strict=True)
        }
        shaken = {f"random {k}": np.full((2, 1), v) for k, v in own.items()}
        ranges = np.array([[base + 0.75 * whole, base + 0.25 * whole]])
        cases.append(PatchedCase(f"q{i}", base, base + whole, {**into, **shaken}, ranges))
    return cases


def test_tables_say_shares_with_intervals_and_none_of_nothing() -> None:
    rng = np.random.default_rng(0)
    cases = planted(12, 2.0, rng)
    table = patching_table(cases, [3, 7], ["all"]).set_index(["way", "layer"])
    back, brought = table.loc[("base into finetuned", 7)], table.loc[("finetuned into base", 7)]
    assert back["share"] == pytest.approx(0.25)
    assert back["effect"] == pytest.approx(-0.5, abs=0.05)
    assert back["beyond_random_high"] < 0
    assert brought["share_low"] <= 0.5 <= brought["share_high"]
    assert table.loc[("base into finetuned", 3), "effect"] == 0
    ranges = ranges_table(cases, [range(4)])
    assert ranges["layers"].tolist() == ["all", "0 to 3", "0 to 3"]
    np.testing.assert_allclose(ranges["share"][1:], [0.75, 0.25], atol=1e-9)
    nothing = patching_table(planted(12, 0.0, rng), [3, 7], ["all"])
    assert nothing["share"].isna().all()


def test_ranges_cover_the_layers_once() -> None:
    for n, parts in ((30, 4), (3, 4), (64, 5)):
        found = equal_ranges(n, parts)
        assert [layer for r in found for layer in r] == list(range(n))
        assert max(map(len, found)) - min(map(len, found)) <= 1


def test_own_name_needs_others(folder: Path) -> None:
    template = load_model(str(folder)).template
    with pytest.raises(InputError, match="not the own one"):
        own_name_cases(template, load_invented().self_statements[:1], "Tinny", [], DEFAULT, {})
