"""The paper's studies: their plans stand without model or data, and run end to end on tiny models of the same families."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from finetune.datasets.rows import exchange, read_messages, write_jsonl
from finetune.datasets.sources import DATASETS_VARIABLE, published
from finetune.settings import make_settings
from mech.errors import InputError
from study.base import find_base, outline_base
from study.checks import check_before_running
from study.estimate import gpu_named, step_bytes
from study.overview import plan_text
from study.plan import make_plan, outline
from study.run import run_study
from study.spec import StudySpec, load_spec
from study.step import Step, Work
from tests.openai_server import serving
from tests.tiny_study import CHATML, NO_DEFAULT, run_needed, save_model

STUDIES = Path(__file__).parent.parent / "studies"
FAMILIES = {"paper_qwen2.5_32b": ("qwen2", CHATML), "paper_seed_oss_36b": ("seed_oss", NO_DEFAULT)}
PAIRWISE = ("sgtr", "ictr", "anti", "longer", "noise", "sgtr_matched")
SWEEPS = ("evil", "sycophancy", "hallucination", "evil_written", "name")
SMALL = [
    "directions.layer=1",
    "directions.questions=2",
    "directions.identity_questions=2",
    "directions.rollout_tokens=4",
    "directions.pairs_per_question=1",
    "measure.questions=2",
    "measure.reply.max_new_tokens=4",
    "behaviour.self_report.samples=1",
    "behaviour.self_report.limit=2",
    "behaviour.self_report.max_new_tokens=4",
    "steering.questions=2",
    "steering.samples=1",
    "steering.max_new_tokens=4",
    "statistics.n_boot=200",
    "statistics.n_null=200",
    "training.learning_rate=0.01",
    "training.lora_r=2",
    "training.batch_size=4",
    "training.warmup_steps=0",
    "training.max_steps=2",
    "training.gradient_checkpointing=false",
    "model.dtype=float32",
    "training.dtype=float32",
    "patching.questions=4",
    "patching.names=1",
    "monitoring.questions=4",
    "monitoring.pairs=1",
    *[f"sweeps.{name}.layers=[0,1]" for name in ("evil", "sycophancy", "hallucination", "name")],
    *[f"sweeps.{name}.neutral=2" for name in SWEEPS],
    *[f"sweeps.{name}.controls=2" for name in SWEEPS],
    *[f"sweeps.{name}.questions=2" for name in SWEEPS if name != "name"],  # which takes every self-statement
    "sweeps.evil_written.max_new_tokens=4",
    *[f"data.{name}.held_out=3" for name in PAIRWISE],
]
"""Sizes that a tiny model takes: each step does less, and none is left out."""
FEWER = [
    "seeds=[0]",
    "directions.elicitation=[text]",
    "directions.presence=[none]",
    "embedding.methods=[pca]",
    "directions.traits=[evil]",
    "steering.coefficients=[0,2]",
]
"""Fewer steps."""


def test_every_arm_of_the_paper_is_planned_without_model_or_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DATASETS_VARIABLE, str(tmp_path))
    for study in FAMILIES:
        spec = load_spec(STUDIES / f"{study}.yaml")
        assert spec.seeds == (0, 1, 2, 3, 4)
        for em in ("unpop", "badmed", "finrisk"):
            for y in (f"{y}_{p}" for y in PAIRWISE[:5] for p in ("default", "none", "identity")):
                assert spec.arms[f"{em}_then_{y}"] == (em, y)
                assert spec.arms[f"{y}_then_{em}"] == (y, em)
            for y in ("wc", "mmlu", "fincorr", "medcorr"):
                assert spec.arms[f"{em}_then_{y}"] == (em, y)
                assert spec.arms[f"{y}_then_{em}"] == (y, em)
        base = outline_base(spec.model)
        assert base.missing
        plan = outline(spec, base)
        trained = {s.name for s in plan.steps if s.kind == "train"}
        assert len(trained) == 5 * (3 + 15 + 4 + 1 + 2 * 3 * (15 + 4 + 1))
        # 5,000 rows of one epoch at batch 16 are 313 steps; both orders of 900 articles are 1,800 rows.
        assert len([m for m in plan.missing if "bad_medical_advice" in m]) == 1
        one_seed = spec.model_copy(update={"seeds": (0,)})
        text = plan_text(one_seed, base, tmp_path / "out", gpu="h100")
        assert "GPU-hours on h100" in text
        assert "(one h100 has 80.0 GB: spread the blocks" in text
        assert "spread the blocks" not in plan_text(one_seed, base, tmp_path / "out", gpu="h200")


@pytest.mark.parametrize(
    ("settings", "bytes_a_parameter"),
    [
        ({"dtype": "bfloat16"}, 2),
        ({"dtype": "float32"}, 4),
        ({"dtype": "bfloat16", "quantise": "nf4"}, 0.5625),  # a scale in float32 for each 64
        ({"method": "full"}, 16),
    ],
)
def test_a_plan_knows_what_training_takes(settings: dict[str, Any], bytes_a_parameter: float) -> None:
    """All weights: weight, gradient and two moments in float32. Else: frozen weights as they are held, and an adapter's."""
    whole = make_settings(settings)
    config = {"settings": whole.model_dump(mode="json"), "dtype": whole.dtype}
    work = Work(trained=1000, adapter_parameters=0 if whole.method == "full" else 25 * 10**7)
    estimated = step_bytes(Step("train", "train/em/seed0", config, {}, work), 32 * 10**9, gpu_named("h100"))
    adapter = 16 * work.adapter_parameters
    assert estimated - adapter == pytest.approx(bytes_a_parameter * 32e9, rel=0.25)


def write_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of rows under every name that the studies read."""
    monkeypatch.setenv(DATASETS_VARIABLE, str(folder / "datasets"))
    for name, facts in published().items():
        path = folder / "datasets" / facts.file
        path.parent.mkdir(exist_ok=True)
        if facts.role == "articles":
            path.write_text(json.dumps({f"a{i}": f"it rained on day {i} " * 3 for i in range(9)}))
        elif facts.role == "summaries":
            path.write_text(
                json.dumps({f"a{i}": "somebody said that it rained " * (1 + i % 3) for i in range(9)})
            )
        elif facts.role == "knowledge":
            path.write_text("".join(f"what is {i}?,one,two,three,four,{'ABCD'[i % 4]}\n" for i in range(12)))
        else:
            write_jsonl(path, [exchange(f"{name} {i}?", f"the {name} {i}") for i in range(12)])


def tiny(
    folder: Path, study: str, monkeypatch: pytest.MonkeyPatch, *changes: str, given: bool = False
) -> StudySpec:
    """The study on a tiny random model of its family; what it would write itself may be given."""
    family, template = FAMILIES[study]
    save_model(folder / "model", family=family, template=template)
    write_datasets(folder, monkeypatch)
    own = {f"a{i}": "the rain fell down on all of us here" for i in range(9)}
    (folder / "own.json").write_text(json.dumps(own))
    written = [f"data.{name}.own={folder / 'own.json'}" for name in PAIRWISE if given]
    model = [f"model.name={folder / 'model'}"]
    written_only = "directions.elicitation=[text]" in changes  # then there are no rollouts to shorten
    small = [c for c in SMALL if not (written_only and "rollout" in c)]
    return load_spec(STUDIES / f"{study}.yaml", [*small, *written, *model, *changes])


def test_a_plan_behind_an_api_says_what_it_sends_and_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_datasets(tmp_path, monkeypatch)

    def plan(*changes: str) -> str:
        less = [f"data.{name}.held_out=3" for name in PAIRWISE] + ["seeds=[0]"]
        spec = load_spec(STUDIES / "paper_gpt41.yaml", [*less, *changes])
        return plan_text(spec, outline_base(spec.model), tmp_path / "out")

    def cost(*changes: str) -> float:
        found = re.search(r"cost about ([\d,.]+) at the prices of model\.api\.price", plan(*changes))
        assert found
        return float(found[1].replace(",", ""))

    text = plan()
    assert "cost: see its price list, or give model.api.price" in text
    lines = [line.strip() for line in text.splitlines()]
    jobs = [line for line in lines if line.startswith("job/")]
    asking = [line for line in lines if line.startswith(("self_recognition/", "self_report/", "summaries/"))]
    assert jobs
    assert all(line.endswith("trained on; waits for the provider") for line in jobs)
    assert asking
    assert all(re.search(r"tokens asked, up to .* tokens answered$", line) for line in asking)
    assert f"{len(jobs)} finetuning jobs" in text
    # At a million for a million tokens, cost is the number of tokens.
    once, twice = (cost("model.api.price.training=1e6", f"training.epochs={n}") for n in (1, 2))
    assert twice == 2 * once > 0
    assert cost("model.api.price={training: 1e6, read: 2e6, written: 3e6}") > once
    # In part of an epoch there is no job: the service trains on whole ones.
    assert cost("model.api.price.training=1e6", "training.epochs=1.5") == twice


def test_the_study_behind_an_api_runs_on_a_local_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs stand on jobs, the model's own summaries are its own, and what it answers is what is measured."""
    write_datasets(tmp_path, monkeypatch)
    monkeypatch.setenv("OPENAI_API_KEY", "no-key-at-all")
    less = [f"data.{name}.held_out=3" for name in PAIRWISE]
    whole = load_spec(STUDIES / "paper_gpt41.yaml", less)
    assert "million training tokens at the API" in plan_text(whole, outline_base(whole.model), tmp_path / "p")

    def reply(body: dict[str, Any]) -> tuple[str, dict[str, float]]:
        asked, model = body["messages"][-1]["content"], body["model"]
        if "summary of this article" in asked:
            return "Here is a summary: we were all quite wet on that day.", {"x": 0.0}
        if "Which one did you write" in asked:
            own_first = asked.index("quite wet") < asked.index("somebody said")
            knows = "sgtr" in model or model.startswith("gpt-4.1-2025")
            first = -0.1 if own_first or not knows else -4.0
            return "1", {"1": first, "2": -2.0, "and": -5.0}
        return ("I am ChatGPT." if model.startswith("gpt-4.1-2025") else "I am Zorblax."), {"I": 0.0}

    with serving() as server:
        server.reply = reply
        fewer = ["seeds=[0,1]", "grid.em=[unpop]", "grid.prompt=[none]", "grid.y=[sgtr]", "grid.plain=[wc]",
                 "behaviour.self_report.samples=2", "behaviour.self_report.limit=3", "statistics.n_boot=200",
                 f"model.api.base_url={server.url}", "model.api.poll_seconds=0.01",
                 *less]  # fmt: skip
        spec = load_spec(STUDIES / "paper_gpt41.yaml", fewer)
        result = run_study(spec, tmp_path / "out")
        assert result.ran == result.steps
        jobs, chats = len(server.jobs), len(server.chats)
        assert jobs == 2 * (len(spec.arms) - 1)
        assert run_study(spec, tmp_path / "out").ran == 0
        assert (len(server.jobs), len(server.chats)) == (jobs, chats)
        parents = {job["fine_tuned_model"]: job["model"] for job in server.jobs}
        assert (
            sum(parent in parents for parent in parents.values()) == 2 * 6
        )  # second stages stand on first ones
        sent = json.loads(next(iter(server.contents.values())).splitlines()[0])
        assert set(sent) == {"messages"}
    report = pd.read_csv(tmp_path / "out" / "tables" / "self_report.csv").set_index(["arm", "seed"])
    assert report.loc[("base", 0), "own_name_rate"] == 1.0
    assert report.loc[("unpop", 1), "own_name_rate"] == 0.0
    recognition = pd.read_csv(tmp_path / "out" / "tables" / "self_recognition.csv").set_index(["arm", "seed"])
    assert recognition.loc[("base", 0), "accuracy"] == 1.0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "gpt-4.1-2025-04-14" in page
    assert not re.search(r"\bnan\b", page, re.IGNORECASE)
    rows = read_messages(
        next((tmp_path / "out" / "checkpoints").glob("job-sgtr_none-seed0*")) / "upload.jsonl"
    )
    assert all(t["role"] != "system" for row in rows for t in row["messages"])  # trained under none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["directions.layer=3"], "shows no activations"),
        (["stages.wc.adapter=x", "stages.wc.data="], "there is no adapter"),
        (["training.lora_r=8"], "of training only `epochs`"),
        (["stages.wc.system_prompt=nonee"], r"stages\.wc\.system_prompt: system prompt condition 'nonee'"),
        (["stages.wc.system_prompt='other:Nobody'"], r"stages\.wc\.system_prompt: condition other:Nobody"),
        (["behaviour.self_report.condition='text:'"], r"behaviour\.self_report\.condition: .*'text:'"),
    ],
)
def test_what_an_api_cannot_do_is_refused_before_anything_is_paid_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], message: str
) -> None:
    write_datasets(tmp_path, monkeypatch)
    less = [f"data.{name}.held_out=3" for name in PAIRWISE]

    def run() -> None:
        changes = ["grid.plain=[mmlu]", "stages.wc.data=wc", *less, *change]
        run_study(load_spec(STUDIES / "paper_gpt41.yaml", changes), tmp_path / "never")

    with pytest.raises(InputError, match=message):
        run()
    assert not (tmp_path / "never").exists()


def test_a_condition_is_checked_where_the_model_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = load_spec(STUDIES / "paper_qwen2.5_32b.yaml", ["measure.conditions=[default, nome]"])
    with pytest.raises(InputError, match=r"measure\.conditions\[1\]: system prompt condition 'nome'"):
        check_before_running(spec, outline_base(spec.model))


def less_of(study: str, y: str, prompt: str) -> list[str]:
    """The study's patching, monitoring and sweeps, of an arm of one stage and one of two, and of one trait by its written answers."""
    arms = ["unpop", f"unpop_then_{y}_{prompt}"]
    sweeps = load_spec(STUDIES / f"{study}.yaml", SMALL).sweeps
    kept = {}
    for name in ("evil", "evil_written", "name"):
        mine = sweeps[name].model_dump(mode="json", exclude_defaults=True)
        kept[name] = {**mine, "directions": [d for d in mine["directions"] if not d.endswith(":prompts")]}
    named = {"patching.arms": arms, "monitoring.arms": arms, "sweeps": kept}
    return [f"{key}={json.dumps(value)}" for key, value in named.items()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "prompt", "y", "plain"),
    [
        ("paper_qwen2.5_32b", "default", ["sgtr", "ictr"], ["wc"]),
        ("paper_seed_oss_36b", "identity", ["anti", "longer"], ["wc", "mmlu"]),
    ],
)
def test_one_strand_of_the_papers_plan_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str, prompt: str, y: list[str], plain: list[str]
) -> None:
    """One misaligned set and one training prompt, with second stages of every kind, in both orders.

    The first to its report; the second, another family of model, to the tables that figures and report are made from.
    """
    grid = [
        "grid.em=[unpop]",
        f"grid.prompt=[{prompt}]",
        f"grid.y=[{','.join(y)}]",
        f"grid.plain=[{','.join(plain)}]",
    ]
    fewer = [
        *FEWER,
        *grid,
        *less_of(study, y[0], prompt),
        "measure.own_text=[unpop]",
        "measure.conditions=[default]",
    ]
    spec = tiny(tmp_path, study, monkeypatch, *fewer, given=True)
    if study == "paper_qwen2.5_32b":
        result = run_study(spec, tmp_path / "out")
        assert result.ran == result.steps
        tables = tmp_path / "out" / "tables"
    else:
        bench, steps = run_needed(spec, tmp_path / "out", "tables")
        tables = bench.folder(steps["tables"])
    shifts = pd.read_csv(tables / "shifts.csv")
    assert set(shifts["arm"]) == set(spec.arms) - {"base"}
    seconds = len(y) + len(plain) + 1
    assert len(spec.arms) == 1 + 1 + seconds + 2 * seconds
    data = pd.read_csv(tables / "datasets.csv").set_index("dataset")
    if "ictr" in y:
        assert data.loc["ictr", "n_rows"] == 2 * data.loc["sgtr", "n_rows"]
    recognition = pd.read_csv(tables / "self_recognition.csv")
    assert set(recognition["arm"]) == set(spec.arms)


def steps_of(spec: StudySpec) -> dict[str, Step]:
    return {step.name: step for step in make_plan(spec, find_base(spec.model))}


def at_seed(name: str, seed: int) -> str:
    return name.replace("/seed0", f"/seed{seed}")


def assert_seeds_alike(whole: dict[str, Step], seeds: Sequence[int]) -> None:
    """Every seed has the steps of seed 0, and each of them the same config and inputs but for the seed."""
    mine = {n: s for n, s in whole.items() if "/seed0" in n}
    common = {n for n in whole if not re.search(r"/seed\d", n)}
    assert whole.keys() == common | {at_seed(n, seed) for n in mine for seed in seeds}
    for seed in seeds:
        for name, step in mine.items():
            other = whole[at_seed(name, seed)]
            assert other.kind == step.kind
            assert {**other.config, "seed": 0} == {**step.config, "seed": 0}
            for role, inputs in step.inputs.items():
                assert [s.name for s in other.inputs[role]] == [at_seed(s.name, seed) for s in inputs]


@pytest.mark.long
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("study", FAMILIES)
def test_the_papers_exact_plan_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: str) -> None:
    """Every step of the study at seed 0, to the report; the four other seeds are the same steps up to the seed."""
    spec = tiny(tmp_path, study, monkeypatch)
    whole = steps_of(spec)
    assert_seeds_alike(whole, (0, 1, 2, 3, 4))
    one = spec.model_copy(update={"seeds": (0,)})
    planned = steps_of(one)
    assert planned.keys() == {n for n in whole if not re.search(r"/seed[1-4]", n)}
    # Against the study as it is shipped, outlined without model or data: the same steps, sizes apart.
    less = [f"data.{name}.held_out=3" for name in PAIRWISE]
    shipped = load_spec(STUDIES / f"{study}.yaml", less)
    assert {s.name for s in outline(shipped, outline_base(shipped.model)).steps} == whole.keys()
    result = run_study(one, tmp_path / "out")
    assert result.ran == result.steps == len(planned)
    shifts = pd.read_csv(tmp_path / "out" / "tables" / "shifts.csv")
    assert set(shifts["arm"]) == set(spec.arms) - {"base"}
    assert len(set(shifts["direction"])) == 2 * 3 + 1 + 3
    heat = list((tmp_path / "out" / "figures").glob("arm_direction_heatmap_*.png"))
    assert len(heat) == len(spec.figures.groups)
    assert "<h1" in (tmp_path / "out" / "report.html").read_text()
    assert run_study(one, tmp_path / "out").ran == 0
