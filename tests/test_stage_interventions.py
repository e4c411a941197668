"""A study's stage under several things at once: a span ablated while it trains, an inoculation prompt, an early snapshot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune.settings import make_settings
from finetune.stages import run_stage
from mech.chat import SystemPrompt
from mech.errors import InputError
from mech.interventions import Ablate
from probes.direction import Direction
from study.spec import load_spec
from tests.tiny_study import STUDY, changed_copy, run_needed, some_directions, steps_of

BOTH = ["zest:text", "identity:name"]
TRAINED, EARLY = "train/em/seed0", "snapshot/em@1/seed0"


def write(home: Path, folder: Path, *interventions: dict[str, Any]) -> Path:
    """The tiny study, its stage `em` under a prompt and these interventions."""
    stages = {
        "em": {
            "data": "em",
            "system_prompt": "text:You like odd things.",
            "training": {"save_at": [1]},
            "interventions": list(interventions),
        }
    }
    small: dict[str, Any] = dict.fromkeys(("steering", "monitoring", "benign"))
    arms = {"base": [], "em": ["em"], "em_early": ["em@1"]}
    changed_copy(
        home, folder, stages=stages, arms=arms, data={"em": STUDY["data"]["em"]}, behaviour={}, measure={},
        directions=some_directions(identity=["name"]), **small,
    )  # fmt: skip
    return folder / "study.yaml"


def test_a_span_is_ablated_under_an_inoculation_prompt_with_a_snapshot(home: Path, tmp_path: Path) -> None:
    """The same losses as of a training that is given numpy's orthonormal vectors."""
    study = write(home, tmp_path / "s", {"kind": "ablate", "direction": BOTH, "layers": [0, 2]})
    bench, steps = run_needed(load_spec(study), tmp_path / "out", TRAINED, EARLY)
    folder = bench.folder(steps[TRAINED])
    about = json.loads((folder / "trainer_state.json").read_text())
    assert [i["kind"] for i in about["interventions"]] == ["Ablate", "Ablate"]
    assert "You like odd things." in json.dumps(about)
    assert (bench.folder(steps[EARLY]) / "adapter_model.safetensors").is_file()

    vectors = np.stack(
        [
            Direction.load(bench.folder(s) / "direction.safetensors").vectors
            for s in steps[TRAINED].inputs["directions"]
        ],
        -1,
    )
    q = np.linalg.qr(vectors)[0]
    settings = make_settings(STUDY["training"], {"save_at": [1]})
    data = bench.folder(steps[TRAINED].inputs["data"][0]) / "train.jsonl"
    condition = SystemPrompt.parse("text:You like odd things.")
    peer = [Ablate(q[..., k], [0, 2]) for k in range(2)]
    given = {"seed": 0, "condition": condition, "interventions": peer}
    run_stage(str(home / "model"), data, settings, tmp_path / "peer", **given)
    run_stage(str(home / "model"), data, settings, tmp_path / "free", seed=0, condition=condition)
    losses = [
        [json.loads(line)["loss"] for line in (f / "loss.jsonl").read_text().splitlines()]
        for f in (folder, tmp_path / "peer", tmp_path / "free")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert abs(losses[0][0] - losses[2][0]) > 1e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "add", "direction": BOTH, "coefficient": 1.0}, "a list of them belongs to kind: ablate"),
        ({"kind": "ablate", "direction": []}, "name at least one"),
        (
            {"kind": "ablate", "direction": 3},
            r"interventions\[0\].direction: must be text, not 3; or must be a list, as in \[a, b\], not 3$",
        ),
        ({"kind": "ablate", "direction": [BOTH[0], 3]}, r"direction\[1\]: must be text, not 3$"),
        ({"kind": "ablate", "direction": [BOTH[0], BOTH[0]]}, "name each once"),
        ({"kind": "ablate", "direction": [BOTH[0], "evil"]}, "'evil' is not among the study's directions"),
    ],
)
def test_a_list_that_means_nothing_is_refused(
    given: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        steps_of(write(home, tmp_path / "s", given))
