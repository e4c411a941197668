"""Loading chat models, with stacks of adapters on them.

This is the only module that knows where a transformer keeps its decoder, blocks and output head; it finds
them by structure, never by a model's name.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mech.chat import ChatTemplate
from mech.checkpoint import Checkpoint
from mech.choices import STACK, Merge
from mech.devices import input_device
from mech.errors import GuardError, InputError
from mech.extras import require
from mech.fetch import read_gguf
from mech.modes import evaluating
from mech.pretrained import load_config, load_tokenizer, load_weights
from mech.resolve import resolve
from mech.stacks import merged, merged_by_map, merges_by_map, stacked

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatModel:
    """A loaded model with its tokenizer and the checkpoint it came from.

    `hf` is the Hugging Face model itself: nothing is wrapped, so everything that works on it still does.
    """

    hf: Any
    tokenizer: Any
    checkpoint: Checkpoint
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, understood."""
        return ChatTemplate(self.tokenizer, self.template_kwargs)

    @property
    def causal(self) -> Any:
        """The causal language model below a PEFT wrapper, or the model itself."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @cached_property
    def decoder(self) -> nn.Module:
        """The stack from embedding to final norm, without the output head."""
        found = self.causal.get_decoder()
        if found is self.causal:
            found = getattr(self.causal, self.causal.base_model_prefix, found)
        if found is self.causal:  # its prefix names nothing (Llama 4's text model): what holds the embedding
            embedding = self.causal.get_input_embeddings()
            found = next((m for m in self.causal.children() if embedding in m.modules()), None)
        if not isinstance(found, nn.Module):
            raise InputError(f"{type(self.causal).__name__}: no decoder found")
        return found

    @cached_property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order: block l's output is layer l."""
        lists = [
            m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == self.n_layers
        ]
        # A block list holds blocks that hold attention and more; a list of experts of equal length lies inside one.
        outer = [m for m in lists if not any(m is not o and m in list(o.modules()) for o in lists)]
        if len(outer) != 1:
            raise InputError(
                f"{type(self.causal).__name__}: expected one list of {self.n_layers} blocks, found {len(outer)}"
            )
        return outer[0]

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.causal.config.get_text_config().num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.causal.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return input_device(self.causal.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.causal.get_input_embeddings().weight.dtype
        return dtype

    def to_transformer_lens(self) -> Any:
        """A TransformerLens `TransformerBridge` of this checkpoint, adapters merged: a copy, for it changes what it wraps.

        Raises:
            MissingDependencyError: TransformerLens is not installed (extra `backends`).
            InputError: it does not know this architecture.
        """
        from mech.backends.transformer_lens import bridge_of

        return bridge_of(self)

    def to_nnsight(self) -> Any:
        """An `nnsight.NNsight` around this very model in memory; without a trace it runs as before.

        Raises:
            MissingDependencyError: nnsight is not installed (extra `backends`).
        """
        return require("nnsight", extra="backends").NNsight(self.causal)

    def logits(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """The output head on final-norm states, with what the architecture does to logits after it.

        Raises:
            GuardError: see `check_head`.
        """
        self.check_head()
        head: Any = self.causal.get_output_embeddings()
        logits: Tensor = head(hidden.to(input_device(head)))
        return self._after_head.apply(logits) if self._after_head else logits

    def check_head(self) -> None:
        """Refuse a model whose logits `logits` cannot reproduce. The first call runs a forward pass: make it before hooks are on the model.

        Raises:
            GuardError: this architecture does something to its logits that we do not know of.
        """
        if self._after_head is None:
            raise GuardError(
                f"{type(self.causal).__name__}: its logits are not head(final norm): unsupported output head"
            )

    @property
    def plain_head(self) -> bool:
        """Whether the output head is one matrix without bias, and nothing but `logit_scale` happens to its logits."""
        head: Any = self.causal.get_output_embeddings()
        known = self._after_head is not None and self._after_head.cap is None
        return type(head) is nn.Linear and getattr(head, "bias", None) is None and known

    @property
    def logit_scale(self) -> float:
        """What the architecture multiplies its head's output by: 1 for most.

        Raises:
            GuardError: see `check_head`.
        """
        self.check_head()
        return self._after_head.scale if self._after_head else 1.0

    @cached_property
    def _after_head(self) -> "_AfterHead | None":
        """What the architecture does to the head's output, found by comparing each way the config hints at with the model's own logits.

        None: none of them reproduces the logits.
        """
        text = self.causal.config.get_text_config()
        probe = torch.arange(3, 11, device=self.device).unsqueeze(0) % text.vocab_size
        with torch.no_grad(), evaluating(self.causal):
            expected = self.causal(input_ids=probe, use_cache=False).logits.float()
            hidden = self.decoder(input_ids=probe, use_cache=False).last_hidden_state
            head = self.causal.get_output_embeddings()
            plain = head(hidden.to(input_device(head)))
        found = {
            way: float((way.apply(plain).float() - expected).abs().max()) for way in _ways_after_head(text)
        }
        best = min(found, key=lambda way: found[way])
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-3
        return best if found[best] <= tolerance * float(expected.abs().max()) else None


@dataclass(frozen=True)
class _AfterHead:
    """What an architecture does to its head's output."""

    scale: float
    """Multiplies it."""
    cap: float | None
    """Then bends it: cap · tanh(logits / cap)."""

    def apply(self, logits: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return torch.tanh(scaled / self.cap) * self.cap if self.cap else scaled


def _ways_after_head(config: Any) -> list[_AfterHead]:
    """Every reading of a config's fields to be tried: the same field divides logits in one architecture and multiplies them in another."""

    def given(*names: str) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, int | float) and v]

    factors = given("logit_scale", "lm_head_multiplier", "logits_scaling")
    scales = dict.fromkeys([1.0, *factors, *(1 / f for f in factors)])
    caps = [*given("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), None]
    return [_AfterHead(scale, cap) for cap in caps for scale in scales]


def load_model(
    reference: str | Checkpoint,
    *,
    dtype: str | torch.dtype = "auto",
    merge: Merge = True,
    quantise: str | None = None,
    device: str | torch.device | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    **hf_kwargs: Any,
) -> ChatModel:
    """Load a chat model, ready for reading (eval mode, no gradients on the base weights).

    Args:
        reference: what to load (see `mech.resolve`), or a `Checkpoint`.
        dtype: `float32`, `bfloat16`, ... or `auto`: the checkpoint's own.
        merge: True merges every adapter into the weights, in float32 (in bfloat16 a merge loses the update). False
            leaves the last one a live PEFT adapter, those below it merged. `"stack"` merges none: all are live PEFT
            adapters (`stage1`, `stage2`, ... in order) whose updates add up, on a base that is held in `dtype` throughout.
        quantise: `nf4` holds the weights in 4 bits (extra `qlora`), to train an adapter on; nothing can be merged into them.
        device: move the model there; leave out when `device_map` is among `hf_kwargs`.
        template_kwargs: passed to the chat template.
        **hf_kwargs: passed to `from_pretrained` (`device_map`, `attn_implementation`, `quantization_config`,
            `max_memory`, ...).

    Raises:
        InputError: not found, no adapter of this base, or not a causal language model.
    """
    checkpoint = reference if isinstance(reference, Checkpoint) else resolve(reference)
    wanted = _torch_dtype(dtype)
    if quantise:
        hf_kwargs["quantization_config"] = _quantisation(checkpoint, quantise, wanted, merge)
    if device is not None and torch.device(device).type == "cuda":
        # Straight onto it: weights that are cast or merged are so there.
        hf_kwargs.setdefault("device_map", {"": device})
    model, tokenizer = _with_adapters(checkpoint, wanted, merge, hf_kwargs)
    if device is not None:
        model = model.to(device)
    model.eval()
    model.requires_grad_(requires_grad=False)
    return ChatModel(model, tokenizer, checkpoint, dict(template_kwargs or {}))


def skeleton(checkpoint: Checkpoint) -> ChatModel:
    """A checkpoint's base built from its config alone, without weights or memory, and without a tokenizer: to ask its structure."""
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    return ChatModel(built, None, checkpoint)


def _quantisation(checkpoint: Checkpoint, quantise: str, dtype: str | torch.dtype, merge: Merge) -> Any:
    """4-bit weights that compute in `dtype`; merging into 4 bits would lose the update, so only a bare base has them."""
    if quantise != "nf4":
        raise InputError(f"quantise: {quantise!r} is not known; there is nf4")
    if checkpoint.adapters and merge != STACK:
        raise InputError(
            f"quantise: {checkpoint} has adapters to merge, which 4-bit weights cannot take up: leave them unmerged "
            "(training: between_stages: stack), or train this stage unquantised"
        )
    require("bitsandbytes", extra="qlora")
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _keep_gradients(model: Any) -> None:
    """Leave 4-bit weights as they are: on a CPU with AVX-512 BF16, bitsandbytes packs them anew at the first pass outside of training.

    Packed ones carry no gradient ever after, and compute in bfloat16 whatever was asked for.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _with_adapters(
    checkpoint: Checkpoint, wanted: str | torch.dtype, merge: Merge, kwargs: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The base with its adapters live or merged, and the tokenizer."""
    if merge == STACK:
        model, tokenizer = _load_base(checkpoint, wanted, kwargs)
        return stacked(model, checkpoint), tokenizer
    exact = wanted if isinstance(wanted, torch.dtype) else None
    if exact and checkpoint.adapters and merges_by_map(checkpoint, exact, last=merge):
        model, tokenizer = _load_base(checkpoint, wanted, kwargs)
        return merged_by_map(model, checkpoint, last=merge), tokenizer
    model, tokenizer = _load_base(checkpoint, "float32" if checkpoint.adapters else wanted, kwargs)
    model = merged(model, checkpoint, last=merge)
    if checkpoint.adapters and exact and "quantization_config" not in kwargs:
        model = model.to(exact)
    return model, tokenizer


def _load_base(
    checkpoint: Checkpoint, dtype: str | torch.dtype, kwargs: Mapping[str, Any]
) -> tuple[Any, Any]:
    if checkpoint.path.is_file():
        given = {} if dtype == "auto" else {"dtype": dtype}
        return read_gguf(checkpoint.path, **given, **kwargs)
    tokenizer = load_tokenizer(checkpoint)  # first: the weights may take minutes
    model = load_weights(checkpoint, dtype=dtype, **kwargs)
    _keep_gradients(model)  # before its first pass, which adapters that are put on it may want
    return model, tokenizer


def _torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise InputError(f"dtype {dtype!r} is not one of auto, float32, bfloat16, float16")
    return found
