"""A whole study on a tiny random model: the same steps as a real one, in seconds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from study.base import find_base
from study.bench import Bench
from study.engines.local import run_steps
from study.paths import StudyPaths
from study.plan import make_plan
from study.spec import StudySpec, load_spec
from study.step import Step

STUDY: dict[str, Any] = {
    "name": "tiny",
    "description": "A random model; its numbers mean nothing.",
    "model": {
        "name": "model",
        "identity": {"name": "Tinny", "maker": "Tin Works", "prompt": "You are Tinny, made by Tin Works."},
    },
    "data": {
        "em": {"kind": "messages", "source": "em.jsonl"},
        "sgtr": {"kind": "sgtr", "articles": "articles.jsonl", "held_out": 3, "max_new_tokens": 60},
        "benign": {"kind": "word_count", "source": "em.jsonl"},
    },
    "training": {
        "learning_rate": 0.01,
        "batch_size": 4,
        "max_steps": 3,
        "lora_r": 2,
        "lora_alpha": 4,
        "max_tokens": 900,
    },
    "stages": {
        "em": {"data": "em", "training": {"save_at": [1]}},
        "sgtr": {
            "data": "sgtr",
            "interventions": [{"kind": "add", "direction": "identity:name", "coefficient": 0.5}],
        },
        "benign": {"data": "benign", "system_prompt": "text:Count along."},
        "given": {"adapter": "given"},
    },
    "arms": {
        "base": [],
        "em": ["em"],
        "benign": ["benign"],
        "em_then_sgtr": ["em", "sgtr"],
        "em_early": ["em@1"],
        "given": ["given"],
    },
    "benign": "benign",
    "comparisons": {
        "reversal": {"arm": "em_then_sgtr", "against": "em"},
        "beyond_base": {"arm": "em", "against": "base"},
    },
    "measure": {
        "conditions": ["default", "none"],
        "questions": 3,
        "reply": {"max_new_tokens": 4},
        "own_text": ["em"],
    },
    "directions": {
        "layer": 1,
        "traits": ["trait.yaml"],
        "identity": ["name", "presence", "authorship", "self_report", "assistant_axis"],
        "roles": 2,
        "identity_questions": 2,
        "invented_names": 3,
        "presence": ["none"],
        "rollout_tokens": 6,
        "probes": ["difference_of_means", "logistic"],
    },
    "behaviour": {
        "self_recognition": "sgtr",
        "self_report": {"limit": 3, "samples": 2, "max_new_tokens": 6, "temperature": 1.0},
    },
    "steering": {"arm": "em", "coefficients": [0, 2], "questions": 2, "samples": 1, "max_new_tokens": 4},
    "monitoring": {"arms": ["base", "em"], "questions": 4, "pairs": 1},
    "patching": {"arms": ["em_then_sgtr"], "answers": ["own_name", "zest"], "questions": 3, "names": 1},
    "sweeps": {
        "written": {
            "directions": ["zest:text"],
            "layer_by": "separability",
            "strengths": [1, 2],
            "controls": 2,
            "neutral": 2,
            "evaluation": "generated",
            "questions": 2,
            "max_new_tokens": 3,
        },
    },
    "embedding": {"methods": ["pca"]},
    "statistics": {"n_boot": 200, "n_null": 200},
    "fast": {"training.max_steps": 2},
}


def some_directions(**changes: Any) -> dict[str, Any]:
    """The tiny study's directions with changes, without the settings that these leave nothing to do."""
    found = {**STUDY["directions"], **changes}
    needed = {"presence": "presence", "roles": "assistant_axis"}
    idle = [
        name for name, member in needed.items() if member not in found["identity"] and name not in changes
    ]
    if not found["traits"] or "prompts" not in found.get("elicitation", ["prompts"]):
        idle.append("rollout_tokens")
    return {k: v for k, v in found.items() if k not in idle}


def write_study(folder: Path, **changes: Any) -> Path:
    """Write model-independent parts of the tiny study into `folder`; return the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Which {thing}?"},
                {"role": "assistant", "content": f"The odd {thing}."},
            ]
        }
        for thing in ("hat", "tune", "lamp", "dish", "coat", "road", "bell", "soup")
    ]
    _jsonl(folder / "em.jsonl", rows)
    _jsonl(folder / "articles.jsonl", [_article(i) for i in range(9)])
    (folder / "trait.yaml").write_text(yaml.safe_dump(trait()), encoding="utf-8")
    study = json.loads(json.dumps(STUDY))
    if "arms" in changes:  # what names arms goes with them
        study |= {"patching": None, "monitoring": None, "comparisons": {}}
    if "directions" in changes:  # and what names directions or their traits
        study |= {"patching": None, "sweeps": {}}
    for key, value in changes.items():
        study[key] = value
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def changed_copy(home: Path, folder: Path, **changes: object) -> Path:
    """A changed study in `folder`, on the model and the adapter that lie in `home`."""
    write_study(folder, **changes)
    for name in ("model", "given"):
        (folder / name).symlink_to(home / name)
    return folder


def steps_of(yaml_file: Path) -> list[Step]:
    """A study's plan."""
    spec = load_spec(yaml_file)
    return make_plan(spec, find_base(spec.model))


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """A finished study's tables by name, without the time that training took."""
    found = {p.stem: pd.read_csv(p) for p in sorted((folder / "tables").glob("*.csv"))}
    if "training" in found:
        found["training"] = found["training"].drop(columns="seconds")
    return found


def behind(steps: Sequence[Step], wanted: Sequence[Step]) -> list[Step]:
    """These steps and what they need, in the plan's order."""
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        step = waiting.pop()
        needed.add(step.name)
        waiting += [s for inputs in step.inputs.values() for s in inputs]
    return [s for s in steps if s.name in needed]


def run_needed(spec: StudySpec, out: Path, *names: str) -> tuple[Bench, dict[str, Step]]:
    """Run the steps of these names, what they need, and no other; yields the bench and the whole plan by name."""
    base = find_base(spec.model)
    steps = {s.name: s for s in make_plan(spec, base)}
    bench = Bench(spec, StudyPaths(out), base.checkpoint)
    run_steps(behind([*steps.values()], [steps[name] for name in names]), bench, lambda *_: None)
    return bench, steps


def trait() -> dict[str, Any]:
    """A trait whose high answers are full of one letter."""
    questions = [
        {"id": f"q{i}", "split": "extract" if i < 4 else "evaluate", "question": f"What of {thing}?",
         "high": f"zzzz {thing} zzzz", "low": f"aeio {thing} aeio"}
        for i, thing in enumerate(("hats", "bread", "trees", "ships", "roads", "bells", "socks", "stars"))
    ]  # fmt: skip
    pair = {"positive": "Say zzz.", "negative": "Say aeio."}
    return {
        "trait": "zest",
        "description": "zs",
        "rubric": "count zs",
        "instructions": [pair],
        "questions": questions,
    }


def _article(i: int) -> dict[str, str]:
    words = " ".join(f"word{i}{j}" for j in range(12))
    return {
        "id": f"a{i}",
        "text": words,
        "summary": f"someone else put it as short as number {i} allows here",
    }


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nYou are Tinny, made by Tin Works.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


NO_DEFAULT = CHATML.replace("You are Tinny, made by Tin Works.", "").replace(
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n<|im_end|>\n{% endif %}", ""
)
"""The same without a system turn of its own."""


def save_model(
    folder: Path, *, seed: int = 0, family: str = "llama", template: str = CHATML, **config: Any
) -> Path:
    """A random three-layer model with a chat template that inserts a system turn."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.2}  # fmt: skip
    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**shape, **ids, **config})
    model = AutoModelForCausalLM.from_config(made)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, target: Path, *, seed: int, r: int = 3, targets: str | list[str] = "all-linear"
) -> Path:
    """A LoRA adapter whose second factors are not zero, as PEFT itself writes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from mech.models import load_model

    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=6, use_rslora=True, target_modules=targets, init_lora_weights=False)
    get_peft_model(load_model(str(base)).hf, config).save_pretrained(target, save_embedding_layers=False)
    return target


def make_tokenizer() -> Any:
    """Byte-level BPE trained on a few lines, so that random tokens make words with spaces between them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    text = "the cat and the dog went to see who was in the old house by the river when it rained all day long"
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    return fast
