"""What a whole study on a tiny model leaves: its files, and every table with what it should hold."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from activations.store import ActivationStore
from mech.chat import Encoded, Identity
from mech.identities import load_invented
from mech.models import load_model
from mech.score import response_logprobs
from probes.direction import Direction
from probes.identity import matched_names
from study.kinds import KINDS
from study.run import run_study
from study.spec import load_spec
from tests.tiny_study import STUDY, changed_copy, steps_of, tables, write_study


def test_leaves_all_it_promises(finished: Path) -> None:
    names = {p.stem for p in (finished / "tables").glob("*.csv")}
    assert names == {
        "shifts", "paraphrases", "differences", "undone", "spread_differences", "behaviour_differences", "two_by_two", "directions", "direction_cosines", "identity_cosines", "identity_transfer", "dispersion", "elicitation", "rollouts", "probes", "self_recognition",
        "self_report", "samples", "steering", "sweeps", "sweep_best", "sweep_layers", "sweep_trends", "embedding", "arms", "stages", "training", "datasets",
        "lora_alignment", "lora_overlap", "lora_alignment_by_layer", "lora_overlap_by_layer",
        "lens_directions", "lens_shifts", "lens_prompts", "patching", "adapter_ranges",
        "monitoring",
    }  # fmt: skip
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "One training seed" in page
    for png in (finished / "figures").glob("*.png"):
        assert png.with_suffix(".svg").is_file()
        assert png.with_suffix(".csv").is_file()
    assert list(finished.glob("checkpoints/train-em*/adapter_model.safetensors"))
    assert list(finished.glob("activations/*/activations.h5"))
    assert list(finished.glob("directions/*/direction.safetensors"))
    assert not list(finished.rglob("*.part"))
    assert not list(finished.rglob(".*.tmp"))


def test_the_report_says_what_each_arm_is_and_how_its_stages_were_trained(finished: Path) -> None:
    found = tables(finished)
    arms = found["arms"].set_index("arm")["stages"]
    assert arms["base"] == "none: the base"
    assert (arms["em_early"], arms["em_then_sgtr"]) == ("em up to step 1", "em, then sgtr")
    stages = found["stages"].set_index("stage")
    assert [*stages.index] == ["em", "benign", "em+sgtr"]
    assert stages.loc["em", "arms"] == "em, em_then_sgtr, em_early (after step 1)"
    assert stages.loc["em+sgtr", "acting"] == "add identity:name at layer 1 on all tokens, coefficient 0.5"
    assert stages.loc["benign", ["system_prompt", "acting"]].tolist() == ["text:Count along.", "nothing"]
    for stage, row in stages.iterrows():
        (file,) = finished.glob(f"checkpoints/train-{stage}-seed0-*/trainer_state.json")
        about = json.loads(file.read_text())
        assert row["own_loss_after"] == pytest.approx(about["own_rows"]["loss_after"])
        assert (row["steps"], row["n_rows"]) == (about["global_step"], about["n_rows"])
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "em up to step 1" in page
    assert "text:Count along." in page


def test_weights_of_every_stage_are_held_against_directions_and_each_other(finished: Path) -> None:
    found = tables(finished)
    aligned, by_layer = found["lora_alignment"], found["lora_alignment_by_layer"]
    # em@1 has seen one step, at the learning rate 0 that a warm-up starts with: it writes nothing, and is left out.
    assert set(aligned["stage"]) == {"em", "benign", "em+sgtr", "given"}
    assert set(aligned["direction"]) == set(found["directions"]["direction"])
    assert (aligned["n_maps"] == 6).all()
    assert set(by_layer["map"]) == {"self_attn.o_proj", "mlp.down_proj"}
    means = by_layer.groupby(["stage", "direction"])["energy"].mean()
    pd.testing.assert_series_equal(
        means, aligned.set_index(["stage", "direction"])["energy"].sort_index(), check_names=False
    )
    pairs = set(zip(found["lora_overlap"]["stage"], found["lora_overlap"]["other"], strict=True))
    assert {frozenset(p) for p in pairs} == {
        frozenset(p) for p in (("em", "benign"), ("em", "given"), ("benign", "given"), ("em+sgtr", "em"))
    }


def test_directions_shifts_and_prompts_are_read_in_tokens(finished: Path) -> None:
    found = tables(finished)
    assert set(found["lens_directions"]["direction"]) == set(found["directions"]["direction"])
    assert set(found["lens_directions"]["layer"]) == {
        1,
        2,
    }  # the declared one, the middle, three quarters, the last: of three
    assert set(found["lens_prompts"]["arm"]) == set(STUDY["arms"])
    # em_early has learnt nothing yet: its shift is zero, and says nothing.
    assert set(found["lens_shifts"]["arm"]) == {"em", "benign", "em_then_sgtr", "given"}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "lens_prompts" in page


def test_patching_says_what_lies_under_an_arm(finished: Path) -> None:
    found = tables(finished)
    patched, ranges = found["patching"], found["adapter_ranges"]
    assert set(patched["reference"]) == set(ranges["reference"]) == {"em"}
    assert set(patched["answer"]) == {"own_name", "zest"}
    assert len(patched) == 2 * 2 * 3 * 3  # answers, ways, spans, layers
    assert ranges[ranges["layers"] == "all"]["effect"].notna().all()


def test_monitoring_tells_overall_from_within(finished: Path) -> None:
    found = tables(finished)["monitoring"]
    assert set(found["arm"]) == {"base", "em"}
    assert set(found["direction"]) == {"zest:text", "zest:prompts"}
    assert {"overall", "within", "condition: default"} <= set(found["scope"])
    assert found[found["scope"].isin(["overall", "within"])]["p_covariance"].between(0, 1).all()
    assert set(found[found["scope"] == "overall"]["n_rows"]) == {12}  # four questions under three prompts


def test_shifts_stand_beside_every_null_that_the_study_has(finished: Path) -> None:
    found = tables(finished)["shifts"]
    assert found["p_permutation"].between(0, 1).all()
    pairs = pd.read_csv(finished / "tables" / "paraphrases.csv").set_index("pooling")
    assert (pairs["kept"] + pairs["dropped"] == pairs["pairs"]).all()
    left = (
        pairs["note"].isna()[found["pooling"]].to_numpy()
    )  # with enough pairs of one length at this pooling
    assert (found["n_paraphrase"] > 0).tolist() == left.tolist()
    assert found["p_paraphrase"].notna().tolist() == left.tolist()
    assert left.any()
    assert (found["n_permutation"] == STUDY["statistics"]["n_null"]).all()
    named = found["direction"] == "identity:name"
    assert (found["n_wrong_name"] == np.where(named, 3, 0)).all()
    assert found["p_wrong_name"].notna().tolist() == named.tolist()
    assert (found["n_unrelated_trait"] == 0).all()  # one trait: there is no other


def test_a_name_direction_says_how_much_longer_each_invented_prompt_is(home: Path, finished: Path) -> None:
    (file,) = finished.glob("directions/direction-identity-name-*/direction.safetensors")
    template, own = load_model(str(home / "model")).template, Identity(**STUDY["model"]["identity"])
    gaps = Direction.load(file).made_from["token_gaps"]
    makers = load_invented().makers
    assert gaps == matched_names(template, own, makers, STUDY["directions"]["invented_names"])


def test_every_measure_of_the_own_name_takes_the_same_names_nearest_in_tokens(
    home: Path, finished: Path
) -> None:
    """Self-reports and steering: not simply the first of the list. (Sweeps: tests/test_evals.py.)"""
    template, own = load_model(str(home / "model")).template, STUDY["model"]["identity"]["name"]

    def tokens(name: str) -> int:
        return len(template.tokenizer(f"I am {name}", add_special_tokens=False).input_ids)

    gaps = {name: abs(tokens(name) - tokens(own)) for name in load_invented().makers}
    files = [
        *finished.glob("measures/self_report-*/names.csv"),
        *finished.glob("measures/steering-*/names.csv"),
    ]
    assert len(files) == len(STUDY["arms"]) + 1
    for file in files:
        frame = pd.read_csv(file)
        used = set(frame.loc[~frame["own"], "name"])
        assert len(used) == STUDY["directions"]["invented_names"]
        assert max(gaps[n] for n in used) <= min(gap for n, gap in gaps.items() if n not in used)
        assert used != set([*gaps][: len(used)])


def test_shifts_and_the_two_by_two_say_how_reliable_their_directions_are(finished: Path) -> None:
    found = tables(finished)
    known = found["directions"].set_index(["direction", "layer"])["split_half"]
    for name in ("shifts", "two_by_two"):
        expected = known.loc[list(zip(found[name]["direction"], found[name]["layer"], strict=True))]
        np.testing.assert_allclose(found[name]["split_half"], expected, atol=1e-6)


def test_every_kind_of_step_is_in_the_tiny_study(home: Path) -> None:
    behind_an_api = {"job", "asked_summaries", "asked_recognition", "asked_report"}  # see tests/test_paper.py
    elsewhere = behind_an_api | {
        "judged",
        "monitor_scores",
        "adjusted",
    }  # see tests/test_persona.py, tests/test_authorship.py
    assert {s.kind for s in steps_of(home / "study.yaml")} == set(KINDS) - elsewhere


def test_surprisal_is_stored_with_every_capture_where_it_is_asked_for(home: Path, tmp_path: Path) -> None:
    alone = {"steering": None, "arms": {"base": []}, "stages": {}, "benign": None, "behaviour": {}, "embedding": {"methods": []},
             "directions": {"layer": 1, "traits": ["trait.yaml"], "identity": [], "probes": []}}  # fmt: skip
    folder = changed_copy(home, tmp_path / "study")
    asked = {"conditions": ["default"], "questions": 2, "reply": {"max_new_tokens": 4}}
    plain = steps_of(write_study(folder, **alone, measure=asked))
    study = write_study(folder, **alone, measure=asked | {"surprisal": True})
    assert not any("surprisal" in step.config for step in plain)
    assert {s.kind for s in steps_of(study) if s.config.get("surprisal")} == {"capture", "contrast"}
    run_study(load_spec(study), tmp_path / "out")
    model, stores = load_model(str(folder / "model")), sorted((tmp_path / "out").rglob("activations.h5"))
    assert len(stores) == 3  # answers, and the contrast by text and by system prompts
    for file in stores:
        with ActivationStore.open(file) as store:
            rows = store.rows
        encoded = [
            Encoded(tuple(t.tolist()), int(a), int(b), "")
            for t, a, b in zip(rows.tokens, rows.columns["n_prompt"], rows.columns["n_response"], strict=True)
        ]
        expected = [-p.mean().item() for p in response_logprobs(model, encoded)]
        np.testing.assert_allclose(rows.columns["surprisal"], expected, rtol=1e-4)
