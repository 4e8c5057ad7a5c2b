"""Operators by what they do."""

from __future__ import annotations

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply data by weights and sum: INT8 is for them, and no runtime fuses two of them."""
GATES = {"LSTM": 4, "GRU": 3}
"""Operator → gates of its weights, which lie one after the other along their rows."""
CONTRACTIONS = (*PRODUCTS, "Einsum")
"""Operators that sum products of any two operands."""
