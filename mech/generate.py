"""Batched generation whose samples do not depend on how rows were batched.

Hugging Face's `generate` does the work. Sampling is a race of exponential times, which is exactly sampling from the
softmax; each row has its own generator, seeded by the caller's seed and the row's number, so batch size and order change
nothing but rounding. What all prompts of a batch begin with is read once where `mech.prefix` allows it.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count, groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech.chat import Encoded
from mech.errors import InputError
from mech.files import digest_of
from mech.interventions import intervening
from mech.journal import open_journal
from mech.kernels import attention_for_any_shape
from mech.lengths import turning_point, within_positions
from mech.models import ChatModel
from mech.modes import evaluating
from mech.positions import Mask, declared
from mech.prefix import read_once, shared_start
from mech.products import fast_products
from mech.progress import track

SAMPLER = 2
"""Version of what a seed draws, for journals of samples: raise it where a seed comes to draw something else."""


@dataclass(frozen=True)
class Sampling:
    """How to decode."""

    max_new_tokens: int = 64
    """The longest answer, in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seed of the samples; row i draws from a generator of (seed, i)."""
    batch_size: int = 32
    """Rows decoded together; changes the speed, not the samples."""


_SHAPING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "repetition_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "min_length", "min_new_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty", "guidance_scale",
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "watermarking_config", "stop_strings", "max_time",
)  # fmt: skip
"""What a model's `generation_config.json` may ask for and is ignored here, because samples are to be from the softmax itself. Some of it would
also make an answer depend on its batch: Qwen2.5's repetition penalty counts padding as text that was said."""


@torch.no_grad()
def generate(
    model: ChatModel,
    prompts: Sequence[Encoded],
    sampling: Sampling | None = None,
    *,
    label: str = "generating",
    journal: Path | None = None,
) -> list[str]:
    """The model's answer to each prompt, in the prompts' order, without special tokens.

    Args:
        model: who answers.
        prompts: encoded prompts; of each, the tokens before its response are read.
        sampling: how to decode; greedy when left out.
        label: text of the progress bar.
        journal: a file to which each finished batch is written, so that it is not answered again after a kill. Batches are cut as in an
            undisturbed run, so the answers are the same. The caller removes the file once it has saved the answers
            (`mech.journal.kept_until_done`).

    Raises:
        InputError: a temperature that is negative or not finite, no room for a single token, rows beyond the model's positions, a journal
            of other work, or a journal under an intervention (it records none, so its answers could be taken for the unsteered model's).
    """
    sampling = sampling or Sampling()
    if not 0 <= sampling.temperature < math.inf or sampling.max_new_tokens < 1:
        raise InputError(
            f"cannot sample with {sampling}: a finite temperature >= 0 and max_new_tokens >= 1 are needed"
        )
    if journal and intervening():
        raise InputError(f"{journal}: a journal does not know what acts on the model: generate without one")
    asked = [p.ids[: p.n_prompt] for p in prompts]
    kept = open_journal(journal, _about(model, asked, sampling)) if journal else nullcontext()
    with kept as saved, evaluating(model.hf), fast_products(model.hf), attention_for_any_shape():
        answers = {int(row): text for row, text in saved.done.items()} if saved else {}
        batches = _batches(model, [*map(len, asked)], sampling)
        for rows in track([b for b in batches if not answers.keys() >= set(b)], label):
            here = [asked[i] for i in rows]
            with within_positions(model, max(map(len, here)) + sampling.max_new_tokens):
                said = dict(zip(rows, _generate_batch(model, here, rows, sampling), strict=True))
            if saved:
                saved.add({str(row): text for row, text in said.items()})
            answers.update(said)
    return [answers[i] for i in range(len(prompts))]


def _about(model: ChatModel, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> dict[str, Any]:
    """All that determines the answers, for their journal."""
    return {
        "checkpoint": model.checkpoint.key,
        "dtype": str(model.dtype),
        "prompts": digest_of(prompts),
        "sampler": SAMPLER,
        **asdict(sampling),
    }


def _batches(model: ChatModel, lengths: Sequence[int], sampling: Sampling) -> list[list[int]]:
    """Rows decoded together, long ones first."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    how = answered_together(model) if len(order) > 1 else "any"
    size, longest = 1 if how == "none" else sampling.batch_size, max(lengths, default=0)
    turn = turning_point(model, longest + sampling.max_new_tokens)

    def length(i: int) -> int:
        """The length that a prompt's batch must have throughout; 0: it may share a batch with prompts of other lengths."""
        turns = turn is not None and lengths[i] + sampling.max_new_tokens > turn
        return lengths[i] if turns or how == "equal" else 0

    together = [list(rows) for _, rows in groupby(order, key=length)]
    return [rows[start : start + size] for rows in together for start in range(0, len(rows), size)]


def answered_together(model: ChatModel) -> Literal["any", "equal", "none"]:
    """Which prompts a model answers in a batch as it answers each alone: any, those of equal length, none. Found out by trying, once a model.

    MiniMax's state takes up padding, and a batch of RWKV's mixes its rows.
    """
    if "_answered_together" not in vars(model):
        vars(model)["_answered_together"] = _found_together(model)  # beside the model's own cached properties
    found: Literal["any", "equal", "none"] = vars(model)["_answered_together"]
    return found


@torch.no_grad()
def _found_together(model: ChatModel) -> Literal["any", "equal", "none"]:
    size = model.causal.config.get_text_config().vocab_size
    row, longer, equal = (tuple(t % size for t in range(a, b)) for a, b in ((21, 25), (7, 16), (7, 11)))
    alone = _probe(model, [row])
    if _say_the_same(model, alone, _probe(model, [row, longer])):
        return "any"
    return "equal" if _say_the_same(model, alone, _probe(model, [row, equal])) else "none"


def _probe(model: ChatModel, rows: list[tuple[int, ...]]) -> Any:
    """Three tokens of an answer, with their logits."""
    ids, mask = _pad_left(rows, 0, model.device, 0)
    with declared({}):  # no token has a position, so an active intervention does not act on this pass
        return _decode(model, ids, mask, 3, stops=[], pad=0, output_logits=True, return_dict_in_generate=True)


def _say_the_same(model: ChatModel, alone: Any, batch: Any) -> bool:
    """Whether a batch's first row gets the logits that it gets alone, up to where the two draw different tokens."""
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    for step, (one, other) in enumerate(zip(alone.logits, batch.logits, strict=True), -3):
        if not (one[0] - other[0]).abs().max() <= tolerance * one[0].abs().max():
            return False
        if alone.sequences[0, step] != batch.sequences[0, step]:
            return True  # a tie up to rounding: from here on the two continue different texts
    return True


def stop_ids(model: ChatModel) -> list[int]:
    """Ids that end a turn: the model's own, and the first token that its template puts behind an answer."""
    config = model.causal.generation_config.eos_token_id
    ids = set(config if isinstance(config, list) else [config] if config is not None else [])
    closing = model.template.ids(model.template.closing)
    # A token that was added to the vocabulary marks the end; a piece of text (of a template that closes with a blank line) does not.
    markers = set(model.tokenizer.all_special_ids) | set(model.tokenizer.get_added_vocab().values())
    if closing and closing[0] in markers and model.tokenizer.decode(closing[:1]).strip():
        ids.add(closing[0])
    return sorted(ids)


def _generate_batch(
    model: ChatModel, prompts: list[tuple[int, ...]], rows: list[int], sampling: Sampling
) -> list[str]:
    stops = stop_ids(model)
    pad = stops[0] if stops else 0
    shared = shared_start(model, prompts)
    ids, mask = _pad_left(prompts, pad, model.device, shared)
    race = [_Race(sampling, rows)] if sampling.temperature > 0 else []
    read = {"past_key_values": read_once(model, prompts, shared)} if shared else {}
    with _declaring(model, mask, rows):
        n = sampling.max_new_tokens
        out = _decode(model, ids, mask, n, stops=stops, pad=pad, logits_processor=race, **read)
    return [_text(model, answer, set(stops)) for answer in out[:, ids.shape[1] :].tolist()]


def _decode(
    model: ChatModel,
    ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    n: int,
    *,
    stops: list[int],
    pad: int,
    **more: Any,
) -> Any:
    """Hugging Face's `generate`, without anything that a model's own settings would do to its logits."""
    return model.causal.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=n,
        do_sample=False,
        num_beams=1,
        **dict.fromkeys(_SHAPING),
        eos_token_id=stops or None,
        pad_token_id=pad,
        **more,
    )


def _text(model: ChatModel, answer: list[int], stops: set[int]) -> str:
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return str(model.tokenizer.decode(answer[:end], skip_special_tokens=True))


class _Race:
    """A logits processor: the largest of what it gives is a draw from softmax(logits / T).

    Token i arrives after a time E_i / p_i with E_i exponential, and is the first with probability p_i. Every token has its own time,
    so that rounding in the logits changes a draw only where two tokens arrive together (an inverse distribution function would
    shift a little for every token). What decides is who has a very small E_i: it comes from a uniform of 53 bits, for with the 24
    of float32 one token in 2**24 would arrive at once, however unlikely it is.
    """

    def __init__(self, sampling: Sampling, rows: list[int]) -> None:
        float32 = torch.finfo(torch.float32)
        self._temperature = min(max(sampling.temperature, float32.tiny), float32.max)
        self._generators = [np.random.Generator(np.random.SFC64(_mix(sampling.seed, row))) for row in rows]
        self._ahead: Future[Tensor] | None = None

    def __call__(self, _ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]) -> Tensor:
        # Below the largest, for then the likely tokens' logits keep their digits at any temperature.
        below = scores.float() - scores.amax(-1, keepdim=True).float()
        shares = below.div_(self._temperature).exp_()
        return shares.div_(self._next_times(scores))

    def _next_times(self, scores: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """The next token's times, beside the scores: while a GPU is at its next pass, the CPU draws those after them."""
        vocab = scores.shape[-1]
        if scores.device.type == "cpu":
            return self._times(vocab)
        times = self._times(vocab) if self._ahead is None else self._ahead.result()
        self._ahead = _drawers().submit(self._times, vocab)
        return times.to(scores.device)

    def _times(self, vocab: int) -> Float[Tensor, "batch vocab"]:
        """Exponential times, one generator a row."""
        times, wide = np.empty((len(self._generators), vocab), dtype=np.float32), np.empty(vocab)
        for row, generator in zip(times, self._generators, strict=True):
            row[:] = generator.random(out=wide)
        # Kept away from 0, and from infinity where rounding to float32 has made a uniform 1.
        return torch.from_numpy(times).neg_().log1p_().neg_().clamp_(2**-54, -math.log(2**-25))


@cache
def _drawers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="samples")


def _mix(seed: int, row: int) -> int:
    """A 63-bit seed from a seed and a row's number; their sum would give (0, 1) and (1, 0) the same samples."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big") >> 1


def _pad_left(
    rows: list[tuple[int, ...]], pad: int, device: torch.device, shared: int
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
    """Ids and mask, padded on the left; a shared beginning of `shared` tokens, which is read by itself, stays in front of the padding."""
    longest = max(map(len, rows))
    gaps = [longest - len(r) for r in rows]
    ids = [[*r[:shared], *[pad] * gap, *r[shared:]] for r, gap in zip(rows, gaps, strict=True)]
    mask = [[*[1] * shared, *[0] * gap, *[1] * (longest - shared - gap)] for gap in gaps]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@contextmanager
def _declaring(model: ChatModel, mask: Int[Tensor, "batch seq"], rows: list[int]) -> Iterator[None]:
    """Declare positions for each pass of a generation: the first reads the prompt, later ones an answer's token."""
    owners = torch.tensor(rows, device=mask.device).unsqueeze(1)
    if not intervening():
        yield
        return
    contexts: list[Any] = []
    passes = count()
    prompt = _prompt_masks(mask)

    def leave() -> None:
        while contexts:
            contexts.pop().__exit__(None, None, None)

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leave()
        given = (
            inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        )  # GPT-2 names no ids
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"][..., 0]
        n_said = ids.shape[1] - mask.shape[1]
        # What a cache is called, and whether it knows its length, differs: the first pass reads the prompt, and later ones all again, or a token.
        masks = prompt if next(passes) == 0 else _with_answer(mask, n_said) if n_said > 0 else _ANSWER
        context = declared(masks, owners.expand(ids.shape[:2]))
        context.__enter__()
        contexts.append(context)

    handle = model.decoder.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        leave()


def _prompt_masks(mask: Int[Tensor, "batch seq"]) -> dict[str, Mask]:
    real = mask.bool()
    last = real.clone()
    last[:, :-1] = False
    tokens: Mask = True if real.all() else real
    return {"all": tokens, "prompt": tokens, "prompt_last": last}


def _with_answer(mask: Int[Tensor, "batch prompt"], n: int) -> dict[str, Mask]:
    """Prompts with `n` tokens of an answer behind them: without a cache every pass reads all again."""
    prompt, answer = mask.bool(), torch.ones(len(mask), n, dtype=torch.bool, device=mask.device)
    last = torch.zeros_like(prompt)
    last[:, -1] = True
    said = torch.cat([torch.zeros_like(prompt), answer], 1)
    return {
        "all": torch.cat([prompt, answer], 1),
        "prompt": torch.cat([prompt, ~answer], 1),
        "prompt_last": torch.cat([last, ~answer], 1),
        "response": said,
        "generated": said,
    }


_ANSWER: dict[str, Mask] = {"all": True, "response": True, "generated": True}
"""Positions of every pass after the first: all it reads are answer tokens, including what follows an answer's end."""
