"""The words that tables, findings and pages use, each in a sentence or two. ``docs/glossary.md`` is made of it."""

from __future__ import annotations

import re

GLOSSARY: dict[str, str] = {
    "backend": "A library with a precision and a device that runs the network: `torch`, `ort-all`, `trt-fp16@cuda:0`.",
    "reference, test": "The first backend of `-b` is what the others are compared with; each of the others is a test.",
    "recipe": "How a model is got, fed and decoded: `centerpoint:tiny`, say; `cpdebug models` lists them.",
    "component": "A part of a model that is exported and deployed by itself, such as an encoder and a head.",
    "stage": "A coarse cut of a component, seen at its last tensor: a row of the first table.",
    "layer": "An operator of the deployed graph with what exporters split off it: a convolution and its bias, say.",
    "region": "Several layers that an engine runs as one kernel, so that nothing between them can be looked at.",
    "value": "A tensor that the graph computes. It has the same name on every backend: that of the deployed "
    "ONNX graph.",
    "probe": "A place where a run is looked at: the value is handed out while the network runs.",
    "capture": "All tensors of one run on disk, with what is needed to compare them on another machine.",
    "dump": "Tensors that another program wrote: a C++ runtime, Polygraphy, ONNX Runtime's own debug build.",
    "sample": "One set of inputs. Each row of a table is the worst of all samples.",
    "op, operator": "What a layer computes, by ONNX's name: `Conv`, `Gemm`, `Relu`.",
    "verdict": "What is said of a layer: ok, inherited, guilty, divergent or shape.",
    "divergence": "Test minus reference, of whatever origin: what a layer got wrong and what it was given wrong.",
    "max |Δ|": "The largest absolute difference between test and reference, in the tensor's own unit.",
    "mean |Δ|": "The mean of the absolute differences between test and reference.",
    "rel. L2": "Relative L2: the root of the sum of squared differences, divided by that of the reference's squares.",
    "cosine": "The cosine of the angle between the two tensors taken as vectors: 1 where they point the same way.",
    "SQNR": "Signal to quantization noise ratio in dB: −20 · log10 of the relative L2 distance. 20 dB more is a tenth.",
    "oracle": "A computation of one layer, in FP64 where both sides claim FP32, else in FP32, from the inputs that the "
    "layer really had in the test. It tells what the layer should have given, as exactly as the test can be judged.",
    "replay": "Computing a layer again on the oracle with its own captured inputs. It separates what a layer did from "
    "what it was given.",
    "introduced": "Test minus oracle: the error that this very layer made, relative L2.",
    "inherited": "Oracle minus reference: the error that came with the layer's inputs. As a verdict: beyond the "
    "tolerance, but from above.",
    "expected": "The error that the claimed precision must make in this layer, found by emulating it on the "
    "same inputs.",
    "excess": "Introduced ÷ expected. About 1 is rounding; beyond 4 the layer is guilty.",
    "amplifies": "By which factor a layer enlarges the relative error of its inputs.",
    "NaN, Inf": "Not a number, such as Inf − Inf; and a number beyond the precision's range. They are born in the "
    "layer that makes them of finite values: that layer is guilty, and its figures are of the finite values alone.",
    "overflow, underflow": "Becoming Inf beyond the largest number of a precision; becoming 0 below the smallest.",
    "roundoff": "The largest relative error of rounding one number to a precision: 5e-4 in FP16, 6e-8 in FP32.",
    "accused": "Guilty, divergent or of another shape on some backend.",
    "ok": "A verdict: the layer is within the tolerance.",
    "guilty": "A verdict: the layer introduced more than its precision explains.",
    "divergent": "A verdict: beyond the tolerance, and nobody could replay the layer.",
    "shape": "A verdict: the two tensors have different shapes.",
    "tolerance": "The largest max |Δ| that is taken as equal: `atol` + `rtol` × the largest value of the reference. "
    "Indices, ids, counts and masks have none: integers must be equal, or within an `--atol` of 1 or more that "
    "somebody gave; only levels of a quantizer are rounded.",
    "limit": "What `verify` allows an output, as relative L2: eight times the noise that its precision "
    "predicts there, or `--tolerance`; 0 for integers, which must be equal. The column `of the limit` says how "
    "much of it is used.",
    "share": "The part of the final divergence that goes away when this layer's own error is taken out.",
    "cause, finding": "A known mechanism that explains what guilty layers introduced, with its evidence, effect "
    "and fix.",
    "evidence": "What a cause rests on: the share of the introduced error that it reproduces when the layer is "
    "computed so, the next best cause with its share, and the figures that it was read from.",
    "the rounding adds up": "No layer introduces more than its precision explains, and still an output is beyond the "
    "tolerance: many small errors together. Only a higher precision or a wider tolerance helps.",
    "alignment": "Which value of the graph is which tensor of the torch module, verified in a run. A leaf module is "
    "one that holds no others; one that is folded has no node of its own any more.",
    "made-up inputs": "Inputs that nobody gave: drawn from `--seed`, of the kind that the graph shows (an image, token "
    "ids, a mask); a note says which. Give `--inputs` for your own.",
    "risk": "Check: what will go wrong in a lower precision, told from weights, sums and one sample, before any run.",
    "trial": "One run of a search, with some layers in FP32; on TensorRT it is a build of an engine.",
    "bundle": "An archive with the failing part of the graph, its captured inputs and a script that shows the failure.",
    "observer gap": "The difference that looking makes: outputs of a run with probes against one without.",
    "FP32 noise": "How far the network in FP32 is from the same network in FP64 at an output, relative L2.",
    "noise floor": "How far a backend is from itself when it runs again, or with another number of threads.",
    "FP32, FP64": "Floating point of 32 and 64 bits: 24 and 53 bits of mantissa, relative rounding 6e-8 and 1e-16.",
    "FP16": "Floating point of 16 bits: 11 bits of mantissa (relative rounding 5e-4), nothing beyond 65504.",
    "BF16": "Floating point of 16 bits with FP32's range and 8 bits of mantissa: relative rounding 4e-3.",
    "TF32": "What tensor cores make of FP32 operands: FP32's range, 11 bits of mantissa. PyTorch "
    "and TensorRT may use it "
    "without being asked.",
    "accumulation": "The sum inside a convolution or a product. In FP16 it loses more than rounding the result does.",
    "INT8": "Whole numbers from −128 to 127 with a scale: value ≈ scale × number.",
    "scale": "The distance of two neighbouring INT8 levels; what lies beyond 127 of them is clipped.",
    "amax": "The largest absolute value that a scale reaches: 127 times the scale.",
    "step": "The INT8 scale of the layer's input.",
    "clipped": "The part of the layer's input beyond amax, all of which becomes the last level.",
    "Q/DQ": "QuantizeLinear and DequantizeLinear: a pair of ONNX operators that says where INT8 begins and ends.",
    "PTQ, QAT": "INT8 after training, from calibration alone; and with further training of the rounded network.",
    "calibration": "Choosing scales from samples that run through the network.",
    "fake quantizer": "A torch module that rounds to INT8 levels and goes on in FP32.",
    "folding": "Computing at export what is known then: BatchNorm becomes part of the weights in front of it.",
    "opset": "The version of ONNX's operators that a file is written in. TensorRT 8 reads up to 17.",
    "free axis": "An axis of an input whose size the graph leaves open, such as the batch.",
    "NCHW, NHWC": "Order of an image's axes: batch, then the channels before the two of the picture, or behind them.",
    "engine": "What TensorRT builds of a graph for one GPU.",
    "tactic, kernel": "The routine that computes a layer. TensorRT picks one by measuring; two of them round "
    "differently.",
    "knobs": "Settings of ONNX Runtime's graph optimizer, switched off one by one to find which is responsible.",
    "pairing": "Finding which values of two graphs are the same: by name, by what they hold, by structure.",
    "side value": "A value that carries no data of the network: a constant that was folded, or a shape.",
    "emulated": "Computed here in FP32 with operands, results and sums rounded as the hardware would do it.",
    "p50, p95, p99": "The figure that 50, 95 or 99 of 100 stay below: of passes, latency in milliseconds; of the "
    "samples of a sweep, an excess or an error.",
    "median, worst": "Of a figure over the samples of a sweep; `worst on` names the sample that has the largest.",
    "robust z": "How far a sample stands out: robust standard deviations above the median, on a logarithmic scale.",
    "× reference": "Latency of a backend divided by that of the first one: below 1 is faster.",
    "mAP, NDS": "Mean average precision and the nuScenes detection score: what the boxes are worth, 0 to 1.",
    "AP": "Average precision of one class, 0 to 1: the mean over the distances 0.5, 1, 2 and 4 m within which a "
    "detection counts as found, which have a column each.",
    "BEV, 3D": "AP where a detection must overlap an object by 0.5 or 0.7 (intersection ÷ union), from above or in "
    "space.",
    "ATE, ASE, AOE, AVE, AAE": "nuScenes' errors of the objects that were found: place in metres, size (1 − overlap), "
    "direction in radians, speed in m/s, attributes (1 − accuracy). An m in front: the mean over the classes.",
    "found": "Objects with a detection of their class within 2 m, of all objects.",
    "Δ": "A test's metric minus the reference's. In brackets its 95 % interval over draws of the samples.",
    "T4's metric": "Figures of Autoware's own evaluation, for data sets in T4's format.",
    "mixed-precision search": "Finding few layers to keep in FP32, none of them needless, so that a goal holds.",
    "goal": "What a search must reach: limits of figures, `rel_l2<1e-3 and boxes_lost==0`.",
    "layers kept": "Layers that a trial of a search left in FP32, of all that could be lowered.",
    "effect alone": "Search: the error at the worst final output, relative L2, when this layer alone is lowered.",
    "without it": "Search: what the goal's figure becomes when this layer is lowered, too.",
    "needed": "Sweep of a search: on how many samples the layer had to be kept.",
    "leverage": "Sweep of ablations: the error at the worst final output, relative L2, that this layer makes in the "
    "test's precision when all others are in FP32, emulated.",
    "back, lost, gained, moved": "Sweep of ablations: boxes that the test loses and finds with these layers "
    "exact; that are still lost; that the reference has not; whose place or score changed.",
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
