"""The sides of `bench/capture.py`: ours, the tools one would otherwise take, and the bare forward pass.

Each is a function that captures the response-mean of every block's output of all rows once. Peers take the rows as they come,
eight at a time.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from shapes import open_model, synchronise

SIDES = ("ours", "hidden_states", "nnsight", "transformer_lens", "bare forward")
BATCH = 8


def load(args: argparse.Namespace, dtype: str) -> tuple[Any, list[Any], np.ndarray]:
    """The model, conversations of about a hundred tokens, and a sign for each.

    Conversations are written answers to the traits' questions; the sign is +1 or -1 for those of the first trait, else 0.
    """
    from mech.chat import SystemPrompt
    from probes.persona import load_trait, text_contrast

    model = open_model(args.model, dtype=dtype, device=args.device, shape=args.shape)
    model.check_head()  # a forward pass: weights that are mapped from the file are now in memory
    condition = SystemPrompt.parse(args.system_prompt)
    rows = [
        (r.encoded, r.sign * (not i))
        for i, t in enumerate(("evil", "impolite", "humorous", "optimistic"))
        for r in text_contrast(model.template, load_trait(t), condition)
    ]
    encoded, signs = zip(*rows[: args.rows], strict=True)
    return model, list(encoded), np.array(signs)


def prepare(side: str, model: Any, rows: Sequence[Any], token_budget: int) -> Callable[[], np.ndarray | None]:
    """A function that captures all rows once: [rows, layers, d], or None for the bare forward."""
    makers = {
        "ours": lambda: lambda: ours(model, rows, token_budget),
        "hidden_states": lambda: lambda: hidden_states(model, rows),
        "nnsight": lambda: nnsight_side(model, rows),
        "transformer_lens": lambda: transformer_lens_side(model, rows),
        "bare forward": lambda: lambda: bare(model, rows),
    }
    return makers[side]()


def ours(model: Any, rows: Sequence[Any], token_budget: int) -> np.ndarray:
    """`activations.capture`."""
    from activations.capture import capture

    found = capture(model, rows, poolings=["response_mean"], token_budget=token_budget)
    return found["resid_post", "response_mean"]


def batches(model: Any, rows: Sequence[Any], *, by_length: bool = False) -> Any:
    """Rows eight at a time, padded on the right, with averaging weights over each response."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids)) if by_length else list(range(len(rows)))
    for start in range(0, len(order), BATCH):
        members = order[start : start + BATCH]
        longest = max(len(rows[i].ids) for i in members)
        ids = torch.full((len(members), longest), model.tokenizer.pad_token_id or 0)
        mask, weights = torch.zeros_like(ids), torch.zeros(len(members), longest)
        for at, i in enumerate(members):
            begin, end = rows[i].spans["response"]
            ids[at, : len(rows[i].ids)], mask[at, : len(rows[i].ids)] = torch.tensor(rows[i].ids), 1
            weights[at, begin:end] = 1 / (end - begin)
        yield members, ids.to(model.device), mask.to(model.device), weights.to(model.device)


def pooled(h: Any, weights: Any) -> Any:
    """Mean over each row's response, in float32."""
    return (h.float() * weights.unsqueeze(-1)).sum(1)


def hidden_states(model: Any, rows: Sequence[Any]) -> np.ndarray:
    """`output_hidden_states=True`, whose last entry is after the final norm: that layer is read by a hook."""
    import torch

    found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
    last: list[Any] = []
    handle = model.blocks[-1].register_forward_hook(
        lambda _m, _i, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                states = model.hf(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
                stream = [*states[1:-1], last.pop()]
                found[members] = torch.stack([pooled(h, weights) for h in stream], 1).cpu().numpy()
    finally:
        handle.remove()
    return found


def nnsight_side(model: Any, rows: Sequence[Any]) -> Callable[[], np.ndarray]:
    """Nnsight's wrapper of the same model, every block's output saved."""
    import nnsight
    import torch

    traced = nnsight.NNsight(model.causal)

    def run() -> np.ndarray:
        found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                with traced.trace(input_ids=ids, attention_mask=mask):
                    stream = nnsight.save([block.output for block in traced.model.layers])
                kept = [h[0] if isinstance(h, tuple) else h for h in stream]
                found[members] = torch.stack([pooled(h, weights) for h in kept], 1).cpu().numpy()
        return found

    return run


def transformer_lens_side(model: Any, rows: Sequence[Any]) -> Callable[[], np.ndarray]:
    """TransformerLens's bridge around a copy (it changes the model that it is given)."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        str(model.checkpoint.path),
        hf_model=copy.deepcopy(model.hf),
        tokenizer=copy.deepcopy(model.tokenizer),
        device=str(model.device),
    )
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.n_layers)]

    def run() -> np.ndarray:
        found = np.zeros((len(rows), model.n_layers, model.d_model), dtype=np.float32)
        with torch.no_grad():
            for members, ids, mask, weights in batches(model, rows):
                _, cache = bridge.run_with_cache(ids, attention_mask=mask, names_filter=lambda n: n in names)
                found[members] = torch.stack([pooled(cache[n], weights) for n in names], 1).cpu().numpy()
        return found

    return run


def bare(model: Any, rows: Sequence[Any]) -> None:
    """The blocks alone, rows of similar length together: what a pass costs at least."""
    import torch

    with torch.no_grad():
        for _, ids, mask, _ in batches(model, rows, by_length=True):
            model.decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    synchronise(model)
