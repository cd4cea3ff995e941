"""Answers for people: explanations as text, as a picture and as a page with the words highlighted."""

from lightning_influence.report.explanation import Description, Evidence, Explanation, explain
from lightning_influence.report.page import page, save_page
from lightning_influence.report.picture import detection_curve, picture
from lightning_influence.report.text_table import text_table

__all__ = [
    "Description",
    "Evidence",
    "Explanation",
    "detection_curve",
    "explain",
    "page",
    "picture",
    "save_page",
    "text_table",
]
