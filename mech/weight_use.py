"""Maps whose weights a model uses without calling them: what is put on such a map does not act where its weight does.

A live adapter acts where its map is called. Mamba's step sizes are a product that the block takes itself with `dt_proj.weight`, its fused
kernels do so with the output projection, and Zamba's blocks hold one weight in several places: there an adapter trains nothing, or acts in some
places only, while merged it acts wherever the weight is used. Which maps these are is found out by trying, never by a model's name.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mech.devices import input_device
from mech.modes import evaluating, training


def used_past(causal: nn.Module, maps: Mapping[str, nn.Module], *, in_training: bool) -> list[str]:
    """Names of the maps whose weights are used outside their own calls, or lie in several places of the model.

    Runs a few tokens through the model; neither its mode, nor any state of the random generators, is changed.

    Args:
        causal: a causal language model of Hugging Face's.
        maps: some of its modules, below adapters or bare, by name.
        in_training: run it in training mode too, which may choose other kernels.
    """
    # Every module as often as it has places; an adapter's wrapper shows what it wraps once more.
    every = (m for _, m in causal.named_modules(remove_duplicate=False) if not hasattr(m, "base_layer"))
    places = Counter(_weight(m) for m in every)
    weights = {name: weight for name, m in maps.items() if (weight := _weight(m)) is not None}
    if not weights:
        return []
    watch = _Watch({weight: _tensor(maps[name]) for name, weight in weights.items()})
    with ExitStack() as stack:
        for name, weight in weights.items():
            before, after = watch.calls_of(weight)
            stack.callback(maps[name].register_forward_pre_hook(before).remove)
            stack.callback(maps[name].register_forward_hook(after, always_call=True).remove)
        with watch:
            _run(causal, in_training=in_training)
    return sorted(name for name, weight in weights.items() if places[weight] > 1 or weight in watch.found)


def _weight(module: Any) -> int | None:
    """Which tensor a module's weight is, an adapter or not around it; None where it has none of that name."""
    weight = _tensor(module)
    return None if weight is None else id(weight)


def _tensor(module: Any) -> Tensor | None:
    weight = getattr(getattr(module, "base_layer", module), "weight", None)
    return weight if isinstance(weight, Tensor) else None


class _Watch(TorchFunctionMode):
    """Sees every operation of torch's, and notes which weights have a part in one while nobody calls their map."""

    def __init__(self, weights: Mapping[int, Tensor | None]) -> None:
        """Keep the weights themselves: offloading puts others in their place, and a tensor that nobody holds gives its id to the next."""
        super().__init__()
        self.found: set[int] = set()
        self._weights = weights
        self._called: Counter[int] = Counter()

    def calls_of(self, weight: int) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks around the calls of the map that holds a weight."""

        def before(*_: Any) -> None:
            self._called[weight] += 1

        def after(*_: Any) -> None:
            self._called[weight] -= 1

        return before, after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple | list):  # asking for a dtype or a shape is no use
            for x in _flat((*args, *(kwargs or {}).values())):
                if id(x) in self._weights and not self._called[id(x)]:
                    self.found.add(id(x))
        return result


def _flat(values: tuple[Any, ...] | list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple | list):
            yield from _flat(value)
        else:
            yield value


@torch.no_grad()
def _run(causal: Any, *, in_training: bool) -> None:
    size = causal.config.get_text_config().vocab_size
    ids = torch.arange(3, 8, device=input_device(causal.get_input_embeddings())).unsqueeze(0) % size
    with evaluating(causal):
        causal(input_ids=ids, use_cache=False)
    if in_training:
        with training(causal), torch.random.fork_rng():
            causal(input_ids=ids, use_cache=False)
