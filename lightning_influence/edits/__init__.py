"""Model edits: the weights that a trained model would have had without some samples, or with other labels for them."""

from lightning_influence.edits.how import How
from lightning_influence.edits.line_search import LineSearch, Standing, removal_f1, standing
from lightning_influence.edits.model_edit import ModelEdit

__all__ = ["How", "LineSearch", "ModelEdit", "Standing", "removal_f1", "standing"]
