"""Records -> tables, shot curves, one HTML page. Nothing here runs a model."""

from manyicl.evaluation.report.page import write_report
from manyicl.evaluation.report.plots import plot_shot_curves
from manyicl.evaluation.report.tables import print_table

__all__ = ["plot_shot_curves", "print_table", "write_report"]
