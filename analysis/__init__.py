"""Analysis: arrays and scores become numbers with intervals, figures, and a report."""
