"""Per-sample gradients of one call of one layer: a rule per layer type, found by exact type, and a
fallback."""

from lightning_influence.gradients.rules import attention, convolution, embedding, linear, normalisation
from lightning_influence.gradients.rules.call import LayerCall, gradient_rule, rule_for, runs_again
from lightning_influence.gradients.rules.fallback import apply_rule

FAMILIES = (linear, embedding, convolution, attention, normalisation)  # importing a family registers its rules

__all__ = ["FAMILIES", "LayerCall", "apply_rule", "gradient_rule", "rule_for", "runs_again"]
