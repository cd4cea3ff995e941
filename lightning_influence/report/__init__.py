"""Answers for people: explanations as text, picture and page with the words highlighted, and tables of suspects."""

from lightning_influence.report.explanation import Description, Evidence, Explanation, explain
from lightning_influence.report.issue_table import LabelIssues, label_issues
from lightning_influence.report.page import page, save_page
from lightning_influence.report.picture import picture
from lightning_influence.report.text_table import text_table

__all__ = [
    "Description",
    "Evidence",
    "Explanation",
    "LabelIssues",
    "explain",
    "label_issues",
    "page",
    "picture",
    "save_page",
    "text_table",
]
