"""A whole study on a tiny model: it repeats, resumes after a kill, and runs again exactly what a change touches."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from activations.store import ActivationStore
from mech.chat import Encoded
from mech.errors import InputError
from mech.models import load_model
from mech.score import response_logprobs
from study import plan_data
from study.base import find_base
from study.engines import local
from study.kinds import KINDS
from study.plan import make_plan
from study.run import run_study
from study.spec import load_spec
from study.step import Step
from tests.conftest import MadeOnce
from tests.tiny_study import STUDY, save_adapter, save_model, write_study

# Children are forked from a server that has imported everything and computed nothing: quick, and safe for torch's threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.test_study", "sklearn.decomposition", *sorted({k.home.split(":")[0] for k in KINDS.values()})]
)


@pytest.fixture(scope="module")
def home(made_once: MadeOnce) -> Path:
    """A folder with a tiny model and its study."""

    def fill(folder: Path) -> None:
        write_study(folder)
        save_adapter(save_model(folder / "model"), folder / "given", seed=0)

    return made_once("tiny_study", fill)


@pytest.fixture(scope="module")
def finished(home: Path, made_once: MadeOnce) -> Path:
    """The study's output, run once without any disturbance."""
    return made_once("tiny_study_out", lambda out: run_study(load_spec(home / "study.yaml"), out))


SMALL: dict[str, Any] = {
    "data": {"em": STUDY["data"]["em"]}, "stages": {"em": {"data": "em"}}, "arms": {"base": [], "em": ["em"]}, "benign": None,
    "measure": {"conditions": ["default"], "questions": 2, "reply": {"max_new_tokens": 4}},
    "directions": {"layer": 1, "traits": ["trait.yaml"], "elicitation": ["text"], "identity": ["name"], "identity_questions": 2},
    "behaviour": {"self_report": STUDY["behaviour"]["self_report"]}, "steering": None, "embedding": {"methods": []}, "fast": {},
}  # fmt: skip
"""A study with a step of most rooms: texts, data, checkpoints, activations, directions, measures."""


@pytest.fixture(scope="module")
def small(home: Path, made_once: MadeOnce) -> Path:
    """A smaller study's file."""
    return made_once("small_study", lambda folder: changed_copy(home, folder, **SMALL)) / "study.yaml"


@pytest.fixture(scope="module")
def small_finished(small: Path, made_once: MadeOnce) -> Path:
    """Its output, undisturbed."""
    return made_once("small_study_out", lambda out: run_study(load_spec(small), out))


def steps_of(yaml_file: Path) -> list[Step]:
    spec = load_spec(yaml_file)
    return make_plan(spec, find_base(spec.model))


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    found = {p.stem: pd.read_csv(p) for p in sorted((folder / "tables").glob("*.csv"))}
    if "training" in found:
        found["training"] = found["training"].drop(columns="seconds")
    return found


def assert_same_tables(a: Path, b: Path) -> None:
    left, right = tables(a), tables(b)
    assert left.keys() == right.keys()
    for name, frame in left.items():
        pd.testing.assert_frame_equal(frame, right[name], check_exact=True, obj=name)


def test_leaves_all_it_promises(finished: Path) -> None:
    names = {p.stem for p in (finished / "tables").glob("*.csv")}
    assert names == {
        "shifts", "paraphrases", "two_by_two", "directions", "direction_cosines", "identity_cosines", "identity_transfer", "dispersion", "elicitation", "rollouts", "probes", "self_recognition",
        "self_report", "samples", "steering", "sweeps", "sweep_best", "sweep_layers", "sweep_trends", "embedding", "training", "datasets",
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


def test_second_run_does_nothing(home: Path, finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "out")  # another worker may be reading the first
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    result = run_study(load_spec(home / "study.yaml"), out)
    assert result.ran == 0
    assert result.steps == sum(p.name == "manifest.json" for p in before)
    now = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    touched = {str(p.relative_to(out)) for p in now.keys() | before.keys() if now.get(p) != before.get(p)}
    assert touched <= {"study.yaml", "report.html", ".locks/report.lock"}


def test_every_kind_of_step_is_in_the_tiny_study(home: Path) -> None:
    behind_an_api = {"job", "asked_summaries", "asked_recognition", "asked_report"}  # see tests/test_paper.py
    elsewhere = behind_an_api | {
        "judged",
        "monitor_scores",
        "adjusted",
    }  # see tests/test_persona.py, tests/test_authorship.py
    assert {s.kind for s in steps_of(home / "study.yaml")} == set(KINDS) - elsewhere


def _run_and_die(yaml_file: str, out: str, kind: str) -> None:
    """Run the study in this process and kill it, -9, when a step of `kind` has written its files but is not done."""

    def dying_commit(step: Step, part: Path, final: Path, seconds: float) -> None:
        if step.kind == kind:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(step, part, final, seconds)

    commit, local._commit = local._commit, dying_commit
    run_study(load_spec(Path(yaml_file)), Path(out))


def _run(yaml_file: str, out: str, ran: str) -> None:
    Path(ran).write_text(str(run_study(load_spec(Path(yaml_file)), Path(out)).ran))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_every_kind_of_step_it_goes_on(home: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    # In the order in which kinds first come up: a kind met earlier would be done, and not be run again.
    for kind in dict.fromkeys(step.kind for step in steps_of(home / "study.yaml")):
        child = FORKS.Process(target=_run_and_die, args=(str(home / "study.yaml"), str(out), kind))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"was not killed in a step of kind {kind}"
        assert list(out.rglob(".*.part")), "a killed step leaves its unfinished folder"
        assert not (out / "report.html").exists()
    assert run_study(load_spec(home / "study.yaml"), out).ran > 0
    assert not list(out.rglob(".*.part"))
    assert_same_tables(out, finished)


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(small: Path, small_finished: Path, tmp_path: Path) -> None:
    out, ran = tmp_path / "twice", [tmp_path / "one", tmp_path / "other"]
    children = [FORKS.Process(target=_run, args=(str(small), str(out), str(told))) for told in ran]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sum(int(told.read_text()) for told in ran) == len(steps_of(small))
    assert_same_tables(out, small_finished)


def changed_kinds(home: Path, folder: Path) -> set[str]:
    """Names of the steps whose key differs between the study and a changed copy of it."""
    keys = {s.key for s in steps_of(home / "study.yaml")}
    return {s.name for s in steps_of(folder / "study.yaml") if s.key not in keys}


def changed_copy(home: Path, folder: Path, **changes: object) -> Path:
    write_study(folder, **changes)
    for name in ("model", "given"):
        (folder / name).symlink_to(home / name)
    return folder


def test_a_learning_rate_reruns_its_stage_and_what_stands_on_it(home: Path, tmp_path: Path) -> None:
    stages = json.loads(json.dumps(STUDY["stages"]))
    stages["sgtr"]["training"] = {"learning_rate": 0.02}
    changed = changed_kinds(home, changed_copy(home, tmp_path / "lr", stages=stages))
    assert "train/em+sgtr/seed0" in changed
    assert "capture/em_then_sgtr/seed0/default/text=base" in changed
    assert not {
        n
        for n in changed
        if n.startswith(("train/em/", "capture/em/", "capture/base", "direction", "steering"))
    }
    assert "shifts/em/seed0" not in changed


def test_a_prompt_reruns_what_reads_it(home: Path, tmp_path: Path) -> None:
    folder = changed_copy(home, tmp_path / "prompt")
    trait = yaml.safe_load((folder / "trait.yaml").read_text())
    trait["questions"][0]["high"] = "zzzz zzzz zzzz"  # an extraction answer: read by one contrast only
    (folder / "trait.yaml").write_text(yaml.safe_dump(trait))
    changed = changed_kinds(home, folder)
    assert {"contrast/zest:text", "direction/zest:text", "shifts/em/seed0", "tables"} <= changed
    assert not {
        n
        for n in changed
        if n.startswith(("train", "capture", "contrast/identity", "direction/identity", "self"))
    }


def test_a_chat_template_reruns_whatever_reads_through_it(home: Path, tmp_path: Path) -> None:
    folder = changed_copy(home, tmp_path / "template")
    (folder / "model").unlink()
    shutil.copytree(home / "model", folder / "model")
    template = folder / "model" / "chat_template.jinja"
    template.write_text(template.read_text().replace("made by Tin Works", "from the Tin Works"))
    assert {"train/em/seed0", "contrast/zest:text", "tables"} <= changed_kinds(home, folder)


def test_a_seed_reruns_the_trainings(home: Path, tmp_path: Path) -> None:
    changed = changed_kinds(home, changed_copy(home, tmp_path / "seed", seeds=[1]))
    assert {"train/em/seed1", "train/em+sgtr/seed1"} <= changed
    assert not {n for n in changed if n.startswith(("direction", "contrast", "data", "summaries"))}
    assert not {n for n in changed if n.startswith("capture/base/") and n.endswith("text=base")}


def test_a_plan_reads_each_dataset_once_and_loads_an_arm_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for name in ("articles_of", "read_messages"):
        of = getattr(plan_data, name)
        monkeypatch.setattr(plan_data, name, lambda source, of=of, name=name: read.append(name) or of(source))
    steps = steps_of(changed_copy(home, tmp_path / "seeds", seeds=[0, 1, 2]) / "study.yaml")
    assert (read.count("articles_of"), read.count("read_messages")) == (1, 2)  # sgtr; em, benign
    kinds = ("replies", "capture", "self_recognition", "self_report")
    readers = [s for s in steps if s.kind in kinds and "em/seed0" in s.name]
    chains = ["+".join(c.name for c in s.inputs["checkpoint"]) for s in readers]
    assert chains == ["train/em/seed0"] * 6 + [""]  # the base reads the arm's own text last


def test_shared_stages_are_trained_once(home: Path) -> None:
    trained = [s.name for s in steps_of(home / "study.yaml") if s.kind == "train"]
    assert sorted(trained) == ["train/benign/seed0", "train/em+sgtr/seed0", "train/em/seed0"]


def test_a_full_disk_loses_nothing(
    small: Path, small_finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, out = load_spec(small), tmp_path / "full"

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("study.steps.texts.write_jsonl", no_space)
        with pytest.raises(local.StepFailedError, match=r"replies/base.*No space left"):
            run_study(spec, out)
    assert not list(out.rglob("manifest.json"))
    assert not list(out.rglob(".*.part"))
    run_study(spec, out)
    assert_same_tables(out, small_finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"base": [], "x": ["nope"]}}, r"arms\.x: 'nope' is not defined"),
        ({"stages": {"em": {"data": "em", "adapter": "a"}}}, r"either `data` to train on or an `adapter`"),
        ({"colour": "red"}, r"colour: no such key"),
        ({"benig": "benign"}, r"benig: no such key; did you mean benign\?"),
        ({"seeds": "many"}, r"seeds: Input should be a valid tuple"),
        ({"seeds": [3, 3]}, r"seeds: name each once"),
        ({"measure": {"conditions": []}}, r"measure\.conditions: "),
        ({"measure": {"conditions": ["none", "none"]}}, r"measure\.conditions: name each once"),
        ({"behaviour": {"self_recognition": ""}}, r"behaviour\.self_recognition: "),
        ({"stages": {"em": {"adapter": ""}}}, r"stages\.em\.adapter: "),
        ({"training": {"learning_rat": 1}}, r"training of stage em: learning_rat"),
        ({"arms": {"em": ["em"]}}, "one arm, and only one, must be the base"),
        ({"arms": {"base": [], "again": []}}, "one arm, and only one, must be the base"),
        ({"data": {"em": {"kind": "messages"}}}, r"data\.em\.messages\.source"),
        (
            {"data": {"em": {"kind": "messages", "sorce": "x"}}},
            r"sorce: no such key; did you mean source\? \(and \d more\)",
        ),
    ],
)
def test_a_bad_study_is_refused_with_its_place(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_spec(write_study(tmp_path, **change))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name=no/such-model"], "not in the Hugging Face cache"),
        (["model.name=nothing"], "no such folder or file"),
        (["model.nmae=x"], r"model\.nmae: no such key; did you mean name\?"),
        (["data.em.sorce=x"], r"data\.em\.messages\.sorce: no such key; did you mean source\?"),
        (
            ["sweeps.written.strength=[1]"],
            r"sweeps\.written\.strength: no such key; did you mean strengths\?",
        ),
        (["directions.layer=7"], r"directions\.layer: 7 is out of range"),
        (
            ["measure.conditions=[default, 'other:Nobody']"],
            r"measure\.conditions\[1\]: condition other:Nobody",
        ),
        (["lens.layers=[1, 3]"], r"lens\.layers\[1\]: 3 is out of range"),
        (["monitoring.pairs=2"], r"monitoring\.pairs: 2 asked for, the trait zest has 1"),
        (["monitoring.score=judge"], r"monitoring\.score: judge needs directions\.judge"),
        (["patching.layers=[4]"], r"patching\.layers\[0\]: 4 is out of range"),
        (["patching.answers=[envy]"], r"patching\.answers\[0\]: 'envy' is neither own_name nor"),
        (["patching.arms=[base]"], r"patching\.arms\[0\]: base is the base"),
        (["patching.condition=other:Nobody"], r"patching\.condition: condition other:Nobody"),
        (["training.method=full"], r"patching\.arms: em_then_sgtr: its last stage trains all weights"),
        (["data.em.source=missing.jsonl"], "missing.jsonl: no such data file"),
        (["data.sgtr.held_out=9"], r"data\.sgtr: held_out: 9 of 9 articles leave none"),
        (["directions.traits=[envy]"], r"directions\.traits\[0\]: trait envy: neither built in"),
        (["directions.traits=[evil, trait.yaml, evil]"], r"directions\.traits\[2\]: 'evil' stands twice"),
        (["measure.prompt_sets=[x]"], r"measure\.prompt_sets\[0\]: prompt set x: neither built in"),
        (["stages.given.adapter=x"], r"stages\.given\.adapter: x: no such folder or file"),
        (
            ["directions.adjust.name.project_out=[nobody]"],
            r"adjust\.name: 'nobody' is not among the study's directions",
        ),
        (
            ["sweeps.written.directions=[nobody]"],
            r"sweeps\.written\.directions: 'nobody' is not among the study's directions",
        ),
        (
            ["sweeps.written.layer_by=steering", "sweeps.written.layers=[1, 3]"],
            r"sweeps\.written\.layers\[1\]: 3 is out of range",
        ),
        (["sweeps.written.directions=['identity:name']"], r"sweeps\.written\.trait: name the trait"),
        (["sweeps.written.trait=envy"], r"sweeps\.written\.trait: trait envy: neither built in"),
        (
            ["directions.adjust.presence:none.regress_out=[surprisal]"],
            r"adjust\.presence:none: surprisal cannot be regressed out",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    home: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_study(load_spec(home / "study.yaml", overrides), home / "never")
    assert not (home / "never").exists()


def test_malformed_rows_name_file_and_line(home: Path, tmp_path: Path) -> None:
    folder = changed_copy(home, tmp_path / "rows")
    lines = (folder / "em.jsonl").read_text().splitlines()
    (folder / "em.jsonl").write_text("\n".join([lines[0], '{"messages": [', *lines[2:]]))
    with pytest.raises(InputError, match=r"em\.jsonl, line 2: not JSON"):
        steps_of(folder / "study.yaml")


def test_overrides_and_fast_change_the_study(home: Path) -> None:
    spec = load_spec(home / "study.yaml", ["training.learning_rate=1e-4", "seeds=[3, 4]"], fast=True)
    assert spec.training == {**spec.training, "learning_rate": 1e-4, "max_steps": 2}
    assert spec.seeds == (3, 4)
    assert spec.is_fast


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


def mech(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from study.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_line_exit_codes(home: Path, finished: Path, tmp_path: Path) -> None:
    assert mech("status", finished).returncode == 0
    bad = mech("run", write_study(tmp_path, colour="red"))
    assert bad.returncode == 2
    assert "colour: no such key" in bad.stderr
    assert mech("status", tmp_path).returncode == 2
    assert mech("store", "verify", tmp_path / "none.h5").returncode == 2
    capture = next(finished.glob("activations/capture-base-default*/activations.h5"))
    assert mech("store", "verify", capture).stdout.strip().endswith("whole")
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    other = next(finished.glob("activations/capture-base-none*/activations.h5"))
    (swapped / "activations.h5").write_bytes(other.read_bytes())
    (swapped / "manifest.json").write_bytes((capture.parent / "manifest.json").read_bytes())
    found = mech("store", "verify", swapped / "activations.h5")
    assert found.returncode == 1
    assert "not the bytes of the manifest" in found.stdout


def test_help_is_quick() -> None:
    """By the processor's time, for the clock's is also other processes'; and without any of the large libraries."""
    code = "import sys, atexit; from study.cli import main; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    run = [sys.executable, "-c", code, "--help"]
    subprocess.run(run, check=True, capture_output=True)  # compiles what is not compiled yet
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(run, check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Usage" in shown.stdout
    assert not {"torch", "transformers", "pandas", "scipy", "matplotlib", "h5py"} & set(shown.stderr.split())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
