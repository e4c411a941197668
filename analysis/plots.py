"""The figures: one function each, from a tidy table to a `matplotlib.figure.Figure`.

Each module `analysis.*_plots` holds those of one subject; all are exported here, and share this contract. A function draws what its
table says and computes nothing but means over seeds and changes of unit. Seeds are never hidden: each has its own line or point.
An empty table gives a figure that says that this was not measured; labels that fit no row of a table
that has rows are an `InputError`. `arms` (where taken) is the study's list of arms, the base first whatever its
name: it fixes order and colours across figures. Shifts are relative to the base, so their tables have no rows of it.
"""

from analysis.behaviour_plots import dose_response, loss_curves, self_recognition_bars, self_report_bars
from analysis.captions import caption
from analysis.comparison_plots import behaviour_differences, comparison_differences, undone_by_layer
from analysis.condition_plots import shift_by_condition
from analysis.dispersion_plots import dispersion_by_condition
from analysis.effect_plots import arm_direction_heatmap, two_by_two_bars
from analysis.family_plots import identity_cosines, identity_transfer
from analysis.geometry_plots import direction_cosines, direction_quality, embedding
from analysis.patch_plots import adapter_ranges, monitoring, patching
from analysis.plot_files import SavedFigure, save_figure
from analysis.plot_style import arm_styles
from analysis.shift_plots import shift_by_layer, shift_by_layer_in_groups
from analysis.sweep_plots import sweep_response
from analysis.weight_plots import lora_alignment, lora_overlap

__all__ = [
    "SavedFigure",
    "adapter_ranges",
    "arm_direction_heatmap",
    "arm_styles",
    "behaviour_differences",
    "caption",
    "comparison_differences",
    "direction_cosines",
    "direction_quality",
    "dispersion_by_condition",
    "dose_response",
    "embedding",
    "identity_cosines",
    "identity_transfer",
    "lora_alignment",
    "lora_overlap",
    "loss_curves",
    "monitoring",
    "patching",
    "save_figure",
    "self_recognition_bars",
    "self_report_bars",
    "shift_by_condition",
    "shift_by_layer",
    "shift_by_layer_in_groups",
    "sweep_response",
    "two_by_two_bars",
    "undone_by_layer",
]
