"""Adapters by layer and in weight space; steering one prompt."""

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from scipy.linalg import orth, subspace_angles
from typer.testing import CliRunner

from analysis.lora_weights import alignment, overlap
from mech.adapters import Update, adapter_layers, read_updates, updates, writing_maps, writing_maps_of
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.interventions import Add, intervene
from mech.models import ChatModel, load_model
from mech.patching import answer_logprob, patch_between
from mech.resolve import resolve
from mech.score import response_logprobs
from probes.persona import load_trait, text_contrast
from probes.steer import control, dose_response
from study.cli import app
from study.steps.weights import compare
from tests.drawn_at_random import given_direction
from tests.plain_hooks import conversations, logits
from tests.tiny_study import save_adapter, save_model

# -- adapters by layer ------------------------------------------------------------------------------------


def test_an_adapter_on_in_all_layers_is_finetuned_and_in_none_the_base(folder: Path, live: ChatModel) -> None:
    base, row = load_model(str(folder)), conversations(live, 1)[0]
    tuned = logits(live, row)
    with adapter_layers(live, [0, 1, 2]):
        assert torch.equal(logits(live, row), tuned)
    with adapter_layers(live, []):
        torch.testing.assert_close(logits(live, row), logits(base, row))
    with adapter_layers(live, [1]):
        some = logits(live, row)
    assert torch.equal(logits(live, row), tuned)
    half = copy.deepcopy(base)  # by hand: the middle block's update alone, added to the base's weights
    with torch.no_grad():
        for update in updates(live):
            if update.layer == 1:
                half.blocks[1].get_submodule(update.name).weight += update.left @ update.right  # type: ignore[operator]
    torch.testing.assert_close(some, logits(half, row), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="no live adapter"), adapter_layers(base, [0]):
        pass
    with pytest.raises(InputError, match="layer 3 is out of range"), adapter_layers(live, [3]):
        pass


def test_updates_are_what_merging_adds(folder: Path, live: ChatModel) -> None:
    base = load_model(str(folder))
    merged = load_model(live.checkpoint)
    for update in updates(live):
        before, after = (m.blocks[update.layer].get_submodule(update.name).weight for m in (base, merged))
        torch.testing.assert_close(after - before, update.left @ update.right, rtol=1e-3, atol=1e-5)
    writers = updates(live, writing=True)
    assert {u.name for u in writers} == {"self_attn.o_proj", "mlp.down_proj"}
    assert len(writers) == 2 * live.n_layers
    # The same from files: the writers' places from the base's config, the factors from the adapter's folder.
    places = writing_maps_of(base.checkpoint)
    assert places == writing_maps(base) == writing_maps(live) == {(u.layer, u.name) for u in writers}
    read = {(u.layer, u.name): u for u in read_updates(live.checkpoint.adapters[0].path, places)}
    assert read.keys() == places
    for update in writers:
        found = read[update.layer, update.name]
        torch.testing.assert_close(found.left @ found.right, update.left @ update.right)


def test_an_attention_that_is_adapted_in_part_has_no_writer(folder: Path, tmp_path: Path) -> None:
    """Queries alone are adapted: the last adapted map of attention is none that writes into the stream."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(str(folder)).hf, config).save_pretrained(tmp_path, save_embedding_layers=False)
    partly = load_model(f"{folder}:{tmp_path}", merge=False)
    assert updates(partly, writing=True) == []
    assert len(updates(partly)) == len(read_updates(tmp_path)) == 2 * partly.n_layers


def test_an_adapter_that_is_no_product_of_factors_is_refused(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    get_peft_model(load_model(str(folder)).hf, config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(InputError, match="not plain LoRA"):
        read_updates(tmp_path)
    with pytest.raises(InputError, match="not plain LoRA"):
        updates(load_model(f"{folder}:{tmp_path}", merge=False))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}, "layers.0.input_layernorm"),
    ],
)
def test_an_adapter_that_acts_beyond_its_layers_has_no_base_below(
    more: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """Switched off in every layer it would still not be the base."""
    folder = save_model(tmp_path / "m", tie_word_embeddings=False)
    config = LoraConfig(r=2, init_lora_weights=False, **more)
    get_peft_model(load_model(str(folder)).hf, config).save_pretrained(
        tmp_path / "a", save_embedding_layers=False
    )
    live = load_model(f"{folder}:{tmp_path / 'a'}", merge=False)
    with pytest.raises(InputError, match=named), adapter_layers(live, []):
        pass
    row = conversations(live, 1)[0]
    with pytest.raises(InputError, match=named):
        patch_between(live, row, answer_logprob(row))


def test_patterns_of_rank_and_alpha_are_those_of_peft(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False,
        rank_pattern={"down_proj": 4}, alpha_pattern={"layers.1.mlp.down_proj": 10},
    )  # fmt: skip
    get_peft_model(load_model(str(folder)).hf, config).save_pretrained(tmp_path, save_embedding_layers=False)
    theirs = {(u.layer, u.name): u for u in updates(load_model(f"{folder}:{tmp_path}", merge=False))}
    for u in read_updates(tmp_path):
        other = theirs[u.layer, u.name]
        torch.testing.assert_close(u.left @ u.right, other.left @ other.right)


def test_alignment_and_overlap_against_whole_matrices(live: ChatModel) -> None:
    rng = np.random.default_rng(0)
    writers = updates(live, writing=True)
    inside = np.stack(
        [
            np.asarray(next(u for u in writers if u.layer == n and "down" in u.name).left[:, 0])
            for n in range(3)
        ]
    )
    members = [given_direction(inside, "inside"), given_direction(rng.standard_normal((3, 32)), "random")]
    compared = alignment(writers, members, samples=rng.standard_normal((60, 3, 32)), rng=rng)
    found = compared.by_map
    for _, row in found.iterrows():
        update = next(u for u in writers if (u.layer, u.name) == (row["layer"], row["map"]))
        whole = (update.left @ update.right).double().numpy()
        u, s, _ = np.linalg.svd(whole)
        unit = inside[row["layer"]] / np.linalg.norm(inside[row["layer"]])
        if row["direction"] == "inside":
            assert row["energy"] == pytest.approx(((unit @ u[:, :3]) ** 2).sum(), abs=1e-5)
            assert row["gain"] == pytest.approx(np.linalg.norm(unit @ whole) / s[0], abs=1e-5)
            if "down" in row["map"]:
                assert row["energy"] == pytest.approx(1, abs=1e-5)
                assert row["p_random"] < 0.01
    random = found[found["direction"] == "random"]
    assert random["expected"].iloc[0] == pytest.approx(3 / 32)
    assert random["energy"].mean() < 0.3
    overall = compared.overall.set_index("direction")
    assert overall.loc["inside", "energy"] == pytest.approx(
        found[found["direction"] == "inside"]["energy"].mean()
    )
    assert overall.loc["inside", "p_random"] < 0.01
    assert overall.loc["inside", "p_covariance"] < 0.01
    assert overall.loc["random", "p_random"] > 0.02
    same = overlap(writers, writers, rng=rng, n_null=50)
    np.testing.assert_allclose(same.by_map["shared"], 1, atol=1e-9)
    np.testing.assert_allclose(same.by_map["first_angle"], 0, atol=1e-3)
    assert (same.by_map["p_random"] < 0.05).all()
    assert same.overall["p_random"].item() < 0.05


def test_overlap_is_that_of_what_is_written() -> None:
    """Against scipy's angles between the ranges of whole ΔW; one of the two reads from fewer places than it could write."""
    rng, d = np.random.default_rng(3), 20
    one, other = (random_update(rng, d, r) for r in (3, 5))
    other.right[3:] = 0  # so what it writes has three dimensions, though its factor has five columns
    found = overlap([one], [other], rng=rng, n_null=50).by_map.iloc[0]
    spaces = [orth((u.left @ u.right).double().numpy(), rcond=1e-6) for u in (one, other)]
    cosines = np.cos(subspace_angles(*spaces))
    assert found["shared"] == pytest.approx((cosines**2).mean(), abs=1e-6)
    assert found["first_cosine"] == pytest.approx(cosines.max(), abs=1e-6)
    assert found["expected"] == pytest.approx(3 / d)


def random_update(rng: np.random.Generator, d: int, r: int, layer: int = 0) -> Update:
    left, right = (torch.tensor(rng.standard_normal(shape)) for shape in ((d, r), (r, 20)))
    return Update("mlp.down_proj", layer, left.float(), right.float())


def test_nulls_of_weights_are_those_of_drawn_spaces() -> None:
    """p values of random directions and random spaces are uniform; samples that lie in the span are no news to their null."""
    rng = np.random.default_rng(5)
    aligned, shared = [], []
    samples = rng.standard_normal((40, 1, 24))
    for _ in range(80):
        u, v = random_update(rng, 24, 3), random_update(rng, 24, 5)
        one = alignment(
            [u], [given_direction(rng.standard_normal((1, 24)))], samples=samples, rng=rng, n_null=200
        )
        aligned.append(one.by_map[["p_random", "p_covariance"]].iloc[0])
        shared.append(overlap([u], [v], rng=rng, n_null=200).by_map["p_random"].item())
        expected = overlap([u], [v], rng=rng, n_null=50).by_map["expected"].item()
        assert expected == pytest.approx(5 / 24)
    for p in (*np.array(aligned).T, np.array(shared)):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    u = random_update(rng, 24, 3)
    within = (rng.standard_normal((40, 3)) @ u.left.numpy().T)[:, None]
    inside = alignment([u], [given_direction(within[0])], samples=within, rng=rng, n_null=200).overall.iloc[0]
    assert inside["p_random"] < 0.01
    assert inside["p_covariance"] > 0.2


def test_adapters_that_write_nothing_are_refused() -> None:
    rng = np.random.default_rng(0)
    u = random_update(rng, 24, 3)
    nothing = Update(u.name, 0, torch.zeros_like(u.left), u.right)
    with pytest.raises(InputError, match="writes anything"):
        alignment([nothing], [given_direction(np.ones((1, 24)))], samples=np.ones((4, 1, 24)), rng=rng)
    with pytest.raises(InputError, match="write nothing in any map"):
        overlap([nothing], [u], rng=rng)
    with pytest.raises(InputError, match="no map in common"):
        overlap([u], [random_update(rng, 24, 3, layer=1)], rng=rng)


def test_p_values_of_adapters_do_not_depend_on_which_others_there_are(folder: Path, tmp_path: Path) -> None:
    """Draws are common: adapters that differ in nothing have the same p values, wherever they stand in the study."""
    rng = np.random.default_rng(0)
    known = given_direction(rng.standard_normal((3, 32)))
    store = SimpleNamespace(read=lambda *_: known.vectors[None] + rng.standard_normal((20, 3, 32)))
    places = {"a": 1, "b": 2, "c": 3, "again": 2}
    bench: Any = SimpleNamespace(
        direction=lambda _: known, store=lambda _: nullcontext(store), base=resolve(str(folder)),
        folder=lambda name: save_adapter(folder, tmp_path / name, seed=places[name]),
    )  # fmt: skip

    def p_values(stages: list[str], pairs: list[tuple[str, str]]) -> tuple[pd.DataFrame, pd.DataFrame]:
        config = {"statistics": {"seed": 3, "n_null": 50}, "stages": stages, "pairs": pairs, "seed": 0}
        compare(
            SimpleNamespace(config=config, inputs={"directions": ["d"], "base": ["b"], "adapters": stages}),
            bench,
            tmp_path,
        )  # type: ignore[arg-type]
        alone, both = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("alignment", "overlap"))
        return alone.set_index("stage")["p_random"], both.set_index(["stage", "other"])["p_random"]

    every = p_values(["a", "b", "again", "c"], [("a", "b"), ("c", "b"), ("c", "again")])
    few = p_values(["c", "b"], [("c", "b")])
    assert few[0]["c"] == every[0]["c"]
    assert few[1]["c", "b"] == every[1]["c", "b"] == every[1]["c", "again"]
    assert every[0]["b"] == every[0]["again"]


# -- steering ---------------------------------------------------------------------------------------------


def test_dose_response_is_the_log_odds_under_the_addition(folder: Path) -> None:
    model = load_model(str(folder))
    trait = load_trait("evil")
    rows = text_contrast(
        model.template, trait.model_copy(update={"questions": trait.questions[:4]}), SystemPrompt()
    )
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    assert np.linalg.norm(control(vector, 3)) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
    found = dose_response(model, rows, vector, 1, [0.0, 2.0])
    with intervene(model, Add(vector, [1], 2.0)):
        scores = response_logprobs(model, [r.encoded for r in rows])
    for i, q in enumerate(dict.fromkeys(r.question for r in rows)):
        high, low = scores[2 * i].mean(), scores[2 * i + 1].mean()
        assert found[2.0][q] == pytest.approx(float(high - low), abs=1e-4)
    assert found[0.0] != found[2.0]


def test_the_commands_show_convert_and_steer(folder: Path, tmp_path: Path) -> None:
    given_direction(np.random.default_rng(0).standard_normal((3, 32)), "evil").save(
        tmp_path / "d.safetensors"
    )
    run = CliRunner().invoke
    shown = run(app, ["direction", "show", str(tmp_path / "d.safetensors"), "--model", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert "evil: 3 layers, width 32, from 10 questions" in shown.output
    assert "layer 1 favours" in shown.output
    steered = run(app, ["steer", str(folder), "Who are you?", "--direction", str(tmp_path / "d.safetensors"), "--layer", "1",
                        "--coefficient", "3", "--max-new-tokens", "4"])  # fmt: skip
    assert steered.exit_code == 0, steered.output
    assert "as it is" in steered.output
    assert "+3 x evil at layer 1, dose" in steered.output
    assert "random (evil's norm)" in steered.output
    elsewhere = given_direction(np.ones((3, 32)), "evil")
    elsewhere.made_from["checkpoint"] = {"base": "another", "digest": "abc"}  # type: ignore[index]
    elsewhere.save(tmp_path / "other.safetensors")
    for file, layer, said in (
        ("d", "3", "layer 3"),
        ("d", "-1", "layer -1"),
        ("other", "1", "made on another base"),
    ):
        path = str(tmp_path / f"{file}.safetensors")
        for args in (["steer", str(folder), "Hi", "--direction", path, "--layer", layer, "--coefficient", "1"],
                     ["direction", "show", path, "--model", str(folder), "--layer", layer]):  # fmt: skip
            refused = run(app, args)
            assert isinstance(refused.exception, InputError), refused.output
            assert said in str(refused.exception)
            assert "as it is" not in refused.output


def test_a_mean_over_maps_that_write_the_same_is_no_surer_than_one_map() -> None:
    """Eight maps that write into one space, and a random direction that is the same in all layers: independent draws for each map would call
    three of ten found."""
    rng, found = np.random.default_rng(8), []
    samples = rng.standard_normal((10, 4, 48))
    for _ in range(100):
        space = rng.standard_normal((48, 3))
        writes = [
            Update(name, layer, torch.tensor(space @ rng.standard_normal((3, 3))).float(), torch.eye(3))
            for layer in range(4)
            for name in ("self_attn.o_proj", "mlp.down_proj")
        ]
        everywhere = given_direction(np.repeat(rng.standard_normal((1, 48)), 4, 0))
        compared = alignment(writes, [everywhere], samples=samples, rng=rng, n_null=200)
        found.append(compared.overall["p_random"].item())
    assert np.mean(np.array(found) <= 0.05) <= 0.12
    assert stats.kstest(found, "uniform").pvalue > 0.01
