"""Operators by what they do."""

from __future__ import annotations

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply data by weights and sum: INT8 is for them, and no runtime fuses two of them."""
GATES = {"LSTM": 4, "GRU": 3}
"""Operator → gates of its weights, which lie one after the other along their rows."""
CONTRACTIONS = (*PRODUCTS, "Einsum")
"""Operators that sum products of any two operands."""
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
