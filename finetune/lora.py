"""One LoRA finetuning run: a checkpoint and a dataset in, an adapter in PEFT's layout out.

The usual recipe, made faster without changing a loss: logits are computed at labelled positions only, and
the tokens that all rows of a batch begin with (the system turn) are run once, with gradient.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from finetune.labels import TrainingRow
from mech.batching import MIN_SHARED, common_prefix
from mech.checkpoint import write_parent
from mech.errors import GuardError, InputError
from mech.files import write_json, write_text
from mech.forward import can_share_prefix, pad_id, pad_right, run_prefix, run_rests
from mech.models import ChatModel
from mech.progress import track
from mech.quiet import quiet_peft

log = logging.getLogger(__name__)


class TrainSettings(BaseModel):
    """How a stage is trained. The defaults are the paper's for its 32B and 36B models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lora_r: int = Field(32, ge=1)
    """Rank."""
    lora_alpha: float = Field(64, gt=0)
    """Scale: alpha / sqrt(r) under rsLoRA, alpha / r without."""
    rslora: bool = True
    """Rank-stabilised scale."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Which linear maps get an adapter; `all-linear` is all but the output head."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of AdamW."""
    warmup_steps: int = Field(5, ge=0)
    """Steps of linear warm-up from zero; then linear decay to zero (transformers' `linear` schedule)."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    batch_size: int = Field(16, ge=1)
    """Rows an optimizer step."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows a forward pass; the whole batch when left out. Gradients add up to the same step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many steps, if sooner."""
    max_tokens: int = Field(2048, ge=8)
    """The longest row."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights; adapters and optimizer are float32 in either case."""

    def n_steps(self, n_rows: int) -> int:
        """Optimizer steps on a dataset of this size."""
        steps = max(1, int(np.ceil(n_rows * self.epochs / self.batch_size)))
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step did."""

    step: int
    loss: float
    """Mean negative log-likelihood (nats) over the step's labelled tokens, before the update."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Labelled and unlabelled tokens of the rows, padding not counted."""
    seconds: float


def train_lora(
    model: ChatModel,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    folder: Path,
    *,
    seed: int,
    on_step: Callable[[StepRecord], None] | None = None,
) -> list[StepRecord]:
    """Train an adapter on `model` (its adapters merged) and write it to `folder`.

    The model's own modules are left as they were: the adapter is taken off again, also after an error.

    Args:
        model: what to train on; `model.checkpoint` is recorded as the adapter's parent.
        rows: encoded training rows.
        settings: the recipe.
        folder: gets `adapter_model.safetensors`, `adapter_config.json`, `checkpoint.json`, `loss.jsonl`.
        seed: fixes initialisation, order and dropout.
        on_step: called after every step.

    Raises:
        InputError: no rows, or a model that has a live adapter already.
        GuardError: the loss is not finite, or the adapter did not change.
    """
    if not rows:
        raise InputError("no rows to train on")
    if hasattr(model.hf, "peft_config"):
        raise InputError(
            "the model has a live adapter: load it with merge=True before training another on it"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft_model = _add_adapter(model, settings)
        try:
            records = list(_steps(model, peft_model, rows, settings, seed, on_step))
            _check_learnt(peft_model)
            _save(peft_model, model, records, folder)
        finally:
            peft_model.unload()
            model.hf.eval()
            model.hf.requires_grad_(requires_grad=False)
    return records


def _add_adapter(model: ChatModel, settings: TrainSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with quiet_peft():
            return get_peft_model(model.hf, config)
    except ValueError as error:
        raise InputError(f"target_modules {targets}: {error}") from error


def _steps(
    model: ChatModel,
    peft_model: Any,
    rows: Sequence[TrainingRow],
    settings: TrainSettings,
    seed: int,
    on_step: Callable[[StepRecord], None] | None,
) -> Iterator[StepRecord]:
    from transformers import get_linear_schedule_with_warmup

    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    n_steps = settings.n_steps(len(rows))
    schedule = get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, n_steps)
    share = settings.lora_dropout == 0 and can_share_prefix(model)
    peft_model.train()
    batches = _batches(len(rows), settings.batch_size, n_steps, seed)
    for step, members in enumerate(track(batches, "training", n_steps), 1):
        start, rate = time.perf_counter(), float(schedule.get_last_lr()[0])
        batch = [rows[i] for i in members]
        loss = _accumulate(model, batch, settings.micro_batch or len(batch), share=share)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise GuardError(f"step {step}: loss {loss}, gradient norm {norm}: lower learning_rate")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        record = StepRecord(
            step, loss, rate, norm, sum(len(r.ids) for r in batch), time.perf_counter() - start
        )
        if on_step:
            on_step(record)
        yield record


def _batches(n_rows: int, size: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """Row numbers for each step: a fresh permutation every pass over the data."""
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    for _ in range(n_steps):
        while len(queue) < size:
            queue += rng.permutation(n_rows).tolist()
        yield queue[:size]
        queue = queue[size:]


def _accumulate(model: ChatModel, batch: list[TrainingRow], size: int, *, share: bool) -> float:
    """Backward passes over micro-batches of similar length; the mean loss over all labelled tokens."""
    n_targets = sum(len(r.targets) for r in batch)
    ordered = sorted(batch, key=lambda r: len(r.ids))
    total = 0.0
    for start in range(0, len(ordered), size):
        loss = summed_loss(model, ordered[start : start + size], share=share)
        (loss / n_targets).backward()
        total += float(loss.detach())
    return total / n_targets


def summed_loss(model: ChatModel, batch: Sequence[TrainingRow], *, share: bool) -> Float[Tensor, ""]:
    """Negative log-likelihood (nats), summed over the labelled tokens of a batch, with gradient."""
    shared = _shareable(batch) if share else 0
    prefix = run_prefix(model, batch[0].ids[:shared]) if shared else None
    ids = pad_right([r.ids[shared:] for r in batch], pad_id(model), model.device)
    hidden = run_rests(model, ids, prefix)
    at = [(i, t - 1 - shared) for i, r in enumerate(batch) for t in r.targets]
    chosen = hidden[torch.tensor([i for i, _ in at]), torch.tensor([t for _, t in at])]
    targets = torch.tensor([r.ids[t] for r in batch for t in r.targets], device=chosen.device)
    logits = model.logits(chosen).float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def _shareable(batch: Sequence[TrainingRow]) -> int:
    """Length of the shared prefix that leaves every token before a label in the rows' own parts."""
    length = min(common_prefix([r.ids for r in batch]), min(r.targets[0] for r in batch) - 1)
    return length if len(batch) > 1 and length >= MIN_SHARED else 0


def _check_learnt(peft_model: Any) -> None:
    """LoRA's second factors start at zero: all still zero means that nothing was learnt."""
    moved = any(bool(p.detach().any()) for name, p in peft_model.named_parameters() if "lora_B" in name)
    if not moved:
        raise GuardError("training left every adapter at zero: no gradient reached it")


def _save(peft_model: Any, model: ChatModel, records: Sequence[StepRecord], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    peft_model.peft_config["default"].base_model_name_or_path = str(model.checkpoint.base)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card says nothing here
    write_parent(folder, model.checkpoint)
    write_text(folder / "loss.jsonl", "".join(json.dumps(vars(r)) + "\n" for r in records))
    write_json(folder / "training.json", {"steps": len(records), "final_loss": records[-1].loss})
