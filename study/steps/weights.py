"""The step that looks into adapters: what they write, along the study's directions and in common."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.lora_weights import Compared, alignment, overlap
from mech.adapters import Update, read_updates, writing_maps_of
from study.bench import Bench
from study.frames import write_csv
from study.step import Step
from study.steps.activations import SITE

log = logging.getLogger(__name__)


def compare(step: Step, bench: Bench, folder: Path) -> None:
    """Alignment of every adapter with every direction, overlap of pairs: map by map, and over all maps."""
    config, statistics = step.config, step.config["statistics"]
    directions = [bench.direction(s) for s in step.inputs["directions"]]
    with bench.store(step.inputs["base"][0]) as store:
        samples = store.read(SITE, "prompt_last")
    places = writing_maps_of(bench.base)
    adapters = {
        label: bench.folder(s) for label, s in zip(config["stages"], step.inputs["adapters"], strict=True)
    }
    aligned: dict[tuple[str, ...], Compared] = {}
    for label, adapter in adapters.items():
        updates = read_updates(adapter, places)
        if not any(bool(u.left.any()) for u in updates):
            log.warning("weights: the adapter of %s writes nothing into the residual stream: left out", label)
            continue
        aligned[(label,)] = alignment(
            updates, directions, samples=samples, rng=_draws(statistics), n_null=statistics["n_null"]
        )
    _write(folder, "alignment", aligned, config["seed"])
    pairs = [(a, b) for a, b in config["pairs"] if (a,) in aligned and (b,) in aligned]
    _write(folder, "overlap", _overlaps(pairs, adapters, places, statistics), config["seed"])


def _draws(statistics: Mapping[str, Any]) -> np.random.Generator:
    """The same draws for every adapter and pair of equal ranks: their p values compare, and do not depend on which others there are."""
    return np.random.default_rng(statistics["seed"])


def _overlaps(
    pairs: Sequence[tuple[str, str]],
    adapters: Mapping[str, Path],
    places: set[tuple[int, str]],
    statistics: Mapping[str, Any],
) -> dict[tuple[str, ...], Compared]:
    """Pairs that share a map; adapters are read when needed, so that few are in memory at once."""
    found: dict[tuple[str, ...], Compared] = {}
    held: tuple[str, list[Update]] = ("", [])
    for one, other in pairs:
        if held[0] != one:
            held = (one, read_updates(adapters[one], places))
        theirs = read_updates(adapters[other], places)
        if {(u.layer, u.name) for u in held[1]} & {(u.layer, u.name) for u in theirs}:
            found[one, other] = overlap(held[1], theirs, rng=_draws(statistics))
    return found


def _write(folder: Path, name: str, found: Mapping[tuple[str, ...], Compared], seed: int) -> None:
    for ending, part in (("", "overall"), ("_by_layer", "by_map")):
        frames = [
            getattr(compared, part).assign(**dict(zip(("stage", "other"), labels, strict=False)), seed=seed)
            for labels, compared in found.items()
        ]
        if frames:
            frame = pd.concat(frames, ignore_index=True)
            first = [c for c in ("stage", "other", "seed") if c in frame]
            write_csv(frame[[*first, *frame.columns.drop(first)]], folder / f"{name}{ending}.csv")
