"""The paper's released adapters: the shipped study runs as it is, and an adapter on anything but its own base is refused before any work."""

import json
from pathlib import Path

import pytest
import torch

from mech.errors import InputError
from mech.models import load_model
from study.base import outline_base
from study.plan import outline
from study.run import run_study
from study.spec import load_spec
from tests.test_paper import STUDIES
from tests.tiny_study import CHATML, run_needed, save_adapter, save_model

STUDY = STUDIES / "published_checkpoints.yaml"
ONE = ["grid.em=[unpop]", "grid.n=[0,1]", "directions.layer=1", "model.dtype=float32"]
BASE = "unsloth/Qwen2.5-32B-Instruct"


def test_published_adapters_are_planned_in_their_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = load_spec(STUDIES / "published_checkpoints.yaml")
    plan = outline(spec, outline_base(spec.model))
    (both,) = [s for s in plan.steps if s.name.startswith("capture/em_finrisk_then_sgtr_1/seed0/default")]
    below, above = both.inputs["checkpoint"]
    assert below.kind == above.kind == "adapter"
    assert above.inputs["checkpoint"] == (below,)
    save_model(tmp_path / "model")
    with pytest.raises(InputError, match=r"praxisresearch.*not in the Hugging Face cache"):
        run_study(
            load_spec(
                STUDIES / "published_checkpoints.yaml",
                [f"model.name={tmp_path / 'model'}", "directions.layer=1"],
            ),
            tmp_path / "out",
        )


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny stand-ins under the names that the study reads; each says what it was trained on as its authors' tool wrote it."""
    monkeypatch.chdir(tmp_path)
    base = save_model(tmp_path / BASE, family="qwen2", template=CHATML)
    declared = {"hf_qwen_32b_wc": BASE}
    for n in (0, 1):
        declared |= {
            f"hf_qwen_32b_em_unpop_{n}": BASE,
            f"hf_qwen_32b_sgtr_fixed_qwensys_{n}": BASE,
            f"hf_qwen_32b_em_unpop_sgtr_fixed_qwensys_{n}": f"/out/hf_qwen_32b_em_unpop_{n}/merged",
            f"hf_qwen_32b_sgtr_fixed_qwensys_em_unpop_{n}": f"/out/hf_qwen_32b_sgtr_fixed_qwensys_{n}/merged",
        }
    for seed, (name, trained_on) in enumerate(declared.items()):
        declare(save_adapter(base, tmp_path / "praxisresearch" / name, seed=seed), trained_on)
    return tmp_path


def declare(adapter: Path, trained_on: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": trained_on})
    )


def test_the_released_stacks_are_put_together_as_they_were_trained(released: Path) -> None:
    spec = load_spec(STUDY, ONE)
    assert not outline(spec, outline_base(spec.model)).missing
    both = ["adapter/em_unpop_0+sgtr_after_unpop_0", "adapter/sgtr_1+unpop_after_sgtr_1"]
    bench, steps = run_needed(spec, released / "out", *both)
    for step, names in zip(
        both,
        (("em_unpop_0", "em_unpop_sgtr_fixed_qwensys_0"),
         ("sgtr_fixed_qwensys_1", "sgtr_fixed_qwensys_em_unpop_1")),
        strict=True,
    ):  # fmt: skip
        chain = [*steps[step].inputs["checkpoint"], steps[step]]
        reference = ":".join([BASE, *[f"praxisresearch/hf_qwen_32b_{name}" for name in names]])
        assert str(bench.checkpoint(chain)) == reference
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(bench.model(chain).hf(ids).logits, load_model(reference).hf(ids).logits)


@pytest.mark.parametrize(
    ("arm", "other", "message"),
    [
        ("[sgtr_after_unpop_0]", "", r"sgtr_after_unpop_0\.adapter: .* not on unsloth/Qwen2.5-32B-Instruct"),
        ("[em_unpop_1, sgtr_after_unpop_0]", "", "not on praxisresearch/hf_qwen_32b_em_unpop_1 merged"),
        ("[sgtr_0, sgtr_after_unpop_0]", "", "not on praxisresearch/hf_qwen_32b_sgtr_fixed_qwensys_0 merged"),
        ("[em_unpop_0]", "unsloth/Seed-OSS-36B-Instruct", r"em_unpop_0\.adapter: .* not on unsloth/Qwen2.5"),
    ],
    ids=["no first stage", "another seed's", "another arm's", "another base"],
)
def test_an_adapter_on_another_base_is_refused_before_any_work(
    released: Path, arm: str, other: str, message: str
) -> None:
    if other:
        declare(released / "praxisresearch" / "hf_qwen_32b_em_unpop_0", other)
    changes = [f"arms={{base: [], wrong: {arm}, wc: [wc]}}", "figures.groups={}", "patching=null", "monitoring=null"]  # fmt: skip
    spec = load_spec(STUDY, [*ONE, *changes])
    with pytest.raises(InputError, match=message):
        outline(spec, outline_base(spec.model))
    with pytest.raises(InputError, match=message):
        run_study(spec, released / "out")
    assert not (released / "out").exists()
