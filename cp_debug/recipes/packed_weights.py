"""Weights of 2, 3, 4 and 8 bits as GPTQ, AWQ and compressed-tensors pack them into words of 32 bits, unpacked.

Layouts, for a layer of I inputs and O outputs with G groups of inputs; a weight is (level − zero point) · scale:

- GPTQ (AutoGPTQ 0.7.1, ``auto_gptq/nn_modules/qlinear/qlinear_cuda.py``: ``pack``, ``forward``): ``qweight`` int32
  [I · bits ÷ 32, O], levels along the inputs; ``qzeros`` int32 [G, O · bits ÷ 32]; ``scales`` [G, O]; ``g_idx`` int32
  [I], the group of each input, in any order with ``desc_act``. Element i of a row of words has the bits from i · bits
  on, also across words (3 bits). The format ``gptq`` stores zero points minus 1, ``gptq_v2`` as they are; 1 is added
  to whole words, so that a zero point of 0 comes back (GPTQModel, ``gptqmodel/utils/model.py``:
  ``convert_gptq_v1_to_v2_format_module``; with 3 bits field by field).
- AWQ, ``gemm`` (AutoAWQ 0.2.7, ``awq/modules/linear/gemm.py``: ``from_linear``; ``awq/utils/packing_utils.py``:
  ``dequantize_gemm``): ``qweight`` int32 [I, O ÷ 8], ``qzeros`` int32 [G, O ÷ 8], ``scales`` [G, O]; nibble n of a word
  holds output ``AWQ_ORDER[n]`` of its eight; zero points as they are.
- compressed-tensors, ``pack-quantized`` (0.20.0, ``compressors/pack_quantized``): ``weight_packed`` int32
  [O, ⌈I · bits ÷ 32⌉], levels + 2^(bits − 1); ``weight_scale`` [O, G]; ``weight_zero_point`` int32
  [⌈O · bits ÷ 32⌉, G], where zero points are; ``weight_shape`` (O, I); ``weight_g_idx`` [I].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from cp_debug.errors import InputError

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of its eight that each nibble of a word holds, the lowest first."""
BITS = (2, 3, 4, 8)
Read = Callable[[str], np.ndarray]
"""A tensor of the folder by its name."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The weight of one linear layer in levels, unpacked: (level − zero point) · scale."""

    bits: int
    levels: np.ndarray
    """uint8 [inputs, outputs]."""
    scale: np.ndarray
    """float32 [groups, outputs]."""
    zero: np.ndarray
    """int16 [groups, outputs]."""
    groups: np.ndarray
    """int64 [inputs], the group of each input."""

    def weight(self) -> np.ndarray:
        """The weight as a linear layer has it, float32 [outputs, inputs]: exact, for scales have 16 bits."""
        centred = self.levels.astype(np.float32) - self.zero[self.groups]
        return np.ascontiguousarray((centred * self.scale[self.groups]).T)

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the levels."""
        return bool((self.zero == 1 << (self.bits - 1)).all())


@dataclass(frozen=True)
class Packing:
    """Packing of a folder's layers, as its configuration says it."""

    method: str
    """``gptq``, ``awq`` or ``compressed-tensors``."""
    bits: int
    group: int
    """Inputs that share a scale; -1: all."""
    stored_minus_one: bool = False
    """Whether zero points are stored minus 1: GPTQ's first format."""
    reordered: bool = False
    """Whether groups are of inputs in any order, so that each layer must say which."""
    mixed: bool = False
    """Whether layers may have other bits and groups than these."""

    @property
    def marker(self) -> str:
        """End of the name of a tensor that every packed layer has."""
        return ".weight_packed" if self.method == "compressed-tensors" else ".qweight"

    @property
    def scales(self) -> str:
        """Name of the tensor of a layer's scales."""
        return "weight_scale" if self.method == "compressed-tensors" else "scales"

    @property
    def ends(self) -> tuple[str, ...]:
        """Ends of the names of all tensors that stand for one packed weight."""
        if self.method == "compressed-tensors":
            return (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
        return (".qweight", ".qzeros", ".scales", ".g_idx")


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of ``bits`` bits, uint8 [rows, n], of int32 words [rows, n · bits ÷ 32]: the lowest bits first."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    if 32 % bits == 0:
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        mask = np.uint32((1 << bits) - 1)
        return ((unsigned[:, :, None] >> shifts) & mask).astype(np.uint8).reshape(len(words), -1)
    first = np.arange(words.shape[1] * 32 // bits) * bits
    word, shift = first // 32, (first % 32).astype(np.uint64)
    wide = np.concatenate([unsigned.astype(np.uint64), np.zeros((len(words), 1), np.uint64)], axis=1)
    pairs = wide[:, word] | (wide[:, word + 1] << np.uint64(32))
    return ((pairs >> shift) & np.uint64((1 << bits) - 1)).astype(np.uint8)


def unpack(layer: str, names: Mapping[str, str], read: Read, packing: Packing) -> PackedWeight:
    """The weight of one packed layer. ``names``: tensor of the folder → its file, for messages.

    Raises InputError, with the file and the tensor, for one that is missing, or of another type or shape than the
    others and ``packing`` say, for groups that do not exist, and for scales that are 0, Inf or NaN.
    """
    tensors = _Tensors(layer, names, read, packing)
    made = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed}[packing.method](tensors)
    wrong = ~np.isfinite(made.scale) | (made.scale == 0)
    if wrong.any():
        raise tensors.error(
            packing.scales, f"holds {made.scale[wrong].flat[0]:g}; expected finite numbers other than 0"
        )
    return made


class _Tensors:
    """The tensors of one layer, each checked when it is read."""

    def __init__(self, layer: str, names: Mapping[str, str], read: Read, packing: Packing) -> None:
        self.layer, self._names, self._read, self.packing = layer, names, read, packing

    def error(self, end: str, what: str) -> InputError:
        name = f"{self.layer}.{end}"
        return InputError(
            f"MODEL: {self._names.get(name, self._names[self.layer + self.packing.marker])}: {name} {what}"
        )

    def has(self, end: str) -> bool:
        return f"{self.layer}.{end}" in self._names

    def words(self, end: str, axes: int = 2) -> np.ndarray:
        array = self.array(end, axes)
        if array.dtype != np.int32:
            raise self.error(end, f"is {array.dtype}; expected int32")
        return array

    def array(self, end: str, axes: int) -> np.ndarray:
        if not self.has(end):
            raise self.error(end, f"is missing; expected beside {self.layer}{self.packing.marker}")
        array = self._read(f"{self.layer}.{end}")
        if array.ndim != axes or not array.size:
            raise self.error(end, f"has the shape {list(array.shape)}; expected {axes} axes and no empty one")
        return array

    def scales(self, end: str) -> np.ndarray:
        array = self.array(end, 2)
        if array.dtype.kind != "f":
            raise self.error(end, f"is {array.dtype}; expected floating point")
        return array.astype(np.float32)

    def expect(self, end: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape != wanted:
            raise self.error(end, f"has the shape {list(shape)}; expected {list(wanted)} beside the other tensors")

    def bits(self, end: str, found: float) -> int:
        """The layer's own bits, which the number of words tells."""
        if found != self.packing.bits and not (self.packing.mixed and found in BITS):
            raise self.error(end, f"has words for {found:g} bits; the configuration says {self.packing.bits}")
        return int(found)

    def groups(self, end: str, inputs: int, groups: int) -> np.ndarray:
        """The group of each input: as the layer says, else in order."""
        size = inputs if self.packing.group == -1 else self.packing.group
        if self.packing.mixed and -(-inputs // size) != groups:
            size = -(-inputs // groups)
        if self.has(end):
            index = self.array(end, 1)
            self.expect(end, index.shape, (inputs,))
            if index.dtype.kind not in "iu" or index.min() < 0 or index.max() >= groups:
                text = f"is {index.dtype} from {index.min()} to {index.max()}; expected groups from 0 to {groups - 1}"
                raise self.error(end, text)
            return index.astype(np.int64)
        if self.packing.reordered:
            raise self.error(end, "is missing, though the configuration says that groups are in another order")
        if -(-inputs // size) != groups:
            raise self.error(
                self.packing.scales,
                f"holds {groups} groups; {inputs} inputs in groups of {size} are {-(-inputs // size)}",
            )
        if self.packing.method != "gptq" and inputs % size:
            raise self.error(self.packing.marker[1:], f"has {inputs} inputs; groups of {size} do not divide them")
        return np.arange(inputs) // size


def _gptq(tensors: _Tensors) -> PackedWeight:
    words, zeros, scale = tensors.words("qweight"), tensors.words("qzeros"), tensors.scales("scales")
    groups, outputs = scale.shape
    tensors.expect("qweight", words.shape[1:], (outputs,))
    bits = tensors.bits("qzeros", zeros.shape[1] * 32 / outputs)
    tensors.expect("qzeros", zeros.shape, (groups, outputs * bits // 32))
    if len(words) * 32 % bits:
        raise tensors.error("qweight", f"has {len(words)} rows of words, which hold no whole number of {bits} bits")
    levels = unpacked(words.T, bits).T
    if tensors.packing.stored_minus_one and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = (zeros.astype(np.int64) + ones).astype(np.uint32).view(np.int32)
    zero = unpacked(zeros, bits)
    if tensors.packing.stored_minus_one and bits == 3:
        zero = (zero + 1) & 7
    index = tensors.groups("g_idx", len(levels), groups)
    return PackedWeight(bits, np.ascontiguousarray(levels), scale, zero.astype(np.int16), index)


def _awq(tensors: _Tensors) -> PackedWeight:
    words, zeros, scale = tensors.words("qweight"), tensors.words("qzeros"), tensors.scales("scales")
    groups, outputs = scale.shape
    bits = tensors.bits("qweight", words.shape[1] * 32 / outputs)
    tensors.expect("qzeros", zeros.shape, (groups, words.shape[1]))
    place = np.argsort(AWQ_ORDER)  # nibble of each output
    order = (np.arange(outputs).reshape(-1, len(place))[:, place]).reshape(-1)
    index = tensors.groups("g_idx", len(words), groups)
    levels, zero = (unpacked(each, bits)[:, order] for each in (words, zeros))
    return PackedWeight(bits, levels, scale, zero.astype(np.int16), index)


def _compressed(tensors: _Tensors) -> PackedWeight:
    words, scale, bits = tensors.words("weight_packed"), tensors.scales("weight_scale"), tensors.packing.bits
    shape = tuple(int(size) for size in tensors.array("weight_shape", 1))
    outputs, groups = scale.shape
    if len(shape) != 2 or shape[0] != outputs or min(shape) < 1:
        raise tensors.error("weight_shape", f"holds {list(shape)}; expected [{outputs}, inputs]")
    tensors.expect("weight_packed", words.shape, (outputs, -(-shape[1] * bits // 32)))
    levels = unpacked(words, bits)[:, : shape[1]].T
    zero = np.full((groups, outputs), 1 << (bits - 1), np.int16)
    if tensors.has("weight_zero_point"):
        packed = tensors.words("weight_zero_point")
        tensors.expect("weight_zero_point", packed.shape, (-(-outputs * bits // 32), groups))
        zero = unpacked(packed.T, bits)[:, :outputs].astype(np.int16)
    index = tensors.groups("weight_g_idx", shape[1], groups)
    return PackedWeight(bits, np.ascontiguousarray(levels), np.ascontiguousarray(scale.T), zero, index)
