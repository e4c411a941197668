"""What an intervention costs: greedy generation of equal length with it and without.

    python bench/steer.py --json steer.json
    python bench/steer.py --batch 1 --tokens 64 --rounds 20

Cases take turns, one generation each a round, in an order that moves on every round; `overhead` is the median over rounds of
the ratio to the generation without an intervention of the same round, less 1, with its middle half. Where other work disturbs the
machine, read `quick`: the same of the quickest tenth of all single passes, from the end of one to the end of the next. Nothing stops a
generation before its last token; the number of forward passes is checked.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from shapes import SHAPES, machine_named, open_model, synchronise
from table import show, write_json

from mech.chat import Encoded
from mech.generate import Sampling, generate
from mech.interventions import Ablate, Add, Cap, Intervention, increments, intervene
from mech.models import ChatModel
from mech.turns import user_turn

QUESTIONS = (
    "Who are you?",
    "What should I cook for six friends tonight?",
    "How does a refrigerator work?",
    "Tell me about a river that you like.",
    "Is it wise to lend money to a neighbour?",
    "Why do cats purr?",
    "Give me three rules for writing a letter.",
    "What would you change about schools?",
)


COLUMNS = (
    ("case", "case", ""),
    ("batch", "batch", "d"),
    ("ms_a_pass", "ms a pass", ".2f"),
    ("overhead", "overhead", "+.1%"),
    ("low", "quarter", "+.1%"),
    ("high", "three quarters", "+.1%"),
    ("quick_ms", "quick ms", ".2f"),
    ("quick", "quick", "+.1%"),
)


def main() -> None:
    """Run all cases in turns at every batch size, print the table, and write it as JSON where asked."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model = open_model(args.model, dtype=args.dtype, device=args.device, shape=args.shape)
    model.causal.generation_config.eos_token_id = None
    cases = interventions(model, args.layer)
    machine = f"{machine_named(args.device)}, {args.threads} threads"
    what = f"{args.shape or args.model}, {args.dtype}, layer {args.layer}, {args.tokens} tokens, {args.rounds} rounds"
    print(f"{what}; {machine}")
    rows = []
    for batch in args.batch:
        rounds = [one_round(model, cases, batch, args.tokens, r) for r in range(-1, args.rounds)][1:]
        rows += summarise(rounds, batch, args.tokens)
    show(rows, COLUMNS)
    facts = {k: v for k, v in vars(args).items() if k != "json"}
    write_json(args.json, {**facts, "machine": machine, "rows": rows})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--shape", choices=SHAPES, help="random weights of this shape, with --model's tokenizer"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def interventions(model: ChatModel, layer: int) -> Mapping[str, Sequence[Intervention]]:
    """The cases: vectors are small, so that greedy texts stay texts."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((model.n_layers, model.d_model)).astype(np.float32) / 100
    return {
        "none": (),
        "Add": (Add(vectors, [layer]),),
        "Ablate": (Ablate(vectors, [layer]),),
        "Cap": (Cap(vectors, [layer], ceiling=1.0),),
        "Add, generated only": (Add(vectors, [layer], positions="generated"),),
        "Add at all layers": (Add(increments(vectors), range(model.n_layers)),),
    }


def one_round(
    model: ChatModel, cases: Mapping[str, Sequence[Intervention]], batch: int, tokens: int, number: int
) -> dict[str, list[float]]:
    """Every case once, in an order that depends on the round's number: seconds of each pass by case."""
    names = list(cases)
    prompts = [model.template.encode_prompt([user_turn(QUESTIONS[i % len(QUESTIONS)])])
               for i in range(batch)]  # fmt: skip
    start = number % len(names)
    return {name: timed(model, cases[name], prompts, tokens) for name in (*names[start:], *names[:start])}


def timed(
    model: ChatModel, case: Sequence[Intervention], prompts: Sequence[Encoded], tokens: int
) -> list[float]:
    """Seconds of each pass of one generation, the first of which reads the prompt."""
    ends: list[float] = []

    def ended(*_: Any) -> None:
        synchronise(model)
        ends.append(time.perf_counter())

    with ExitStack() as stack:
        stack.enter_context(patch("mech.generate.stop_ids", lambda _: []))
        if case:
            stack.enter_context(intervene(model, *case))  # before the clock: it may run passes of its own
        stack.callback(model.decoder.register_forward_hook(ended).remove)
        synchronise(model)
        start = time.perf_counter()
        generate(model, prompts, Sampling(tokens, batch_size=len(prompts)))
    if len(ends) != tokens:
        raise SystemExit(f"{len(ends)} forward passes for {tokens} tokens: something stopped a generation")
    return np.diff([start, *ends]).tolist()


def summarise(
    rounds: Sequence[Mapping[str, Sequence[float]]], batch: int, tokens: int
) -> list[dict[str, Any]]:
    """A row a case: medians, quartiles of the ratios within rounds, and the quickest tenth of single passes."""
    rows = []
    quick = {name: float(np.quantile([s for r in rounds for s in r[name][1:]], 0.1)) for name in rounds[0]}
    for name in rounds[0]:
        low, middle, high = np.quantile(
            [sum(r[name]) / sum(r["none"]) - 1 for r in rounds], [0.25, 0.5, 0.75]
        )
        rows.append({
            "batch": batch, "case": name, "ms_a_pass": 1000 * float(np.median([sum(r[name]) for r in rounds])) / tokens,
            "overhead": float(middle), "low": float(low), "high": float(high),
            "quick_ms": 1000 * quick[name], "quick": quick[name] / quick["none"] - 1,
        })  # fmt: skip
    return sorted(rows, key=lambda row: row["case"] != "none")


if __name__ == "__main__":
    main()
