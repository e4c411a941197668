"""How fast a LoRA run trains, beside `transformers.Trainer` with PEFT at equal settings.

    python bench/train.py --json train.json
    python bench/train.py --data rows.jsonl --system-prompt none

Both train the same model on the same batches in the same order, from the same initial adapter, in a process of their
own, so that peak memory is each one's, and take turns step by step, the other one waiting. The speed ratio is the median over steps of
the peer's seconds to ours for the same batch: a machine that is slow for a minute is slow for both. Losses are compared step by step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES, forget_peak, machine_named, megabytes, open_model
from table import show, write_json

SIDES = ("ours", "trainer")
TURN, RESULT = "my turn is over", "my result: "  # what a side writes between whatever its library prints
COLUMNS = (
    ("side", "side", ""),
    ("tokens_per_s", "tokens/s", ".0f"),
    ("mb_above_model", "peak above model, MB", ".0f"),
    ("step_s", "s a step", ".2f"),
)


def main() -> None:
    """Run both sides in turns, print the table, and write it as JSON where asked."""
    args = arguments()
    if args.side:
        print(f"{RESULT}{json.dumps(one_side(args))}")
        return
    rounds = [one_round(args) for _ in range(args.rounds)]
    rows = summarise(rounds)
    worst = max(
        abs(a - b) for r in rounds for a, b in zip(r["ours"]["losses"], r["trainer"]["losses"], strict=True)
    )
    machine = machine_named(args.device, "peft")
    what = f"{args.shape or args.model}, {args.data}, {args.system_prompt}, batch {args.batch}, {args.steps} steps, {args.dtype}"
    print(f"{what}; {machine}")
    show([{"side": side, **rows[side]} for side in SIDES], COLUMNS)
    steps = f"{rows['slowest_ratio']:.2f} to {rows['quickest_ratio']:.2f} over steps"
    print(f"speed {rows['speed_ratio']:.2f} x ({steps}), memory {rows['memory_ratio']:.2f} x")
    print(f"largest difference of a loss {worst:.1e}")
    facts = {k: v for k, v in vars(args).items() if k not in ("json", "side")}
    found = {"machine": machine, **rows, "worst_loss_difference": worst, "rounds": rounds}
    write_json(args.json, {**facts, **found})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, with --model's tokenizer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="builtin:em_aesthetics")
    parser.add_argument(
        "--system-prompt", default="default", help="`none` leaves rows without a shared prefix"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def one_round(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in fresh processes, a step of one and then the same step of the other."""
    sides = {side: start_side(args, side) for side in SIDES}
    for side, process in sides.items():
        until_waiting(side, process)
    found: dict[str, Any] = {}
    while len(found) < len(SIDES):
        for side, process in [pair for pair in sides.items() if pair[0] not in found]:
            print("go", file=process.stdin, flush=True)
            if (last := until_waiting(side, process)) != TURN:
                found[side] = json.loads(last.removeprefix(RESULT))
    return found


def start_side(args: argparse.Namespace, side: str) -> "subprocess.Popen[str]":
    """One side, which waits for its turn before each step."""
    own = ("json", "side", "gradient_checkpointing")
    given = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if k not in own and v is not None]
    given += ["--gradient-checkpointing"] * args.gradient_checkpointing
    command = [sys.executable, __file__, *given, f"--side={side}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def until_waiting(side: str, process: "subprocess.Popen[str]") -> str:
    """Read what a side writes until it waits, or has ended: `TURN`, or its result."""
    for line in process.stdout or ():
        if line.strip() == TURN or line.startswith(RESULT):
            return line.strip()
    raise SystemExit(f"{side} failed, see above")


def wait_for_turn() -> None:
    """In a side's process: say that a step is done, and wait until the other has done its own."""
    print(TURN, flush=True)
    sys.stdin.readline()


def one_side(args: argparse.Namespace) -> dict[str, Any]:
    """Train in this process; speed without the first step, which warms caches up."""
    from finetune.datasets.build import checked_messages
    from finetune.labels import training_rows
    from finetune.settings import make_settings
    from mech.chat import SystemPrompt

    settings = make_settings({
        "preset": "small-135m", "batch_size": args.batch, "max_steps": args.steps, "dtype": args.dtype,
        "gradient_checkpointing": args.gradient_checkpointing,
    })  # fmt: skip
    model = open_model(args.model, dtype=args.dtype, device=args.device, shape=args.shape)
    rows = training_rows(
        model.template,
        checked_messages(args.data)[: args.batch * args.steps],
        SystemPrompt.parse(args.system_prompt),
        max_tokens=settings.max_tokens,
        names={},
    )
    batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)][: args.steps]
    model.check_head()  # a forward pass: weights that are mapped from the file are now in memory
    forget_peak(args.device)
    loaded, _ = megabytes(args.device)
    train = train_ours if args.side == "ours" else train_peer
    with tempfile.TemporaryDirectory() as folder:
        losses, seconds = train(model, batches, settings, Path(folder))
    tokens = [sum(len(r.ids) for r in b) for b in batches]
    return {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]),
        "step_s": median(seconds[1:]),
        "mb_above_model": megabytes(args.device)[1] - loaded,
    }


def train_ours(
    model: Any, batches: Sequence[Any], settings: Any, folder: Path
) -> tuple[list[float], list[float]]:
    """`finetune.lora.train_lora`, told to take the batches as they are."""
    from unittest.mock import patch

    from finetune.lora import train_lora

    rows = [row for batch in batches for row in batch]
    size = len(batches[0])
    order = [list(range(i, min(i + size, len(rows)))) for i in range(0, len(rows), size)]
    with patch("finetune.loop._batches", lambda *_: iter(order)):
        wait_for_turn()
        records = train_lora(
            model, rows, settings, folder / "ours", seed=0, on_step=lambda _: wait_for_turn()
        )
    return [r.loss for r in records], [r.seconds for r in records]


def train_peer(
    model: Any, batches: Sequence[Any], settings: Any, folder: Path
) -> tuple[list[float], list[float]]:
    """`transformers.Trainer` on a PEFT model: the same rows, padded, labels masked, the model's own loss."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Waits for its turn, and notes the time at each step's beginning and end."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    class InOrder(Trainer):  # type: ignore[misc]
        """Takes the rows as they come."""

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(r.ids) for r in rows)
        ids = torch.full((len(rows), longest), model.tokenizer.pad_token_id or 0)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)], mask[i, : len(row.ids)] = torch.tensor(row.ids), 1
            labels[i, list(row.targets)] = ids[i, list(row.targets)]
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    torch.manual_seed(0)
    adapted = get_peft_model(
        model.hf,
        LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, use_rslora=settings.rslora,
                   target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"),
    )  # fmt: skip
    clock = Clock()
    training = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, max_steps=len(batches), lr_scheduler_type="linear",
        optim="adamw_torch", max_grad_norm=settings.max_grad_norm, logging_steps=1, save_strategy="no", report_to=[],
        disable_tqdm=True, remove_unused_columns=False, use_cpu=model.device.type == "cpu", seed=0,
        gradient_checkpointing=settings.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    rows = [row for batch in batches for row in batch]
    peer = InOrder(model=adapted, args=training, train_dataset=rows, data_collator=collate, callbacks=[clock])
    peer.train()
    return [entry["loss"] for entry in peer.state.log_history if "loss" in entry], clock.seconds


def summarise(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each side, and of the ratios within steps; the first step, which warms caches up, left out."""
    fields = ("tokens_per_s", "mb_above_model", "step_s")
    table: dict[str, Any] = {s: {f: median(r[s][f] for r in rounds) for f in fields} for s in SIDES}
    ratios = [
        theirs / own
        for r in rounds
        for own, theirs in zip(r["ours"]["seconds"][1:], r["trainer"]["seconds"][1:], strict=True)
    ]
    table["speed_ratio"], table["slowest_ratio"], table["quickest_ratio"] = (
        median(ratios),
        min(ratios),
        max(ratios),
    )
    table["memory_ratio"] = median(
        r["ours"]["mb_above_model"] / r["trainer"]["mb_above_model"] for r in rounds
    )
    return table


if __name__ == "__main__":
    main()
