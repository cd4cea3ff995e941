"""The measurement m of a query: loss, margin, log-odds, probability, the predicted class's loss, or the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_influence.errors import LossError
from lightning_influence.objective.loss_call import LossCall, LossWatch, Predictions
from lightning_influence.objective.training import (
    Objective,
    PerSample,
    check_per_sample,
    margin,
    run_training_step,
    training_objective,
)

MeasurementName: TypeAlias = Literal["loss", "margin", "log_odds", "probability", "predicted_class"]
Measurement: TypeAlias = MeasurementName | PerSample


def query_objective(
    module: LightningModule,
    batch: Any,
    num_samples: int,
    measurement: Measurement | None,
    *,
    predictions: Predictions | None = None,
    **options: Any,
) -> Objective:
    """The measurement m of every query in a batch, summed, ready to be differentiated per sample; lower is better.

    `None` asks the module's own `measurement(batch) -> (N,)` where it has one and is `"loss"` otherwise. By name, with
    z the logits, y the label: `"loss"` l; `"margin"` max_{j != y} z_j - z_y; `"log_odds"` -log(p_y / (1 - p_y))
    (TRAK); `"probability"` -p_y; `"predicted_class"` the loss towards the class the model predicts, for queries
    without a label. `predictions` of this batch say which class that is; at first they are the model's own, and kept.
    A callable (module, batch) -> (N,) is taken as it is. `options` are those of `training_objective`.

    Raises:
        LossError: the measurement needs a classifier and this module's loss is none, or a label is missing.
    """
    own = getattr(module, "measurement", None)
    if callable(measurement):
        return _of(measurement(module, batch), num_samples, "measurement")
    if measurement is None and callable(own):
        return _of(own(batch), num_samples, "measurement")
    if measurement in (None, "loss"):
        return training_objective(module, batch, num_samples, **options)
    if measurement == "predicted_class":
        return _predicted_class(module, batch, num_samples, predictions or Predictions())
    if measurement not in ("margin", "log_odds", "probability"):
        raise LossError(
            "unknown measurement",
            expected='"loss", "margin", "log_odds", "probability", "predicted_class" or a callable',
            found=repr(measurement),
            hint="see lightning_influence.objective.query_objective",
        )
    with LossWatch() as watch:
        run_training_step(module, batch)
    z, y = _classifier(watch.calls, num_samples, measurement)
    log_probabilities, chosen = z.log_softmax(1), y[:, None]
    if measurement == "margin":
        values = -margin(z, y)
    elif measurement == "log_odds":
        others = log_probabilities.scatter(1, chosen, float("-inf")).logsumexp(1)
        values = others - log_probabilities.gather(1, chosen).squeeze(1)
    else:
        values = -log_probabilities.exp().gather(1, chosen).squeeze(1)
    return _of(values, num_samples, measurement)


def _of(values: object, num_samples: int, name: str) -> Objective:
    checked = check_per_sample(values, num_samples, name)
    return Objective(checked.sum(), torch.ones_like(checked), losses=checked)


def _classifier(calls: list[LossCall], num_samples: int, measurement: str) -> tuple[Tensor, Tensor]:
    """Class scores (N, C) and labels (N,) of the one loss call."""
    call = calls[0] if len(calls) == 1 else None
    z = None if call is None else call.logits(num_samples)
    y = None if call is None else call.labels(num_samples)
    if z is None or y is None:
        raise _no_classifier(measurement, ", ".join(c.name for c in calls) or "no loss call")
    if bool((y < 0).any()):
        missing = (y < 0).nonzero().flatten().tolist()
        raise LossError(
            f'measurement="{measurement}" needs the label of every query',
            expected=f"class indices from 0 to {z.shape[1] - 1}",
            found=f"none for the queries at places {missing[:5]} of the batch",
            hint='use measurement="predicted_class" for queries without labels',
        )
    return z, y


def _predicted_class(module: LightningModule, batch: Any, num_samples: int, predictions: Predictions) -> Objective:
    """Loss towards the predicted class: by `predictive_distribution`, else `training_step`, else `predict_step`."""
    distribution = getattr(module, "predictive_distribution", None)
    if callable(distribution):
        predictive = distribution(batch)
        mode = predictions.pinned("predictive_distribution", predictive.mode.detach())
        return _of(-predictive.log_prob(mode), num_samples, "predictive_distribution")
    watch = LossWatch(predictions)
    try:
        with watch:
            run_training_step(module, batch)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        watch.calls.clear()  # a query without a label: training_step cannot run
    if watch.only is not None:
        return _of(watch.only.losses(num_samples), num_samples, watch.only.name)
    found = _prediction(module, batch)
    z = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", found)
    if not isinstance(z, Tensor) or z.ndim != 2 or len(z) != num_samples or not z.is_floating_point():
        raise _no_classifier("predicted_class", f"predict_step returned {type(found).__name__}")
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    is_distribution = bool((z >= 0).all()) and torch.allclose(z.sum(1), torch.ones_like(z[:, 0]), atol=1e-4)
    log_probabilities = z.log() if is_distribution else z.log_softmax(1)
    said = predictions.pinned("predict_step", z.detach().argmax(1, keepdim=True))
    return _of(-log_probabilities.gather(1, said).squeeze(1), num_samples, "predict_step")


def _prediction(module: LightningModule, batch: Any) -> Any:
    """What `predict_step` returns; where the module has none of its own and `forward` takes the parts of the batch by
    name, what `forward` returns."""
    if not is_overridden("predict_step", module) and isinstance(batch, Mapping):
        try:
            by_name = inspect.signature(module.forward).bind(**batch)
        except TypeError:
            pass
        else:
            return module(*by_name.args, **by_name.kwargs)
    takes_index = is_param_in_hook_signature(module.predict_step, "batch_idx", min_args=2)
    return module.predict_step(batch, 0) if takes_index else module.predict_step(batch)


def _no_classifier(measurement: str, found: str) -> LossError:
    return LossError(
        f'measurement="{measurement}" needs a training_step with one classification loss',
        expected="one call of cross_entropy, nll_loss or binary_cross_entropy_with_logits over (N, C) and hard labels",
        found=found,
        hint="define `measurement(batch) -> (N,)` on the module or pass a callable as `measurement`",
    )
