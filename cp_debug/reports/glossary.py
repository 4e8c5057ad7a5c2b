"""The words that tables, findings and pages use, each in a sentence or two. ``docs/glossary.md`` is made of it."""

from __future__ import annotations

import re

GLOSSARY: dict[str, str] = {
    "backend": "A library with a precision and a device that runs the network: `torch`, `ort-all`, `trt-fp16@cuda:0`.",
    "reference, test": "The first backend of `-b` is the reference. Each of the others is a test, compared with it.",
    "recipe": "How a model is loaded, fed and decoded, for example `centerpoint:tiny`; `cpdebug models` lists them.",
    "component": "A part of a model that is exported and deployed separately, such as an encoder or a head.",
    "stage": "A block of a component, judged by its last tensor. Each stage is a row of the first table.",
    "layer": "An operator of the deployed graph with the parts that exporters split off, such as a convolution and its "
    "bias.",
    "region": "Several layers that an engine runs as one kernel. The values between them cannot be seen.",
    "value": "A tensor that the graph computes. Its name in the deployed ONNX graph is its name on every backend.",
    "probe": "A point where a value is read while the network runs.",
    "capture": "All tensors of one run, on disk, with all that is needed to compare them on another machine.",
    "dump": "Tensors written by another program: a C++ runtime, Polygraphy, a debug build of ONNX Runtime.",
    "sample": "One set of inputs. Each row of a table shows the worst of all samples.",
    "op, operator": "What a layer computes, with its ONNX name: `Conv`, `Gemm`, `Relu`.",
    "verdict": "The judgement on a layer: ok, inherited, guilty, divergent or shape.",
    "divergence": "Test minus reference. It holds the layer's own error and the error of its inputs.",
    "max |Δ|": "The largest absolute difference between test and reference, in the unit of the tensor.",
    "mean |Δ|": "The mean of the absolute differences between test and reference.",
    "rel. L2": "Relative L2: the L2 norm of the difference, divided by the L2 norm of the reference.",
    "cosine": "The cosine of the angle between the two tensors as vectors: 1 if they point in the same direction.",
    "SQNR": "Signal to quantization noise ratio in dB: −20 · log10 of the relative L2 distance. 20 dB more means a "
    "tenth of the error.",
    "oracle": "A computation of one layer from the inputs that it really had in the test: in FP64 if both sides claim "
    "FP32, else in FP32. Its result is the correct output.",
    "replay": "Computing a layer again on the oracle, with its own captured inputs. It separates the error of the "
    "layer from the error of its inputs.",
    "introduced": "Test minus oracle: the error of this layer alone, as relative L2.",
    "inherited": "Oracle minus reference: the error that came in with the layer's inputs. As a verdict: the layer is "
    "beyond the tolerance, but the error comes from earlier layers.",
    "expected": "The error that the claimed precision must make in this layer, found by emulation on the same inputs.",
    "excess": "Introduced ÷ expected. About 1 is rounding; above 4 the layer is guilty.",
    "amplifies": "The factor by which a layer enlarges the relative error of its inputs.",
    "NaN, Inf": "Not a number, such as Inf − Inf; and a number beyond the range of the precision. The layer that makes "
    "them from finite values is guilty. Its figures are those of the finite values.",
    "overflow, underflow": "A number becomes Inf above the largest number of a precision, and 0 below the smallest.",
    "roundoff": "The largest relative error when one number is rounded to a precision: 5e-4 in FP16, 6e-8 in FP32.",
    "accused": "Guilty, divergent or of another shape on some backend.",
    "ok": "A verdict: the layer is within the tolerance.",
    "guilty": "A verdict: the layer introduced more than its precision explains.",
    "divergent": "A verdict: the layer is beyond the tolerance, and it could not be replayed.",
    "shape": "A verdict: the two tensors have different shapes.",
    "tolerance": "The largest max |Δ| that counts as equal: `atol` + `rtol` × the largest value of the reference. "
    "Indices, ids, counts and masks have no tolerance: integers must be equal, unless `--atol` is 1 or more. Only "
    "the levels of a quantizer are rounded.",
    "limit": "The relative L2 that `verify` allows for an output: eight times the noise that its precision predicts, "
    "or `--tolerance`; 0 for integers, which must be equal. The column `of the limit` shows how much of it is "
    "used.",
    "share": "The part of the final divergence that this layer's own error makes. The shares of all layers and of the "
    "reference's own rounding add up to 1, less what is not linear. Errors that cancel each other have shares "
    "beyond 1 and below 0. In FP32 there are none "
    "where every layer is right and within the tolerance.",
    "cause, finding": "A known mechanism that explains the error of guilty layers, with its evidence, its effect and a "
    "fix.",
    "evidence": "What supports a cause: the share of the introduced error that it reproduces, the next best cause with "
    "its share, and the figures from which it was read.",
    "the rounding adds up": "No layer introduces more than its precision explains, and still an output is beyond the "
    "tolerance: many small errors together. Only a higher precision or a wider tolerance helps.",
    "alignment": "Which value of the graph is which tensor of the torch module, verified in a run. A leaf module "
    "contains no other modules. A folded one has no separate node in the graph.",
    "generated inputs": "Inputs that cpdebug generates if you give none. They are drawn from `--seed` and fit the "
    "graph (an image, token ids, a mask); a note says which. `--inputs` takes your own.",
    "risk": "In `check`: what will go wrong in a lower precision, judged from weights, sums and one sample, before any "
    "run.",
    "trial": "One run of a search, with some layers in FP32. With TensorRT, each trial builds an engine.",
    "bundle": "An archive with the failing part of the graph, its captured inputs and a script that shows the failure.",
    "observer gap": "The difference between the outputs of a run with probes and of one without: does looking change "
    "the program?",
    "FP32 noise": "The distance between the network in FP32 and the same network in FP64 at an output, as relative L2.",
    "noise floor": "The distance between two runs of the same backend, or between runs with different numbers of "
    "threads.",
    "FP32, FP64": "Floating point of 32 and 64 bits: 24 and 53 bits of mantissa, relative rounding 6e-8 and 1e-16.",
    "FP16": "Floating point of 16 bits: 11 bits of mantissa (relative rounding 5e-4), nothing beyond 65504.",
    "BF16": "Floating point of 16 bits with FP32's range and 8 bits of mantissa: relative rounding 4e-3.",
    "TF32": "The precision that tensor cores use for FP32 operands: FP32's range, 11 bits of mantissa. PyTorch and "
    "TensorRT may use it without being asked.",
    "accumulation": "The sum inside a convolution or a matrix product. In FP16 the sum loses more than rounding the "
    "result.",
    "INT8": "Integers from −128 to 127 with a scale: value ≈ scale × integer.",
    "scale": "The distance between two neighbouring INT8 levels. Values beyond 127 levels are clipped.",
    "amax": "The largest absolute value that a scale can represent: 127 times the scale.",
    "step": "The INT8 scale of the layer's input.",
    "clipped": "The part of the layer's input beyond amax. All of it becomes the last level.",
    "Q/DQ": "QuantizeLinear and DequantizeLinear: a pair of ONNX operators that marks where INT8 begins and ends.",
    "PTQ, QAT": "Post-training quantization: INT8 from calibration alone. Quantization-aware training: the rounded "
    "network is trained further.",
    "calibration": "Choosing scales from samples that run through the network.",
    "fake quantizer": "A torch module that rounds to INT8 levels and continues in FP32.",
    "folding": "Computing constants at export time: BatchNorm becomes part of the weights in front of it.",
    "opset": "The version of ONNX's operators that a file is written in. TensorRT 8 reads up to 17.",
    "free axis": "An axis of an input whose size the graph leaves open, such as the batch.",
    "NCHW, NHWC": "Order of an image's axes: batch, channels, height, width; or batch, height, width, channels.",
    "engine": "The program that TensorRT builds from a graph for one type of GPU.",
    "tactic, kernel": "The routine that computes a layer. TensorRT measures several and picks one; they round "
    "differently.",
    "knobs": "Steps of an optimizer: ONNX Runtime's graph transformers; decompositions, passes and lowerings of "
    "torch.compile; properties of OpenVINO's CPU plug-in. `--knobs` switches them off to find the one that is "
    "responsible.",
    "pairing": "Finding which values of two graphs correspond: by name, by their numbers, by structure.",
    "side value": "A value that carries no data of the network: a folded constant, or a shape.",
    "emulated": "Computed on this machine in FP32, with operands, results and sums rounded as hardware rounds them.",
    "p50, p95, p99": "Percentiles: 50, 95 or 99 of 100 figures are below it. Of passes: latency in milliseconds; of "
    "the samples of a sweep: an excess or an error.",
    "median, worst": "Of a figure over the samples of a sweep; `worst on` names the sample with the largest one.",
    "robust z": "How far a sample stands out: its distance above the median in robust standard deviations, on a "
    "logarithmic scale.",
    "× reference": "Latency of a backend divided by that of the first one: below 1 is faster.",
    "mAP, NDS": "Mean average precision and the nuScenes detection score: the quality of the boxes, 0 to 1.",
    "AP": "Average precision of one class, 0 to 1: the mean over the distances 0.5, 1, 2 and 4 m within which a "
    "detection counts as found, which have a column each.",
    "BEV, 3D": "AP where a detection must overlap an object by 0.5 or 0.7 (intersection ÷ union), from above or in "
    "space.",
    "ATE, ASE, AOE, AVE, AAE": "nuScenes' errors of the objects that were found: place in metres, size (1 − overlap), "
    "direction in radians, speed in m/s, attributes (1 − accuracy). An m in front: the mean over the classes.",
    "found": "Objects with a detection of their class within 2 m, of all objects.",
    "Δ": "A test's metric minus the reference's. In brackets its 95 % interval over draws of the samples.",
    "T4's metric": "Figures of Autoware's own evaluation, for data sets in T4's format.",
    "mixed-precision search": "Finding as few layers as possible to keep in FP32, none of them needless, so that a "
    "goal holds.",
    "goal": "What a search must reach: limits on figures, such as `rel_l2<1e-3 and boxes_lost==0`.",
    "layers kept": "Layers that a trial of a search left in FP32, of all that could be lowered.",
    "without it": "Search: what the goal's figure becomes when this layer is lowered, too.",
    "needed": "Sweep of a search: on how many samples the layer had to be kept.",
    "back, lost, gained, moved": "Sweep of ablations: boxes that the test loses and finds with these layers exact; "
    "that are still lost; that the reference has not; whose place or score changed.",
    "introduces": "Search and predict: the error that a layer would make by itself in the lower precision, emulated.",
    "from … to": "Predict: the interval of the figure in front of it, over all kernels that the engine may choose.",
    "largest": "Predict: the largest magnitude of the layer's result in FP32. FP16 ends at 65504.",
    "keep in FP32": "Predict: why this layer should stay in FP32, where it should.",
    "error alone, error without": "Sensitivity: relative L2 of the outputs with this layer alone in INT8, and with all "
    "layers in INT8 but this one.",
    "optimizer": "ONNX Runtime's graph transformer. `rel. L2 alone` is what it changes when no other runs; `rewrites` "
    "names nodes before and after.",
    "held-out loss": "QAT: the loss on samples that are not trained on.",
}
"""Word, or words that belong together → explanation, in the order in which a reader meets them."""


def anchor(words: str) -> str:
    """The name that links to an entry use: ``rel. L2`` → ``rel-l2``."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("δ", "delta")).strip("-")


def as_markdown() -> str:
    """The page ``docs/glossary.md``."""
    entries = [f'<a id="{anchor(words)}"></a>**{words}**: {text}\n' for words, text in GLOSSARY.items()]
    return "\n".join(["# Glossary\n", "Words that tables, findings and pages use.\n", *entries])
