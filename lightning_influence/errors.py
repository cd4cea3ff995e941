"""What the library says when it refuses: errors that name what was expected, what was found and what to do."""

from __future__ import annotations


class InfluenceError(Exception):
    """Base of every error that this library raises on purpose.

    Args:
        what: one sentence naming the file, parameter or argument that is wrong.
        expected: what would have been accepted.
        found: what was there instead.
        hint: what the user can do about it.
    """

    def __init__(self, what: str, *, hint: str, expected: object = None, found: object = None) -> None:
        self.what, self.expected, self.found, self.hint = what, expected, found, hint
        lines = [what]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if found is not None:
            lines.append(f"  found: {found}")
        lines.append(f"  HINT: {hint}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.hint, self.expected, self.found)


def _rebuild(kind: type[InfluenceError], what: str, hint: str, expected: object, found: object) -> InfluenceError:
    return kind(what, hint=hint, expected=expected, found=found)


class StoreError(InfluenceError):
    """An artifact store is missing, damaged, hostile, full, or belongs to another model or dataset."""


class SampleIdError(InfluenceError):
    """The dataset positions of a training batch cannot be known."""


class CaptureError(InfluenceError):
    """A per-sample gradient cannot be captured, or what was captured fails its check."""


class LossError(InfluenceError):
    """The training loss or the measurement has no meaning for one sample alone."""


class UnsupportedError(InfluenceError):
    """The strategy, precision or loop of this Trainer is one that the library does not serve."""


class QueryError(InfluenceError):
    """A query cannot be answered by this store and this estimator."""


class CurvatureError(InfluenceError):
    """A curvature cannot be estimated, solved or loaded."""


class MetricError(InfluenceError):
    """Scores and truths do not fit together, or a metric has no meaning for them."""
