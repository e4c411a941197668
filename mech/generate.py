"""Batched generation whose samples do not depend on how rows were batched.

Hugging Face's `generate` does the work. Sampling is done by adding Gumbel noise to the scaled logits and
taking the largest, which is exactly sampling from the softmax; each row has its own generator, seeded by
the caller's seed and the row's number, so batch size and order change nothing but rounding.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mech.chat import Encoded
from mech.errors import InputError
from mech.interventions import intervening
from mech.models import ChatModel
from mech.positions import Mask, declared
from mech.progress import track


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
"""What a model's `generation_config.json` may ask for and is not done here: it would bend the distribution that is sampled from, by
the padding too (Qwen2.5's repetition penalty counts padding as said)."""


@torch.no_grad()
def generate(
    model: ChatModel,
    prompts: Sequence[Encoded],
    sampling: Sampling | None = None,
    *,
    label: str = "generating",
) -> list[str]:
    """The model's answer to each prompt, in the prompts' order, without special tokens.

    Raises:
        InputError: negative temperature, or no room for a single token.
    """
    sampling = sampling or Sampling()
    if sampling.temperature < 0 or sampling.max_new_tokens < 1:
        raise InputError(
            f"cannot sample with {sampling}: temperature >= 0 and max_new_tokens >= 1 are needed"
        )
    order = sorted(range(len(prompts)), key=lambda i: -prompts[i].n_prompt)
    answers: dict[int, str] = {}
    starts = range(0, len(order), sampling.batch_size)
    for start in track(starts, label):
        rows = order[start : start + sampling.batch_size]
        texts = _generate_batch(model, [prompts[i].ids[: prompts[i].n_prompt] for i in rows], rows, sampling)
        answers.update(zip(rows, texts, strict=True))
    return [answers[i] for i in range(len(prompts))]


def stop_ids(model: ChatModel) -> list[int]:
    """Ids that end a turn: the model's own, and the first token that its template puts behind an answer."""
    config = model.causal.generation_config.eos_token_id
    ids = set(config if isinstance(config, list) else [config] if config is not None else [])
    closing = model.template.ids(model.template.closing)
    if closing and closing[0] in set(model.tokenizer.all_special_ids):
        ids.add(closing[0])
    return sorted(ids)


def _generate_batch(
    model: ChatModel, prompts: list[tuple[int, ...]], rows: list[int], sampling: Sampling
) -> list[str]:
    stops = stop_ids(model)
    pad = stops[0] if stops else 0
    ids, mask = _pad_left(prompts, pad, model.device)
    noise = [_GumbelNoise(sampling, rows)] if sampling.temperature > 0 else []
    with _declaring(model, mask, rows):
        out = model.causal.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            **dict.fromkeys(_SHAPING),
            eos_token_id=stops or None,
            pad_token_id=pad,
            logits_processor=noise,
        )
    return [_text(model, answer, set(stops)) for answer in out[:, ids.shape[1] :].tolist()]


def _text(model: ChatModel, answer: list[int], stops: set[int]) -> str:
    end = next((i for i, token in enumerate(answer) if token in stops), len(answer))
    return str(model.tokenizer.decode(answer[:end], skip_special_tokens=True))


class _GumbelNoise:
    """A logits processor: argmax of logits / T + Gumbel noise is a draw from softmax(logits / T)."""

    def __init__(self, sampling: Sampling, rows: list[int]) -> None:
        self.temperature = sampling.temperature
        self.generators = [torch.Generator().manual_seed(_mix(sampling.seed, row)) for row in rows]

    def __call__(self, _ids: Int[Tensor, "batch seq"], scores: Float[Tensor, "batch vocab"]) -> Tensor:
        uniform = torch.stack(
            [torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators]
        )
        gumbel = -torch.log(-torch.log(uniform.clamp_min(1e-300)))
        return scores.float() / self.temperature + gumbel.to(scores.device, torch.float32)


def _mix(seed: int, row: int) -> int:
    """One 63-bit seed from a seed and a row, without the collisions of their sum."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}/{row}".encode()).digest()[:8], "big") >> 1


def _pad_left(rows: list[tuple[int, ...]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*[pad] * (longest - len(r)), *r] for r in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


@contextmanager
def _declaring(model: ChatModel, mask: Int[Tensor, "batch seq"], rows: list[int]) -> Iterator[None]:
    """Declare positions for each pass of a generation: the first reads the prompt, later ones an answer's token."""
    owners = torch.tensor(rows, device=mask.device).unsqueeze(1)
    if not intervening():
        yield
        return
    contexts: list[Any] = []
    prompt = _prompt_masks(mask)

    def leave() -> None:
        while contexts:
            contexts.pop().__exit__(None, None, None)

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leave()
        given = (
            inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        )  # GPT-2 names no ids
        past = given.get("past_key_values")
        first = past is None or past.get_seq_length() == 0
        ids = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"][..., 0]
        context = declared(prompt if first else _ANSWER, owners.expand(ids.shape[:2]))
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


_ANSWER: dict[str, Mask] = {"all": True, "response": True, "generated": True}
"""Whatever a later pass of a generation reads is an answer's token, also behind an answer's end."""
