"""A torch module against what ONNX Runtime makes of it, and the same file with its graph optimized."""

import torch
from torch import nn

import cp_debug


class Classifier(nn.Module):
    """A network of your own; its input is a mapping, as many data loaders give it."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.SiLU())
        self.head = nn.Linear(16, 10)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = self.features(batch["image"]).mean((2, 3))
        return {"logits": self.head(features)}


def main() -> None:
    torch.manual_seed(0)
    inputs = {"batch": {"image": torch.randn(2, 3, 32, 32)}}
    result = cp_debug.diagnose(Classifier().eval(), "torch,ort,ort-all,emu-fp16", inputs=inputs)
    print(result)  # a line for each test, and why
    print(result.layers[["name", "op", "introduced", "expected", "excess"]])
    result.write_html("classifier.html")


if __name__ == "__main__":
    main()
