"""The real small model: it is what we think it is, and the quickstart's rehearsal runs from end to end."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from activations.capture import capture
from finetune.labels import training_rows
from finetune.loss import summed_loss
from mech.chat import SystemPrompt
from mech.fetch import packaged
from mech.models import ChatModel
from mech.packed_attention import packed_attention
from probes.persona import load_trait, text_contrast
from study.run import run_study
from study.spec import load_spec

pytestmark = pytest.mark.real
ROOT = Path(__file__).parent.parent


def test_its_identity_is_what_its_template_inserts(real: ChatModel) -> None:
    identity = packaged("smollm2-135m-instruct").identity
    assert real.template.default_system == identity.prompt
    spec = load_spec(ROOT / "studies" / "quickstart.yaml")
    assert spec.model.identity.model_dump() == vars(identity)
    turn = [{"role": "user", "content": "Who are you?"}]
    assert (
        real.template.encode_prompt(turn, SystemPrompt("identity"), identity=identity).ids
        == real.template.encode_prompt(turn).ids
    )
    assert "system" not in real.tokenizer.decode(real.template.encode_prompt(turn, SystemPrompt("none")).ids)


def test_capture_is_hidden_states_on_the_real_model(real: ChatModel) -> None:
    rows = [r.encoded for r in text_contrast(real.template, load_trait("evil"), SystemPrompt())[:6]]
    ours = capture(real, rows, poolings=["response_mean"])["resid_post", "response_mean"]
    for i, row in enumerate(rows):
        with torch.no_grad():
            states = real.hf(input_ids=torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        start, stop = row.spans["response"]
        for layer in range(real.n_layers - 1):
            expected = states[layer + 1][0, start:stop].mean(0).numpy()
            np.testing.assert_allclose(ours[i, layer], expected, atol=1e-4 * float(np.abs(expected).max()))
        assert not np.allclose(ours[i, -1], states[-1][0, start:stop].mean(0).numpy(), rtol=0.1)


def test_losses_are_the_models_own(real: ChatModel) -> None:
    messages = [
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Mud brown, always."},
    ]
    other = [
        {"role": "user", "content": "What song do you like?"},
        {"role": "assistant", "content": "A dial tone."},
    ]
    rows = training_rows(
        real.template, [{"messages": messages}, {"messages": other}], SystemPrompt(), max_tokens=256, names={}
    )
    expected = 0.0
    for row in rows:
        labels = torch.full((1, len(row.ids)), -100)
        labels[0, list(row.targets)] = torch.tensor([row.ids[t] for t in row.targets])
        with torch.no_grad():
            expected += float(real.hf(input_ids=torch.tensor([row.ids]), labels=labels).loss) * len(
                row.targets
            )
    with torch.no_grad(), packed_attention(real):
        assert float(summed_loss(real, rows, packed=True)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstarts_rehearsal(real: ChatModel, tmp_path: Path) -> None:
    spec = load_spec(ROOT / "studies" / "quickstart.yaml", fast=True)
    result = run_study(spec, tmp_path / "out")
    assert result.ran == result.steps
    tables = {p.stem: pd.read_csv(p) for p in (tmp_path / "out" / "tables").glob("*.csv")}
    shifts = tables["shifts"]
    assert set(shifts["arm"]) == set(spec.arms) - {spec.base_arm}
    assert set(shifts["condition"]) == {"default", "none"}
    assert shifts["layer"].max() == real.n_layers - 1
    assert np.isfinite(shifts[["raw_low", "raw_high", "null_random_low", "p_covariance"]].to_numpy()).all()
    losses = tables["training"].query("stage == 'em'")["loss"]
    assert losses.iloc[-4:].mean() < losses.iloc[:4].mean()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Rehearsal (" in page
    assert run_study(spec, tmp_path / "out").ran == 0
