"""Other people's numbers for layers, both ways; ours count from 0 and name block outputs (`mech.conventions` has the whole table)."""

from mech.errors import InputError


def to_hidden_states_index(layer: int) -> int:
    """Entry of Hugging Face's `hidden_states`, and row of a persona_vectors file: `layer + 1`."""
    return counted(layer) + 1


def from_hidden_states_index(index: int) -> int:
    """The layer of an entry of `hidden_states` or a row of a persona_vectors file; entry 0 is the embedding, no layer."""
    if index < 1:
        raise InputError(
            f"entry {index} is the embedding, which is no block's output: layers begin at entry 1"
        )
    return index - 1


def from_repeng_layer(layer: int, n_layers: int) -> int:
    """The layer of one of repeng's, which count from 0 as ours do, or from the end (-1 is the last)."""
    if not -n_layers <= layer < n_layers:
        raise InputError(f"layer {layer} is out of range: repeng's are {-n_layers} to {n_layers - 1}")
    return layer % n_layers


def counted(layer: int) -> int:
    """A layer that is one.

    Raises:
        InputError: below 0.
    """
    if layer < 0:
        raise InputError(f"layer {layer}: layers count from 0")
    return layer
