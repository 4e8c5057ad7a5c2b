"""BatchNorm goes into the layer that it follows in the data, and nowhere else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cp_debug.probes.trace import flatten_outputs
from cp_debug.programs.batchnorm_folding import fuse_model_bn
from cp_debug.programs.walk import run_module
from cp_debug.recipes.registry import load_model

CONVOLUTIONS = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "transposed": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def with_statistics(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, BatchNorms far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, NORMS) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.2, 4, generator=generator)
            if part.affine:
                nn.init.uniform_(part.weight, -2, 2, generator=generator)
                nn.init.normal_(part.bias, generator=generator)
    return module.eval()


def folded(module: nn.Module, *args: Tensor) -> nn.Module:
    """The folded copy; asserts that it computes the same."""
    with_statistics(module)
    before = copy.deepcopy(module.state_dict())
    made = fuse_model_bn(module, args)
    with torch.no_grad():
        expected, found = module(*args), made(*args)
    for a, b in zip(flatten_outputs(expected).values(), flatten_outputs(found).values(), strict=True):
        # Statistics of about 1 that cancel leave their own last places: a result of 0.006 was off by 2e-7.
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-6 * a.numel() ** 0.5
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    return made


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([*CONVOLUTIONS, "linear"]),
    dims=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_layer_with_its_batchnorm(kind, dims, channels, groups, bias, affine, seed) -> None:
    torch.manual_seed(seed)
    cin, cout = (c * groups for c in channels)
    if kind == "linear":
        layer: nn.Module = nn.Linear(cin, cout, bias=bias)
        norm: nn.Module = nn.BatchNorm1d(cout, affine=affine)
        x = torch.randn(5, cin)
    else:
        layer = CONVOLUTIONS[kind][dims - 1](cin, cout, 2, stride=2, groups=groups, bias=bias)
        norm = NORMS[dims - 1](cout, affine=affine)
        x = torch.randn(2, cin, *[4] * dims)
    made = folded(nn.Sequential(layer, norm, nn.ReLU(inplace=True)), x)
    grouped = kind == "transposed" and groups > 1
    assert made.folding.pairs == ([] if grouped else [("0", "1")])
    assert [n for n in made.folding.notes if "1: not folded, 0 is a transposed convolution in groups" in n] == (
        list(made.folding.notes)
    )
    assert isinstance(made[1], type(norm) if grouped else nn.Identity)


class Crossed(nn.Module):
    """Registered in another order than the data takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm_of_second, self.norm_of_first = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_of_second(self.second(self.norm_of_first(self.first(x)).relu()))


def test_pairs_follow_the_data_not_the_order() -> None:
    made = folded(Crossed(), torch.randn(2, 4, 3, 3))
    assert dict(made.folding.pairs) == {"first": "norm_of_first", "second": "norm_of_second"}


class Pillars(nn.Module):
    def __init__(self, permute: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.permute = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), permute

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if not self.permute:
            return self.norm(x)
        return self.norm(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1)


def test_linear_across_the_permutation_of_pillars() -> None:
    assert folded(Pillars(permute=True), torch.randn(5, 6, 3)).folding.pairs == [("linear", "norm")]


def test_batchnorm_along_another_axis_of_the_same_size_stays() -> None:
    made = folded(Pillars(permute=False), torch.randn(5, 6, 3))
    assert made.folding.pairs == []
    assert made.folding.notes == ["norm: not folded, the channels of linear do not lie on its channel axis"]


class Used(nn.Module):
    """The convolution's output goes to a BatchNorm and elsewhere."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), how

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        if self.how == "added":
            return self.norm(y) + y
        if self.how == "returned":
            return self.norm(y), y
        if self.how == "viewed":
            return self.norm(y.flatten(2).view_as(y)) + y.flatten(2).sum()
        if self.how == "called twice":
            return self.norm(y) + self.conv(x)
        if self.how == "norm called twice":
            return self.norm(self.norm(y))
        return self.norm(torch.relu(y))


@pytest.mark.parametrize("how", ["added", "returned", "viewed", "called twice", "norm called twice", "relu between"])
def test_what_is_used_elsewhere_is_not_folded(how: str) -> None:
    made = folded(Used(how), torch.randn(2, 3, 5, 5))
    assert made.folding.pairs == []
    assert len(made.folding.notes) == 1


def test_batchnorm_without_statistics_stays() -> None:
    made = folded(
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), torch.randn(2, 2, 4, 4)
    )
    assert made.folding.notes == ["1: not folded, it has no running statistics"]


def test_centerpoint_folds_whole() -> None:
    model = load_model("centerpoint:tiny")
    sample = next(iter(model.samples(1, 0, None)))
    results: dict[str, dict[str, np.ndarray]] = {}
    pairs = 0
    for component in model.components:
        assert component.module is not None
        inputs = model.feed(component, sample, results)
        results[component.name] = run_module(component, inputs)
        args = tuple(torch.from_numpy(inputs[name]) for name in component.input_names)
        made = fuse_model_bn(component.module, args)
        pairs += len(made.folding.pairs)
        assert not made.folding.notes
        with torch.no_grad():
            found = flatten_outputs(made(*args))
        for name, tensor in zip(component.output_names, found.values(), strict=True):
            expected = torch.from_numpy(results[component.name][name])
            assert (tensor - expected).norm() <= 2e-6 * expected.norm()
    assert pairs == 26
