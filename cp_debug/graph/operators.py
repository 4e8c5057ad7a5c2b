"""Operators by what they do."""

from __future__ import annotations

from onnx import NodeProto

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply data by weights and sum: INT8 is for them, and no runtime fuses two of them."""
RECURRENT = ("LSTM", "GRU", "RNN")
BODIES = ("If", "Loop", "Scan")
"""Operators that hold graphs."""
VIEWS = frozenset(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))
"""Operators that give what they read, in another shape."""
MOVERS = VIEWS | {"Concat", "Expand", "Gather", "Slice", "Split", "Tile", "Transpose"}
"""Operators that give numbers of what they read, each wherever it is wanted."""
ALL_MOVERS = MOVERS | {"DepthToSpace", "GatherElements", "GatherND", "Pad", "SpaceToDepth"}
"""Those that are rarer, too."""
MOVING = MOVERS | {"Cast", "Constant", "ConstantOfShape", "Shape"}
"""Operators that compute nothing, in an engine."""
ACTIVATIONS = frozenset(
    ("Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Selu",
     "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu")
)  # fmt: skip
"""Activations that compute element by element."""
QUANTIZERS = frozenset(("DequantizeLinear", "QuantizeLinear"))
"""Operators between numbers and levels."""
GATES = {"LSTM": 4, "GRU": 3}
"""Operator → gates of its weights, which lie one after the other along their rows."""
CONTRACTIONS = (*PRODUCTS, "Einsum")
"""Operators that sum products of any two operands."""
COMMUTATIVE = frozenset(
    ("Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Max", "Mean", "Min", "Mul", "Or", "Sum", "Xor")
)  # fmt: skip
"""Operators whose operands may stand in any order."""
_SAME = ("DequantizeLinear", "QLinearMatMul", "QuantizeLinear")
"""Operators that ONNX Runtime had before ONNX, for 16 and 4 bits: ``quantize_static`` still writes them so."""
CONTRIB_INPUTS = {
    **dict.fromkeys(("FastGelu", "Gelu", "MultiHeadAttention", "QuickGelu"), 1),
    **dict.fromkeys(("Attention", "BiasGelu", "BiasSoftmax", "BiasSplitGelu", "DequantizeLinear", "FusedConv"), 2),
    **dict.fromkeys(("FusedGemm", "FusedMatMul", "QLinearConcat", "QuantizeLinear"), 2),
    **dict.fromkeys(("BiasAdd", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GroupNorm", "MatMulNBits"), 3),
    **dict.fromkeys(("SkipGroupNorm", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), 3),
    **dict.fromkeys(("MatMulIntegerToFloat", "QLinearAveragePool", "QLinearGlobalAveragePool"), 4),
    **dict.fromkeys(("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax", "RotaryEmbedding"), 4),
    "QGemm": 6,
    **dict.fromkeys(("EmbedLayerNormalization", "GroupQueryAttention", "QLinearAdd", "QLinearMul"), 7),
    "QLinearMatMul": 8,
    "QLinearWhere": 9,
}
"""Operator of ONNX Runtime's own → least number of its inputs, up to the last that it must have."""


def operator_of(proto: NodeProto) -> str:
    """Operator of a node, with its domain unless it means the same as ONNX's own of that name."""
    own = proto.domain in ("", "ai.onnx") or (proto.domain == "com.microsoft" and proto.op_type in _SAME)
    return proto.op_type if own else f"{proto.domain}.{proto.op_type}"
