"""A study is checked before anything runs, and runs again exactly what a change touches."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mech.errors import InputError
from mech.questions import load_prompts
from study import plan_data
from study.publish import warnings_of
from study.run import run_study
from study.spec import load_spec
from tests.tiny_study import STUDY, changed_copy, steps_of, write_study


def changed_kinds(home: Path, folder: Path) -> set[str]:
    """Names of the steps whose key differs between the study and a changed copy of it."""
    keys = {s.key for s in steps_of(home / "study.yaml")}
    return {s.name for s in steps_of(folder / "study.yaml") if s.key not in keys}


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {"base": [], "x": ["nope"]}}, r"arms\.x: 'nope' is not defined"),
        ({"stages": {"em": {"data": "em", "adapter": "a"}}}, r"either `data` to train on or an `adapter`"),
        ({"colour": "red"}, r"colour: no such key"),
        ({"benig": "benign"}, r"benig: no such key; did you mean benign\?"),
        ({"seeds": "many"}, r"seeds: must be a list, as in \[a, b\], not 'many'"),
        ({"seeds": [-1]}, r"seeds\[0\]: must be 0 or more, not -1$"),
        ({"seeds": [True]}, r"seeds: must be a number, not true$"),
        ({"training": {"max_steps": True}}, r"max_steps: must be a number, not true$"),
        ({"name": "a/b"}, r"name: 'a/b' is to name a folder: take letters, digits, _ \. and -"),
        ({"name": ".."}, r"name: '\.\.' is to name a folder"),
        ({"arms": {"base": [], "e/m": ["em"]}}, r"arms: 'e/m' is to name a folder"),
        ({"stages": {"em+": {"data": "em"}}}, r"stages: 'em\+' is to name a folder"),
        ({"data": {"../em": STUDY["data"]["em"]}}, r"data: '\.\./em' is to name a folder"),
        (
            {"comparisons": {"a/b": {"arm": "em", "against": "base"}}},
            r"comparisons: 'a/b' is to name a folder",
        ),
        ({"sweeps": {"a b": STUDY["sweeps"]["written"]}}, r"sweeps: 'a b' is to name a folder"),
        ({"seeds": [0, 1.5]}, r"seeds\[1\]: must be a whole number, not 1\.5$"),
        ({"model": "a-model"}, r"model: must be a mapping of keys to values, not 'a-model'$"),
        ({"stages": {"em": None}}, r"stages\.em: must be a mapping of keys to values, not nothing"),
        ({"arms": {"em": "em"}}, r"arms\.em: must be a list, as in \[a, b\], not 'em'"),
        ({"name": 5}, r"name: must be text, not 5$"),
        ({"name": ""}, r"name: '' is to name a folder"),
        ({"weights": "perhaps"}, r"weights: must be true or false, not 'perhaps'$"),
        (
            {"embedding": {"methods": ["tsne"]}},
            r"embedding\.methods\[0\]: must be 'pca' or 'umap', not 'tsne'$",
        ),
        ({"data": {"em": {"source": "x"}}}, r"data\.em: needs 'kind', which says what it is"),
        (
            {"data": {"em": {"kind": "mesages"}}},
            r"data\.em: 'kind' is 'mesages'; there are 'messages', 'sgtr'",
        ),
        (
            {"identity": {"name": "Tinny"}},
            r"identity: no such key here; it belongs under (directions or )?model",
        ),
        ({"seeds": [3, 3]}, r"seeds: name each once"),
        ({"measure": {"conditions": []}}, r"measure\.conditions: "),
        ({"measure": {"conditions": ["none", "none"]}}, r"measure\.conditions: name each once"),
        ({"steering": {"arm": "em", "coefficients": [0, 2, 2.0]}}, r"steering\.coefficients: name each once"),
        ({"patching": {"arms": ["em"], "layers": [1, 1]}}, r"patching\.layers: name each once"),
        ({"directions": {"layer": 1, "traits": ["zest", "zest"]}}, r"directions\.traits: name each once"),
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
        (["arms.x=['em@last']"], r"arms\.x: em@last: after @ stands a step, as in em@5"),
        (["arms.x=['em@2']"], r"arms: em@2: step 2 is not among the steps that its stage saves"),
        (["model.device=gpu"], r"device gpu: not to be had here"),
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
        (
            ["training.quantise=nf4"],
            r"stages\.sgtr\.training: quantise: nf4: the adapters below it \(em\) cannot be merged",
        ),
        (["training.shard=true"], r"stages\.em\.training: shard: needs several processes"),
        (
            ["stages.em.training.save_at=[1, 9]"],
            r"stages\.em\.training: save_at: 9 is beyond the last step, 2",
        ),
        (
            ["training.max_steps=1"],
            r"stages\.em\.training: .*one step, taken while the learning rate warms up",
        ),
        (["directions.invented_names=70"], r"directions\.invented_names: 70 asked for, 61 known"),
        (["training.method=full"], r"patching\.arms: em_then_sgtr: its last stage trains all weights"),
        (["data.em.source=missing.jsonl"], "missing.jsonl: no such data file"),
        (["data.sgtr.held_out=9"], r"data\.sgtr: held_out: 9 of 9 articles leave none"),
        (["directions.traits=[envy]"], r"directions\.traits\[0\]: trait envy: neither built in"),
        (
            ["directions.traits=[evil, trait.yaml, ./trait.yaml]"],
            r"directions\.traits\[2\]: 'zest' stands twice",
        ),
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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "identity-01",
            "How far is the moon?",
            r"question id 'identity-01' stands in another prompt set too",
        ),
        ("mine", "{text}", r"question 'mine' \(evaluate\) asks the same as 'identity-01' \(extract\)"),
    ],
)
def test_prompt_sets_together_have_each_question_once(
    home: Path, tmp_path: Path, name: str, text: str, message: str
) -> None:
    """Identity directions are fitted on one half of all sets together and tested on the other."""
    folder = changed_copy(home, tmp_path / "sets")
    (first,) = (q for q in load_prompts("identity").questions if q.id == "identity-01")
    mine = {"id": name, "split": "evaluate", "text": text.format(text=first.text)}
    (folder / "mine.yaml").write_text(
        yaml.safe_dump({"name": "mine", "description": "", "questions": [mine]})
    )
    with pytest.raises(InputError, match=r"measure\.prompt_sets\[1\]: " + message):
        run_study(
            load_spec(folder / "study.yaml", ["measure.prompt_sets=[identity, mine.yaml]"]), folder / "never"
        )


def test_malformed_rows_name_file_and_line(home: Path, tmp_path: Path) -> None:
    folder = changed_copy(home, tmp_path / "rows")
    lines = (folder / "em.jsonl").read_text().splitlines()
    (folder / "em.jsonl").write_text("\n".join([lines[0], '{"messages": [', *lines[2:]]))
    with pytest.raises(InputError, match=r"em\.jsonl, line 2: not JSON"):
        steps_of(folder / "study.yaml")


@pytest.mark.parametrize(
    ("fast", "message"),
    [
        ({"seeds": "many"}, r"seeds: must be a list.*as the section `fast` changes it"),
        ({"measure.questionz": 2}, r"measure\.questionz: no such key.*as the section `fast` changes it"),
        (["seeds"], r"fast: is a mapping"),
    ],
)
def test_the_small_version_is_checked_with_the_whole_one(tmp_path: Path, fast: object, message: str) -> None:
    study = write_study(tmp_path, fast=fast)
    with pytest.raises(InputError, match=message):
        load_spec(study)


def test_overrides_and_fast_change_the_study(home: Path) -> None:
    spec = load_spec(home / "study.yaml", ["training.learning_rate=1e-4", "seeds=[3, 4]"], fast=True)
    assert spec.training == {**spec.training, "learning_rate": 1e-4, "max_steps": 2}
    assert spec.seeds == (3, 4)
    assert spec.is_fast


def test_the_report_says_what_intervals_are_over(home: Path) -> None:
    one, two = (
        " ".join(warnings_of(load_spec(home / "study.yaml", [f"seeds={seeds}"]), {}))
        for seeds in ("[0]", "[0, 1]")
    )
    assert "One training seed: intervals speak of questions" in one
    assert "2 training seeds: every interval is over questions, within one seed" in two
    assert "none is an interval over seeds" in two
