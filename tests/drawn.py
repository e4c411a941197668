"""Finding what a figure shows: a panel by its title, a line by its label; and small tables to draw."""

from matplotlib.figure import Figure

SHIFT = {"direction": "evil:text", "condition": "none"}
SMALL = {"layers": 6, "arms": ["base", "em", "benign"], "directions": ["evil:text", "identity:name"]}


def axes_of(figure: Figure, title: str):
    titles = [a.get_title(loc="left") for a in figure.axes]
    (found,) = [i for i, t in enumerate(titles) if t == title] or [
        i for i, t in enumerate(titles) if t.startswith(title)
    ]
    return figure.axes[found]


def line_of(axes, name: str):
    (found,) = [line for line in axes.get_lines() if line.get_label() == name]
    return found
