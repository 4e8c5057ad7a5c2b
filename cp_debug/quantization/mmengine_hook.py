"""Quantization-aware training in mmengine's runner, for models that are trained with mmdet3d.

In a configuration: ``custom_imports = dict(imports=["cp_debug.quantization.mmengine_hook"])`` and
``custom_hooks = [dict(type="QATHook", sensitive_layers=["pts_voxel_encoder"])]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cp_debug.errors import InputError
from cp_debug.optional import require
from cp_debug.programs.torch_layers import is_quantized
from cp_debug.quantization.checkpoint import entry_of, rebuild
from cp_debug.quantization.histogram import check_method
from cp_debug.quantization.ptq import quantize_ptq
from cp_debug.quantization.qat import freeze_batchnorm
from cp_debug.quantization.record import quantization_of
from cp_debug.safe_text import amount

require("mmengine", "mmdet3d")

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import is_model_wrapper  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402

KEY = "cpdebug_quantization"
"""Key of a checkpoint, beside ``state_dict``, that tells what of the model is quantized and how."""


@HOOKS.register_module()
class QATHook(Hook):
    """Quantizes the runner's model before training, calibrated on its own training data.

    ``calibration_batches``: how many batches, all of them for None, 0 or less. ``calibration_epoch``: the epoch in
    front of which the model is folded, calibrated and quantized; before it trains in FP32. ``freeze_bn``: fold
    BatchNorm where that is possible and keep the others in eval mode from then on. ``sensitive_layers``: globs over
    module paths that stay in FP32. ``amax_method``: ``max``, ``percentile``, ``mse`` or ``entropy``.
    ``quant_backbone``, ``quant_neck``, ``quant_head`` and ``quant_voxel_encoder``: whether ``pts_backbone``,
    ``pts_neck``, ``pts_bbox_head`` and ``pts_voxel_encoder``, where the model has them, are quantized. ``keep_fp16``
    is AWML's later name of ``sensitive_layers``. Sums and linear layers are quantized wherever there are some, so
    ``quant_add``, ``quant_linear_backbone`` and ``disable_recipes`` change nothing, and the log says so where they
    are given. A checkpoint of such a run holds scales and folding; resuming from it, or loading it, restores them and
    calibrates nothing.

    Hooks that copied the model before training (``EMAHook``) hold the FP32 one. Raises InputError for an unknown
    method, a glob that matches nothing, a ``calib_cache_path``, and a model that is wrapped for several processes.
    """

    def __init__(
        self,
        calibration_batches: int | None = 100,
        calibration_epoch: int = 0,
        freeze_bn: bool = True,
        sensitive_layers: Collection[str] | None = None,
        amax_method: str = "mse",
        quant_backbone: bool = True,
        quant_neck: bool = True,
        quant_head: bool = True,
        quant_voxel_encoder: bool = True,
        quant_add: bool | None = None,
        quant_linear_backbone: bool | None = None,
        calib_cache_path: str | None = None,
        keep_fp16: Collection[str] | None = None,
        disable_recipes: Collection[str] | None = None,
    ) -> None:
        check_method(amax_method, "QATHook: amax_method")
        if calib_cache_path is not None:
            raise InputError(
                f"QATHook: calib_cache_path: {calib_cache_path!r} is not read; leave it out (scales come from "
                "calibration, or with load_from from a checkpoint that has them)"
            )
        for name, globs in (("sensitive_layers", sensitive_layers), ("keep_fp16", keep_fp16)):
            if isinstance(globs, str) or not all(isinstance(glob, str) for glob in globs or ()):
                raise InputError(f"QATHook: {name} is {globs!r}; expected a list of module paths")
        if calibration_epoch < 0:
            raise InputError(f"QATHook: calibration_epoch is {calibration_epoch}; expected at least 0")
        self.calibration_batches = calibration_batches if calibration_batches and calibration_batches > 0 else None
        self.freeze_bn = freeze_bn
        self.calibration_epoch = calibration_epoch
        self.sensitive_layers = sorted({*(sensitive_layers or ()), *(keep_fp16 or ())})
        self.amax_method = amax_method
        given = {
            "quant_add": quant_add,
            "quant_linear_backbone": quant_linear_backbone,
            "disable_recipes": disable_recipes or None,
        }
        self.idle = [name for name, value in given.items() if value is not None]
        self.parts = {
            "pts_voxel_encoder": quant_voxel_encoder,
            "pts_backbone": quant_backbone,
            "pts_neck": quant_neck,
            "pts_bbox_head": quant_head,
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Give the model the quantizers of the checkpoint, so that its weights fit."""
        if KEY in checkpoint and not is_quantized(model := _model(runner)):
            entry = {**checkpoint[KEY], "state_dict": checkpoint["state_dict"]}
            _become(runner, model, rebuild(model, entry, "QATHook: the checkpoint"))

    def before_train(self, runner: Any) -> None:
        """Check that training reaches the epoch of calibration, which is done here where it is the first.

        Raises InputError where training ends before.
        """
        _model(runner)
        if self.idle:
            runner.logger.warning(f"QATHook: without effect here: {', '.join(self.idle)}")
        last = getattr(runner, "max_epochs", None)
        if last is not None and self.calibration_epoch >= last:
            raise InputError(
                f"QATHook: calibration_epoch is {self.calibration_epoch}; training ends after {last} epochs"
            )
        if runner.epoch >= self.calibration_epoch:
            self._quantize(runner)

    def before_train_epoch(self, runner: Any) -> None:
        """Fold, calibrate and quantize in front of the epoch that was asked for."""
        if runner.epoch == self.calibration_epoch:
            self._quantize(runner)

    def _quantize(self, runner: Any) -> None:
        """Fold, calibrate and quantize, unless that is done, or a checkpoint has brought it all."""
        model = _model(runner)
        if is_quantized(model):
            return
        model.eval()
        quantized = quantize_ptq(
            model,
            _arguments(model, runner.train_dataloader),
            self.calibration_batches,
            method=self.amax_method,
            fold=self.freeze_bn,
            skip_layers=[*self.sensitive_layers, *self._unquantized(model)],
            forward_fn=_training_loss,
        )
        _become(runner, model, quantized)
        about = quantization_of(model)
        runner.logger.info(f"QATHook: {amount(len(about.layers), 'layer')} in INT8, {len(about.skipped)} in FP32")

    def _unquantized(self, model: nn.Module) -> list[str]:
        """Parts that stay in FP32, of those that the model has."""
        return [part for part, quantized in self.parts.items() if not quantized and hasattr(model, part)]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Put the remaining BatchNorm into eval mode: the loop has put the whole model into train mode."""
        if self.freeze_bn and is_quantized(model := _model(runner)):
            freeze_batchnorm(model)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Write beside the weights what is quantized, once it is; scales are among the weights."""
        if not is_quantized(model := _model(runner)):
            return
        entry = entry_of(model)
        checkpoint[KEY] = {name: value for name, value in entry.items() if name != "state_dict"}


def _model(runner: Any) -> nn.Module:
    if is_model_wrapper(runner.model):
        raise InputError(
            f"QATHook: the model is wrapped in {type(runner.model).__name__}, which knows its parameters already; "
            "train in one process"
        )
    return runner.model


def _training_loss(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Training losses of the model for a preprocessed batch."""
    args, kwargs = arguments
    return model(*args, **kwargs, mode="loss")


def _arguments(model: nn.Module, batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each batch as positional and named arguments of the model's forward."""
    for batch in batches:
        with torch.no_grad():
            processed: Any = model.data_preprocessor(batch, True)  # type: ignore[operator]
        yield ((), dict(processed)) if isinstance(processed, Mapping) else (tuple(processed), {})


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
