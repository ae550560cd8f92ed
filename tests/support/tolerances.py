"""Every tolerance of the tests, in one table, each with its reason. Never looser in CI.

`TOLERANCES[what, dtype]`: what is compared, and the coarsest dtype a value was rounded to on its way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """Largest |actual − expected| ≤ atol + rtol · magnitude."""

    rtol: float
    atol: float
    reason: str

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None) -> None:
        """Compare element by element in float64, so that the dtypes may differ. NaN is close to nothing.

        Args:
            actual: any shape and dtype.
            expected: the same shape.
            magnitude: what was rounded on the way to each element, e.g. Σ|term| of a sum; None means |expected|.
        """
        assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
        actual, expected = actual.double(), expected.double()
        allowed = self.atol + self.rtol * (expected.abs() if magnitude is None else magnitude)
        excess = (actual - expected).abs() / allowed
        wrong = ~(excess <= 1)
        if wrong.any():
            worst = tuple(wrong.nonzero()[excess[wrong].nan_to_num(torch.inf).argmax()].tolist())
            raise AssertionError(
                f"{int(wrong.sum())} of {wrong.numel()} elements differ by more than atol={self.atol:.3g} + rtol="
                f"{self.rtol:.3g} ({self.reason}); the worst, at {worst}, by {float(excess[worst]):.3g} times that: "
                f"{float(actual[worst])}, not {float(expected[worst])}"
            )


# Relative to |y| + Σ_r |g_r s_r Bᵀ_r|, with u the largest relative error of one rounding: y rounded by both sides, the
# intermediate s rounded before and after its gate.
_LOW_RANK_ROUNDINGS = 4
_LOW_RANK_REASON = "4 u: y rounded once by either side, the rank-r intermediate before and after its gate"

# Relative to |y| + |ΔW x| of either effect.
_SPARSE_ROUNDINGS = 4
_SPARSE_REASON = "4 u: y rounded once by the reference, twice by the other side, what is scattered once before"

# Relative to |y| + |α (x · signᵀ)|.
_SIGN_REASON = "2 u: y rounded once by either side"

TOLERANCES: dict[tuple[str, torch.dtype], Tolerance] = {
    ("low_rank reference", torch.float32): Tolerance(1e-5, 1e-5, "float32 sums of 1536 + 40 terms against float64"),
    ("low_rank reference", torch.bfloat16): Tolerance(2**-8, 1e-5, "u: y rounded once to 8 bits"),
    ("low_rank reference", torch.float16): Tolerance(2**-11, 1e-5, "u: y rounded once to 11 bits"),
    ("low_rank", torch.float32): Tolerance(1e-5, 1e-5, "float32 sums of 1536 + 40 terms in another order"),
    ("low_rank", torch.bfloat16): Tolerance(_LOW_RANK_ROUNDINGS * 2**-8, 1e-5, _LOW_RANK_REASON),
    ("low_rank", torch.float16): Tolerance(_LOW_RANK_ROUNDINGS * 2**-11, 1e-5, _LOW_RANK_REASON),
    ("native product", torch.float32): Tolerance(1e-6, 0, "float32 sums of 194 terms, 8 u of Σ|term|"),
    ("native product", torch.bfloat16): Tolerance(2**-8, 0, "y rounded once to 8 bits, after float32 sums"),
    ("sparse reference", torch.float32): Tolerance(1e-5, 1e-5, "float32 sums of 1536 + 128 terms against float64"),
    ("sparse reference", torch.bfloat16): Tolerance(2**-8, 1e-5, "u: y rounded once to 8 bits"),
    ("sparse reference", torch.float16): Tolerance(2**-11, 1e-5, "u: y rounded once to 11 bits"),
    ("sparse", torch.float32): Tolerance(1e-5, 1e-5, "float32 sums of 1536 + 128 terms in another order"),
    ("sparse", torch.bfloat16): Tolerance(_SPARSE_ROUNDINGS * 2**-8, 1e-5, _SPARSE_REASON),
    ("sparse", torch.float16): Tolerance(_SPARSE_ROUNDINGS * 2**-11, 1e-5, _SPARSE_REASON),
    ("sign", torch.float32): Tolerance(1e-5, 1e-5, "float32 sums of 1536 terms ±x, in another order"),
    ("sign", torch.bfloat16): Tolerance(2 * 2**-8, 1e-5, _SIGN_REASON),
    ("sign", torch.float16): Tolerance(2 * 2**-11, 1e-5, _SIGN_REASON),
    ("merged", torch.float32): Tolerance(1e-5, 1e-5, "products of rank 4 of means of three values, in another order"),
    ("logits", torch.float32): Tolerance(0, 1e-4, "the contract with PEFT: max |Δlogit| of a float32 model"),
    ("logits of a tiny model", torch.bfloat16): Tolerance(0, 0.15, "3 layers of rounding to 8 bits, logits of order 1"),
    ("logits of a converted ViT", torch.float32): Tolerance(0, 1e-5, "two float32 layers of width 24, logits below 4"),
    ("logits on CUDA", torch.float32): Tolerance(0, 1e-3, "TF32 is off, but sums run in another order"),
    ("logits on CUDA", torch.bfloat16): Tolerance(0, 0.1, "3 layers of rounding to 8 bits, logits of order 1"),
    ("logits on CUDA", torch.float16): Tolerance(0, 0.02, "3 layers of rounding to 11 bits, logits of order 1"),
    ("bfloat16 error over PEFT's", torch.bfloat16): Tolerance(
        1.25, 0, "both round every product to 8 bits, in another order: equal on average, ±25 % over a dozen prompts"
    ),
    ("epilogue", torch.float32): Tolerance(1e-6, 1e-6, "a product and a sum, each rounded once in float32"),
    ("epilogue", torch.bfloat16): Tolerance(2 * 2**-8, 2**-8, "2 u: the scaled y, of order 1, and the biased sum"),
    ("lowered", torch.float32): Tolerance(
        1e-5, 0, "relative to the largest ΔW: W - W_res and the factors are float32, ΔW is 3 to 20 times smaller"
    ),
    ("start from a residual", torch.bfloat16): Tolerance(
        2**-9, 0, "‖error‖/‖W‖: rounding of W_res to 8 bits, half of it beyond the rank that is kept"
    ),
    ("start from a residual", torch.float16): Tolerance(
        2**-12, 0, "‖error‖/‖W‖: rounding of W_res to 11 bits, half of it beyond the rank that is kept"
    ),
    ("recomputed start", torch.float32): Tolerance(
        1e-4, 0, "relative to the largest s·B0 A0: a float32 SVD is off by eps·σ_1/(σ_r - σ_{r+1})"
    ),
    ("user state", torch.float32): Tolerance(
        1e-5, 1e-5, "float32 sums of 64 terms in another order, through four layer norms; states up to 40"
    ),
    ("golden user state", torch.float32): Tolerance(2e-6, 2e-5, "written with five decimals, of float32 sums"),
    ("gate factors", torch.float32): Tolerance(
        0, 1e-5, "a softmax, of order 1, after 19 float32 convolutions; batch norm folded in or not"
    ),
    ("merge scores", torch.float32): Tolerance(0, 1e-6, "cosines, of order 1, summed in float64 and rounded once"),
    ("scores of served features", torch.float32): Tolerance(
        0,
        1e-5,
        "cosines of features from three float32 layers, which sum in another order; α and probabilities of them",
    ),
    ("weights of served features", torch.float32): Tolerance(
        0, 5e-5, "a softmax over scores that are off by 1e-5 each, times β = 9, times a slope of at most a quarter"
    ),
    ("image features", torch.float32): Tolerance(
        0, 1e-5, "two blocks of float32 sums of up to 48 terms against float64; features of order 1 after the norm"
    ),
    ("dense merge", torch.float32): Tolerance(
        1e-5, 1e-6, "W + B A of rank ≤ 8 and a scale near one, each rounded in float32, in another order"
    ),
    ("trimmed weight", torch.float32): Tolerance(
        1e-4,
        0,
        "relative to the largest weight: W + B A is rounded to float32 on either side, and singular vectors at "
        "the cut turn by that over their gap of about 0.01",
    ),
    ("log-probabilities", torch.float32): Tolerance(
        0, 2e-4, "two logits' worth: a float32 logit and a float32 log-sum-exp, over up to 30 layers"
    ),
    ("logits, bfloat16 operands", torch.bfloat16): Tolerance(
        0, 0.1, "ΔW x is off by 0.3 %: measured 0.005 (root mean square); the largest of 49,152 logits is above that"
    ),
    ("served head", torch.float32): Tolerance(
        0, 1e-5, "a softmax of logits up to 10 from features that three float32 layers sum in another order"
    ),
    ("head logits", torch.float32): Tolerance(2e-6, 1e-6, "float32 sums of at most 12 squares of sums of 12 terms"),
    ("head logits", torch.float64): Tolerance(1e-12, 1e-14, "the same sums as vbll's, in another order"),
    ("bound", torch.float64): Tolerance(
        1e-6, 1e-9, "the promise for the loss of a variational head and its gradient; vbll's sums run in another order"
    ),
    ("refit", torch.float32): Tolerance(
        1e-5, 0, "a float64 inverse, its factor rounded once to float32; variances of sums of 12 terms"
    ),
    ("scores of a calibrated head", torch.float32): Tolerance(
        0, 2e-4, "means of probabilities and of their logs, of float32 features after three layers and a head of norm 1"
    ),
    ("predictive", torch.float64): Tolerance(0, 1e-9, "the plain grid's own error, 2e-10 as measured, above ours"),
    ("predictive entropy", torch.float64): Tolerance(
        0, 2e-8, "the plain grid's own error, 3e-9 as measured for variances up to 400, and ours of 1e-10"
    ),
    ("predictive on a finer grid", torch.float64): Tolerance(
        0, 1e-9, "trapezoidal sums converge exponentially: 1e-10 was the worst up to 1,000 classes"
    ),
    ("predictive at a limit", torch.float64): Tolerance(0, 1e-9, "the promise for certain and for equal logits"),
    ("loss of an episode", torch.float32): Tolerance(
        1e-4, 1e-4, "float32; where a slope is nearly zero its sign, and so the attack, may turn"
    ),
    ("gradient of an episode", torch.float32): Tolerance(
        1e-3, 1e-5, "as its loss, relative to the largest element: the KL is six times as steep"
    ),
}
