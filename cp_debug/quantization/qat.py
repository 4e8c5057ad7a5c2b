"""Quantization-aware training: fine-tune a quantized module, so that its weights fit the grid that they are put on.

The start is calibrated, the scales stay as they are, and so does BatchNorm: its running statistics belong to FP32, and
updating them on fake-quantized activations destroys the network within a few steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cp_debug.display import OnStep
from cp_debug.errors import Damage, InputError, Terminated
from cp_debug.files import complete_path
from cp_debug.programs.torch_layers import is_quantized
from cp_debug.reading import load_plain, readable
from cp_debug.serialize import JsonForm

B = TypeVar("B")
FORMAT = "cpdebug QAT state 1"
CLIP = 35.0
"""Largest norm of a gradient, as mmdet3d trains CenterPoint."""


@dataclass(frozen=True)
class QatOptions:
    """Options of fine-tuning: ``steps`` of Adam, whose ``rate`` falls to 0 along a cosine.

    Every ``interval`` steps the module is validated; training ends when ``patience`` validations brought nothing
    better.
    """

    steps: int = 300
    rate: float = 5e-4
    interval: int = 50
    patience: int = 4

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("interval", 1), ("patience", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if not 0 < self.rate < 1:
            raise InputError(f"the learning rate is {self.rate:g}; expected one between 0 and 1")


class Validation(NamedTuple):
    """One validation; ``step`` 0 is the start."""

    step: int
    """Steps done."""
    training_loss: float
    """Mean over the steps since the validation before."""
    validation: float


@dataclass
class QatResult(JsonForm):
    """Record of a fine-tuning. The module holds the best weights."""

    history: list[Validation] = field(metadata={"written": False})
    ended: str
    """``steps``, ``patience`` or ``interrupted``."""

    @property
    def best(self) -> tuple[int, float]:
        """Steps done and validation where it was lowest, the earliest of equals."""
        best = min(self.history, key=lambda each: each.validation)
        return best.step, best.validation

    def derived(self) -> dict[str, Any]:
        """The validations with the names of their figures, and the first and the best of them."""
        step, value = self.best
        history = [each._asdict() for each in self.history]
        return {"best_step": step, "best": value, "start": self.history[0].validation, "history": history}


@dataclass
class _TrainingState:
    """The state that training goes on from."""

    step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    history: list[Validation] = field(default_factory=list)


def finetune(
    module: nn.Module,
    batch: Callable[[int], B],
    loss: Callable[[nn.Module, B], Tensor],
    validate: Callable[[nn.Module], float],
    options: QatOptions = QatOptions(),
    *,
    state: Path | None = None,
    resume: bool = False,
    on_step: OnStep = lambda text, done, total: None,
) -> QatResult:
    """Train ``module``, which is quantized and calibrated, in place; it ends in eval mode with its best weights.

    ``batch`` of a step's number gives that step's data, the same each time, so that a resumed run repeats nothing and
    skips nothing. ``validate`` is given the module in eval mode; lower is better, and the start counts. ``state`` is
    written at every validation; ``resume`` goes on from it with the same options. Ctrl-C ends training and keeps the
    best.

    ``loss`` gives a scalar that torch can differentiate.

    Raises InputError for a module that is not quantized, a loss that is not finite, and a state that is missing or of
    another run.
    """
    if not is_quantized(module):
        raise InputError(f"{type(module).__name__} is not quantized; expected one that `cpdebug quantize ptq` made")
    parameters = _unfreeze(module)
    optimizer = torch.optim.Adam(parameters, lr=options.rate)
    progress = _TrainingState()
    if resume:
        progress = _load(module, optimizer, options, state)
    ended = "steps"
    try:
        if not progress.history:
            _validate(module, validate, progress, math.nan)
        total = 0.0
        while progress.step < options.steps:
            if _stale(progress.history) >= options.patience:
                ended = "patience"
                break
            done_steps, lowest = progress.step, min(each.validation for each in progress.history)
            on_step(f"fine-tuning, validation {lowest:.4g} at best", done_steps, options.steps)
            for group in optimizer.param_groups:
                group["lr"] = options.rate * (1 + math.cos(math.pi * done_steps / options.steps)) / 2
            module.train()
            freeze_batchnorm(module)
            value = loss(module, batch(done_steps))
            if not bool(value.isfinite()):
                why = f"the loss is {value.item()}; lower the learning rate or look at the data"
                raise InputError(f"step {done_steps}: {why}")
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            total += value.item()
            progress.step += 1
            if progress.step % options.interval == 0 or progress.step == options.steps:
                _validate(module, validate, progress, total / (progress.step - progress.history[-1][0]))
                total = 0.0
                if state:
                    _save(module, optimizer, options, progress, state)
    except Terminated:
        raise
    except KeyboardInterrupt:
        if not progress.history:
            raise
        ended = "interrupted"
    module.load_state_dict(progress.best)
    module.eval().requires_grad_(False)
    return QatResult(progress.history, ended)


def freeze_batchnorm(module: nn.Module) -> None:
    """Let every BatchNorm keep its statistics and weights, whatever mode its module is in next."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval().requires_grad_(False)


def _unfreeze(module: nn.Module) -> list[nn.Parameter]:
    module.requires_grad_(True)
    freeze_batchnorm(module)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _validate(
    module: nn.Module, validate: Callable[[nn.Module], float], progress: _TrainingState, trained: float
) -> None:
    module.eval()
    with torch.no_grad():
        value = validate(module)
    if not progress.history or value < min(each.validation for each in progress.history):
        progress.best = copy.deepcopy(module.state_dict())
    progress.history.append(Validation(progress.step, trained, value))


def _stale(history: list[Validation]) -> int:
    """Validations since the best one."""
    values = [each.validation for each in history]
    return len(values) - 1 - values.index(min(values))


def _save(
    module: nn.Module, optimizer: torch.optim.Optimizer, options: QatOptions, progress: _TrainingState, path: Path
) -> None:
    with complete_path(path) as partial:
        torch.save(
            {
                "format": FORMAT,
                "options": asdict(options),
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                **vars(progress),
                "history": [tuple(each) for each in progress.history],
            },
            partial,
        )


def _load(
    module: nn.Module, optimizer: torch.optim.Optimizer, options: QatOptions, path: Path | None
) -> _TrainingState:
    if path is None or not path.is_file():
        raise InputError(f"--resume: there is no state {path or ''}".rstrip() + "; start without it")
    with readable(f"--resume: {path}", "a state of this fine-tuning"):
        saved: dict[str, Any] = load_plain(path)
        if saved["format"] != FORMAT:
            raise Damage(f"its format is {saved['format']!r}")
        for name in ("rate", "steps", "interval"):
            if saved["options"][name] != getattr(options, name):
                raise InputError(
                    f"--resume: {path} has {name} {saved['options'][name]:g}, not {getattr(options, name):g}"
                )
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        return _TrainingState(saved["step"], saved["best"], [Validation(*entry) for entry in saved["history"]])
