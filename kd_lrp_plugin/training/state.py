"""The state of an experiment between two epochs: what a checkpoint has to hold, and no more.

The random number generators are not in it: each epoch has seeds of its own, so that it is the same
in whichever process it is trained. Neither is the position within an epoch: a run resumes at the
beginning of one, since what loaders have in their hands cannot be saved.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kd_lrp_plugin.torchdistill.pre_epoch_proc import full_weights
from kd_lrp_plugin.training.experiment import Experiment


def describe_nonfinite(state: Mapping[str, Any]) -> str | None:
    """Where a checkpoint of a trainer has weights that are not finite; None if nowhere."""
    models = dict(state.get("experiment", {}).get("models", {}))
    models["best"] = state.get("best", {}).get("model", {})
    for name, weights in models.items():
        for key, value in weights.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return f"nan or inf in {key} of its model {name!r}"
    return None


def take_state(experiment: Experiment) -> dict[str, Any]:
    """All that the next epoch needs, as tensors, numbers, text and containers of them."""
    box, models = experiment.box, experiment.list_changing()
    scaler = getattr(box, "grad_scaler", None)
    return {
        "stage": experiment.stage,
        "epochs_done": experiment.epochs_done,
        "grad_count": box.stage_grad_count,
        "models": {name: model.state_dict() for name, model in models.items()},
        "trained": {
            name: [key for key, parameter in model.named_parameters() if parameter.requires_grad]
            for name, model in models.items()
        },
        "gradients": {
            name: {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            for name, model in models.items()
            if experiment.pending
        },
        "optimizer": box.optimizer.state_dict(),
        "scheduler": box.lr_scheduler.state_dict() if box.lr_scheduler else None,
        "scaler": scaler.state_dict() if scaler else None,
        "losses": {name: loss.state_dict() for name, loss in experiment.losses().items()},
        "weights": {name: float(weight) for name, (_, weight) in _get_terms(experiment).items()},
    }


def restore_state(experiment: Experiment, state: Mapping[str, Any]) -> None:
    """Bring a new experiment to where :func:`take_state` was called."""
    experiment.go_to_stage(state["stage"])
    box, models = experiment.box, experiment.list_models()
    box.current_epoch, box.stage_grad_count = state["epochs_done"], state["grad_count"]
    for name, content in state["models"].items():
        models[name].load_state_dict(content)
    for name, keys in state.get("trained", {}).items():  # a pre-epoch process may have thawed some
        for key, parameter in models[name].named_parameters():
            parameter.requires_grad_(key in keys)
    for name, gradients in state["gradients"].items():
        for key, parameter in models[name].named_parameters():
            if key in gradients:
                parameter.grad = gradients[key].to(parameter.device)
    box.optimizer.load_state_dict(state["optimizer"])
    if state["scheduler"] is not None:
        box.lr_scheduler.load_state_dict(state["scheduler"])
    if state["scaler"] is not None:
        box.grad_scaler.load_state_dict(state["scaler"])
    for name, loss in experiment.losses().items():
        loss.load_state_dict(state["losses"][name])
    full_weights(box.criterion)  # before those of an epoch take their place
    terms = _get_terms(experiment)
    for name, weight in state.get("weights", {}).items():
        terms[name] = terms[name][0], weight


def _get_terms(experiment: Experiment) -> dict[str, tuple[Any, float]]:
    """Terms of the criterion with the weights that a pre-epoch process may have given them."""
    return getattr(experiment.box.criterion, "term_dict", {})
