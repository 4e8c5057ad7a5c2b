"""BatchNorms that were folded into the wrong convolutions are named, on networks with all kinds of neighbours."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cp_debug.bisect.engine import Options, bisect
from cp_debug.bisect.finding import Finding
from cp_debug.recipes.torch_callable import TorchModel
from cp_debug.reports.causes import lines


class Neck(nn.Module):
    """Two branches that meet, one behind a transposed convolution, and a head without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=1e-3)
        self.down, self.down_norm = nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6, eps=1e-3)
        self.up, self.up_norm = nn.ConvTranspose2d(6, 6, 2, 2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        up = self.up_norm(self.up(torch.sigmoid(self.down_norm(self.down(x)))))
        return self.head(torch.relu(up) + x)


class GroupedNeck(Neck):
    """Its transposed convolution has two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 6, 2, 2, groups=2, bias=False)


class Depthwise(nn.Module):
    """A chain of depthwise and pointwise convolutions of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.deep_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first_norm(self.first(x)))
        return self.point_norm(self.point(torch.relu(self.deep_norm(self.deep(x)))))


def trained(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = kind().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = 0.3 * torch.randn(part.num_features)
            part.running_var = 0.2 + 1.5 * torch.rand(part.num_features)
            part.weight.data = 0.2 + torch.rand(part.num_features)
            part.bias.data = 0.3 * torch.randn(part.num_features)
    return module


def folded(module: nn.Module, pairs: Mapping[str, Sequence[str]], wrong_axis: Sequence[str] = ()) -> nn.Module:
    """A copy with BatchNorms folded in FP32: each convolution's own, or those of ``pairs`` in its place."""
    result, parts = copy.deepcopy(module), dict(module.named_modules())
    for name, layer in result.named_children():
        own = [f"{name}_norm"] if f"{name}_norm" in parts else []
        for norm in (parts[path] for path in pairs.get(name, own)):
            assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
            assert isinstance(norm, nn.BatchNorm2d)
            assert norm.running_mean is not None
            assert norm.running_var is not None
            transposed = isinstance(layer, nn.ConvTranspose2d) is not (name in wrong_axis)
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transposed)
        if own:
            setattr(result, own[0], nn.Identity())
    return result


def findings(module: nn.Module, test: nn.Module, *, fold: bool = True) -> list[Finding]:
    example = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    models = [TorchModel("net", m, example) for m in (module, test)]
    options = Options(exporter="torchscript", folded=fold)
    return bisect(models[0], "torch,ort", test_model=models[1], options=options).tests[0].findings


@pytest.mark.parametrize("kind", [Neck, Depthwise])
def test_a_right_folding_is_not_accused(kind: type[nn.Module]) -> None:
    """Exporters leave the BatchNorm behind a transposed convolution, which then has the name of what is folded."""
    module = trained(kind)
    assert findings(module, folded(module, {})) == []


@pytest.mark.parametrize("fold", [False, True])
def test_a_batch_norm_of_zeros_and_ones_is_none_of_another_layer(fold: bool) -> None:
    """As every BatchNorm begins, so does one that was never loaded, and one that learnt nothing."""
    module = trained(Neck)
    test = copy.deepcopy(module)
    for norm in (module.down_norm, test.down_norm, test.up_norm):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_parameters()
        norm.eps = 1e-3
    (finding,) = findings(module, folded(test, {}) if fold else test, fold=fold)
    assert finding.cause != "batchnorm-pairing"
    assert "batchnorm-pairing" not in finding.evidence.get("one_of", [])


SWAPPED = {"first": ["down_norm"], "down": ["first_norm"]}
DEEP = {"deep": ["point_norm"], "point": ["deep_norm"]}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "pairs", "named"),
    [
        (Neck, SWAPPED, {"first_norm": "down_norm", "down_norm": "first_norm"}),
        (Neck, {"up": ["first_norm"]}, {"up_norm": "first_norm"}),
        (Neck, {"head": ["up_norm"]}, {"head": "up_norm"}),
        (Neck, {"down": ["down_norm", "up_norm"]}, {"down_norm": "up_norm"}),
        (Depthwise, DEEP, {"deep_norm": "point_norm", "point_norm": "deep_norm"}),
        (Depthwise, {"point": ["first_norm"]}, {"point_norm": "first_norm"}),
    ],
)
def test_whose_batch_norm_was_folded_is_named(
    kind: type[nn.Module], pairs: dict[str, list[str]], named: dict[str, str]
) -> None:
    module = trained(kind, seed=3)
    (finding,) = findings(module, folded(module, pairs))
    assert finding.cause == "batchnorm-pairing"
    assert finding.evidence.get("pairs", {finding.layers[0]: finding.evidence["batchnorm_of"]}) == named
    assert all(other in finding.says for other in named.values())
    assert sorted(finding.layers) == sorted(named)
    assert finding.explained is not None
    assert finding.explained > 0.99


@pytest.mark.few(1)
@pytest.mark.parametrize(("kind", "norm"), [(Neck, "up_norm"), (Neck, "down_norm"), (GroupedNeck, "up_norm")])
def test_a_transposed_convolution_scaled_along_the_wrong_axis(kind: type[nn.Module], norm: str) -> None:
    module = trained(kind, seed=4)
    (finding,) = findings(module, folded(module, {"up": [norm]}, wrong_axis=["up"]))
    assert finding.layers == ["up_norm"]
    assert "input channels" in finding.says
    assert finding.evidence.get("batchnorm_of", "up_norm") == norm


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bias", "BatchNorm: folded without the bias in front of it"),
        ("variance", "BatchNorm: folded by its variance instead of the root of it"),
        ("any", "6 of 6 channels are off by a constant each"),
    ],
)
def test_what_a_folding_does_wrong_goes_before_how_it_changes_the_weights(kind: str, says: str) -> None:
    module = trained(Neck)
    norm = module.down_norm
    assert isinstance(norm, nn.BatchNorm2d)
    before, root = copy.deepcopy(module), torch.sqrt(norm.running_var + norm.eps)  # type: ignore[operator]
    with torch.no_grad():
        if kind == "variance":
            before.down_norm.running_var.copy_(root**4 - norm.eps)  # type: ignore[operator, union-attr]
        test = folded(before, {})
        if kind == "bias":
            test.down.bias -= module.down.bias * norm.weight / root  # type: ignore[operator, union-attr]
        if kind == "any":
            test.down.bias += torch.randn(6)  # type: ignore[operator, union-attr]
    (finding,) = findings(module, test, fold=False)
    assert finding.says.startswith(says)


def test_swapped_parameters_of_nodes_are_named_too() -> None:
    module = trained(Neck, seed=5)
    test = copy.deepcopy(module)
    test.first_norm, test.up_norm = test.up_norm, test.first_norm
    (finding,) = findings(module, test, fold=False)
    assert finding.cause == "batchnorm-pairing"
    assert finding.evidence["pairs"] == {"first_norm": "up_norm", "up_norm": "first_norm"}


def test_a_layer_whose_norm_has_zeros_as_weights_is_read_from_the_module() -> None:
    module = trained(Neck, seed=6)
    module.get_parameter("first_norm.weight").data[:3] = 0
    (finding,) = findings(module, folded(module, {"first": ["down_norm"]}))
    assert finding.evidence["batchnorm_of"] == "down_norm"


def test_of_equal_batch_norms_none_is_chosen() -> None:
    module = trained(Neck, seed=7)
    module.up_norm.load_state_dict(module.down_norm.state_dict())  # type: ignore[union-attr]
    module.up_norm.eps = module.down_norm.eps  # type: ignore[union-attr]
    (finding,) = findings(module, folded(module, {"first": ["down_norm"]}))
    assert finding.evidence["batchnorm_of"] == "down_norm or up_norm"


def test_parameters_of_no_layer_of_the_network_are_no_wrong_pairing() -> None:
    module, other = trained(Neck, seed=8), trained(Neck, seed=9)
    test = copy.deepcopy(module)
    test.down_norm = other.down_norm
    assert {f.cause for f in findings(module, test)} == {"batchnorm-statistics"}


def test_evidence_is_told_in_words() -> None:
    pairs = {f"conv{place}": f"norm{place}" for place in range(6)}
    shares = {"overflows": 6.1e-4, "vanishes": 0.0}
    evidence = {**shares, "pairs": pairs, "declared": True, "clipped": False}
    finding = Finding("x", "says", ["conv0"], ["Conv"], evidence=evidence)
    (text,) = (text for label, text in lines(finding) if label == "evidence")
    assert "BatchNorm taken from conv0: norm0, conv1: norm1, conv2: norm2, conv3: norm3 and 2 more" in text
    assert text.startswith("0.06% of the values overflow; BatchNorm taken from")
    assert text.endswith("and 2 more; not clipped")
    assert not set(text) & set("{}'")
