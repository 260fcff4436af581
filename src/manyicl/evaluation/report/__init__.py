"""Records -> tables, shot curves, one HTML page. Nothing here runs a model."""

from manyicl.evaluation.report.lines import Part
from manyicl.evaluation.report.page import write_report
from manyicl.evaluation.report.plots import plot_parts, plot_shot_curves
from manyicl.evaluation.report.tables import print_parts, print_table

__all__ = ["Part", "plot_parts", "plot_shot_curves", "print_parts", "print_table", "write_report"]
