"""Figures of the replay of one layer, as results hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from cp_debug.backends.base import Tensor as AnyTensor
from cp_debug.bisect.whole_numbers import as_tensor
from cp_debug.probes.distance import difference_norm, distance, ratio, unmasked
from cp_debug.programs.precision import Precision

EXCESS = 4.0
"""A layer whose introduced error is this many times the expected one is guilty: ``docs/thresholds.md`` has the
measurements."""
ASKED = 2.0
"""Excess beyond which a layer in INT8 is emulated with other scales, too. Half the limit: what comes out for an
innocent layer says how far from the limit it is, not that nobody asked."""
FLOOR = 0.5
"""Number of unit roundoffs that every layer may introduce, whatever its emulation says."""


@dataclass
class Replay:
    """Figures of one layer, all relative L2 norms except where said.

    None where a figure could not be computed, see ``skipped``.
    """

    nodes: tuple[str, ...] = ()
    """The ONNX nodes of the segment, the fused ones included."""
    introduced: float | None = None
    inherited: float | None = None
    amplification: float | None = None
    expected: float | None = None
    excess: float | None = None
    oracle_error: float = 0.0
    """Bound of the oracle's own rounding, relative."""
    new_nonfinite: int = field(default=0, metadata={"key": "born_nonfinite"})
    """Elements that are NaN or Inf here although the oracle, from the same inputs, says they are finite or
    Inf of the other sign; and the reverse."""
    numbers: int = field(default=0, metadata={"key": "numbers_for_inf"})
    """Those of them that are numbers where Inf is right, or numbers or Inf where NaN is."""
    nonfinite_in: str = ""
    """Name and operator of the node that makes NaN or Inf of the test's finite inputs, by the oracle's account too,
    where the reference has neither."""
    wanted: int = 0
    """Elements beyond the type's range that became Inf, or its largest number, and change nothing that reads them."""
    unread: bool = False
    """Neither a node nor the caller reads the value: a mask of Dropout, a state that is thrown away."""
    range_loss: float = 0.0
    """Relative error of merely storing the segment's weights and result in the test's precision: large where they
    overflow or vanish; 0 where that changes nothing that is computed from them."""
    reference_excess: float = 0.0
    """Excess of the reference, for layers that amplify suspiciously."""
    contradicted: tuple[str, ...] = ()
    """Captured inputs that are other than the reference's, where the result is the reference's and not what they make:
    they were written again after they had been read."""
    declared: float | None = None
    """Error that the graph's own scales make of the same inputs, for a layer in INT8."""
    deviation_from_scales: float | None = field(default=None, metadata={"key": "departs"})
    """Distance of the captured result from the result by the graph's own scales."""
    channel_excess: float | None = None
    """Introduced ÷ expected in the worst channels of a layer in INT8, however small, see ``balanced``."""
    misfit: float | None = None
    """Factor by which scales that fit the codes of a stored weight would lower the error; None where they do not."""
    clipped: float | None = None
    """Share of the layer's input that lies beyond its scale."""
    step: float | None = None
    """Scale of the layer's input: the distance of two levels."""
    precision: str | None = None
    """Precision that the test claims here, where it is known: its backend's, or a coarser one that its program declares
    for these nodes."""
    instead: str = ""
    """Whole numbers that agree neither with the inputs nor with emulation: both, in words."""
    not_emulated: tuple[str, ...] = ()
    """Nodes of the segment that have no kernel in the claimed arithmetic: ``expected`` says nothing of them."""
    computed_in: str = ""
    """Arithmetic that reproduces a layer which is not what its narrow precision declares: ``fp8:acc=fp22``."""
    skipped: str | None = None

    @classmethod
    def of(
        cls,
        captured: AnyTensor,
        exact: Tensor,
        correct: Iterable[AnyTensor],
        claim: Precision,
        doubt: Callable[[Tensor | None], float] = lambda shown: 0.0,
        *,
        unrounded: bool = False,
        error: Tensor | None = None,
    ) -> Replay:
        """The figures of a captured value against the oracle's result for the same inputs.

        ``correct``: what implementations without a fault give; ``doubt``: how far others may be off, an L2 norm over
        the elements of a mask, or over all for None;
        ``unrounded``: nothing of it is rounded, as of indices and ids; ``error`` is filled with captured − exact, and 0
        where either is NaN or Inf. All tensors have the value's shape, in any real dtypes.
        """
        if tuple(captured.shape) != tuple(exact.shape):
            return cls(skipped=f"the shape is {list(captured.shape)}, the oracle's {list(exact.shape)}")
        introduced, scale, new_nonfinite = distance(captured, exact, error)
        correct = tuple(correct)
        allowed = (introduced if c is captured else difference_norm(c, exact) for c in correct)
        expected = max(*allowed, doubt(None), 0.0 if unrounded else FLOOR * claim.roundoff * scale)
        replay = cls(
            introduced=ratio(introduced, scale),
            expected=ratio(expected, scale),
            excess=ratio(introduced, expected),
            new_nonfinite=new_nonfinite,
        )
        if 0 < introduced <= EXCESS * expected and (shown := unmasked(exact, scale)) is not None:
            # Beside −1e9, an error of all that the mask leaves is less than a rounding of the whole.
            captured, *correct = (as_tensor(t).to(exact.device)[shown] for t in (captured, *correct))
            beside = cls.of(captured, exact[shown], correct, claim, lambda _: doubt(shown), unrounded=unrounded)
            beside.new_nonfinite = new_nonfinite
            replay = max(replay, beside, key=lambda each: each.excess or 0.0)
        return replay
