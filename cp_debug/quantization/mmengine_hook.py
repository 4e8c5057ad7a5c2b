"""Quantization-aware training in mmengine's runner, for models that are trained with mmdet3d.

In a configuration: ``custom_imports = dict(imports=["cp_debug.quantization.mmengine_hook"])`` and
``custom_hooks = [dict(type="QATHook", sensitive_layers=["pts_voxel_encoder"])]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cp_debug.errors import InputError
from cp_debug.optional import require
from cp_debug.programs.torch_layers import is_quantized
from cp_debug.quantization.checkpoint import entry_of, rebuild
from cp_debug.quantization.histogram import check_method
from cp_debug.quantization.ptq import quantization_of, quantize_ptq
from cp_debug.quantization.qat import freeze_batchnorm

require("mmengine", "mmdet3d")

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import is_model_wrapper  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402

KEY = "cpdebug_quantization"
"""Key of a checkpoint, beside ``state_dict``, that tells what of the model is quantized and how."""


@HOOKS.register_module()
class QATHook(Hook):
    """Quantizes the runner's model before training, calibrated on its own training data.

    ``calibration_batches``: how many batches. ``freeze_bn``: fold BatchNorm where that is possible and keep the others
    in eval mode, always. ``sensitive_layers``: globs over module paths that stay in FP32. ``amax_method``: ``max``,
    ``percentile``, ``mse`` or ``entropy``. A checkpoint of such a run holds scales and folding; resuming from it, or
    loading it, restores them and calibrates nothing.

    Hooks that copied the model before training (``EMAHook``) hold the FP32 one. Raises InputError for an unknown
    method, a glob that matches nothing, and a model that is wrapped for several processes.
    """

    def __init__(
        self,
        calibration_batches: int = 100,
        freeze_bn: bool = True,
        sensitive_layers: Sequence[str] = (),
        amax_method: str = "mse",
    ) -> None:
        check_method(amax_method)
        if calibration_batches < 1:
            raise InputError(f"QATHook: calibration_batches is {calibration_batches}; expected at least 1")
        self.calibration_batches, self.freeze_bn = calibration_batches, freeze_bn
        self.sensitive_layers, self.amax_method = list(sensitive_layers), amax_method

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Give the model the quantizers of the checkpoint, so that its weights fit."""
        if KEY in checkpoint and not is_quantized(model := _model(runner)):
            entry = {**checkpoint[KEY], "state_dict": checkpoint["state_dict"]}
            _become(runner, model, rebuild(model, entry, "QATHook: the checkpoint"))

    def before_train(self, runner: Any) -> None:
        """Fold, calibrate and quantize, unless a checkpoint has brought it all."""
        model = _model(runner)
        if is_quantized(model):
            return
        model.eval()
        forward = _Forward(model)
        try:
            quantized = quantize_ptq(
                model,
                forward.batches(islice(runner.train_dataloader, self.calibration_batches)),
                method=self.amax_method,
                skip_layers=self.sensitive_layers,
                fold=self.freeze_bn,
            )
        finally:
            forward.restore(model)
        forward.restore(quantized)
        _become(runner, model, quantized)
        about = quantization_of(model)
        runner.logger.info(f"QATHook: {len(about.layers)} layers in INT8, {len(about.skipped)} in FP32")

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Put the remaining BatchNorm into eval mode: the loop has put the whole model into train mode."""
        if self.freeze_bn:
            freeze_batchnorm(_model(runner))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Write beside the weights what is quantized; scales are among the weights."""
        entry = entry_of(_model(runner))
        checkpoint[KEY] = {name: value for name, value in entry.items() if name != "state_dict"}


def _model(runner: Any) -> nn.Module:
    if is_model_wrapper(runner.model):
        raise InputError(
            f"QATHook: the model is wrapped in {type(runner.model).__name__}, which knows its parameters already; "
            "train in one process"
        )
    return runner.model


class _Forward:
    """Lets a model be called with tensors alone, as calibration does, and computes its training loss from them.

    Training data are nested containers with ground truth inside. While this lasts, the model's class has a forward
    that puts the tensors back where they were, in copies of the model as well.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._class = model, type(model)
        self._leaves: list[Any] = []
        self._spec: Any = None

        def forward(module: nn.Module, *tensors: Tensor) -> Any:
            remaining = iter(tensors)
            leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
            data = pytree.tree_unflatten(leaves, self._spec)
            return self._class.forward(module, *data[0], **data[1], mode="loss")

        model.__class__ = type(self._class.__name__, (self._class,), {"forward": forward})

    def batches(self, data: Iterator[Any]) -> Iterator[tuple[Tensor, ...]]:
        """The tensors of each batch, which is the current one until the next is asked for."""
        for batch in data:
            with torch.no_grad():
                processed: Any = self._model.data_preprocessor(batch, True)  # type: ignore[operator]
            arguments = ((), processed) if isinstance(processed, Mapping) else (tuple(processed), {})
            self._leaves, self._spec = pytree.tree_flatten(arguments)
            yield tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def restore(self, model: nn.Module) -> None:
        """Give a model its own class back."""
        model.__class__ = self._class


def _become(runner: Any, model: nn.Module, replacement: nn.Module) -> None:
    """Let ``model``, which runner, loops and hooks hold, be ``replacement``, and the optimizer train its parameters."""
    before = dict(model.named_parameters())
    vars(model).clear()
    vars(model).update(vars(replacement))
    after = dict(model.named_parameters())
    wrapper = getattr(runner, "optim_wrapper", None)
    if hasattr(wrapper, "param_groups"):
        _follow(wrapper, before, after)


def _follow(wrapper: Any, before: Mapping[str, Tensor], after: Mapping[str, nn.Parameter]) -> None:
    """Give every group the parameters of the same names; a bias that folding made goes where its weight is."""
    names = {id(parameter): name for name, parameter in before.items()}
    new_names = after.keys() - before.keys()
    optimizers = (
        [wrapped.optimizer for _, wrapped in wrapper.items()] if hasattr(wrapper, "items") else [wrapper.optimizer]
    )
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            remaining = [name for p in group["params"] if (name := names.get(id(p), "")) in after]
            added = [name for name in new_names if f"{name.rpartition('.')[0]}.weight" in remaining]
            group["params"] = [after[name] for name in [*remaining, *sorted(added)]]
