"""AMT's merge at test time: how well each member of a pool separates a labelled support set, and the weights α of it.

Must not know: models, adapters, requests, where features come from. Tensors are float32 on the CPU, sums float64.

    ℓ[i, c] = cos(z_i, m_c)     z: features of the support, augmented; m: class means of the features as they are
    intra   = 1/C Σ_c mean_{i∈c} ℓ[i, c]
    inter   = 1/C Σ_c mean_{i∈c} 1/(C - 1) Σ_{c'≠c} ℓ[i, c']
    score   = γ·intra - (1 - γ)·inter
    α       = softmax over the k highest of β·score, zero for the others

Shapes: P members, S examples of the support, C classes, D features, N queries.

Source: https://openreview.net/forum?id=HxGdbAmYYr. Its code multiplies by e^-β before the sum, which cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from motet.adapters.errors import GateError

DEFAULT_GAMMA = 0.6
DEFAULT_BETA = 1.0
DEFAULT_TOP_K = 2
"""What the authors' code begins its search from."""

MOST_EXAMPLES, MOST_LABELS = 512, 128
"""Of a support set that a request gives."""

SUM_TOLERANCE = 1e-3
"""Of given weights around one: three decimals, as people write thirds."""


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """Scores of all members, and the weights that follow.

    Attributes:
        intra_P: [P] float32, mean similarity with the own class.
        inter_P: [P] float32, mean similarity with the other classes.
        score_P: [P] float32, γ·intra - (1 - γ)·inter.
        alpha_P: [P] float32, at least 0, sums to 1, at most k of them above 0.
    """

    intra_P: torch.Tensor
    inter_P: torch.Tensor
    score_P: torch.Tensor
    alpha_P: torch.Tensor


def prototypes(features_SD: torch.Tensor, labels_S: torch.Tensor, classes: int) -> torch.Tensor:
    """Class means of the support.

    Args:
        features_SD: [S, D] float32, finite.
        labels_S: [S] int64, 0 to classes - 1, each at least once.
        classes: C, at least 2.

    Returns:
        [C, D] float32.

    Raises:
        GateError: the support is not such.
    """
    _require_features("support", features_SD)
    _require_labels(labels_S, len(features_SD), classes)
    sums_CD = torch.zeros(classes, features_SD.shape[1], dtype=torch.float64)
    sums_CD.index_add_(0, labels_S, features_SD.double())
    return (sums_CD / torch.bincount(labels_S, minlength=classes)[:, None]).float()


def similarities(features_SD: torch.Tensor, prototypes_CD: torch.Tensor) -> torch.Tensor:
    """Cosines [S, C] float32, without temperature; 0 with a feature or prototype that is zero.

    Raises:
        GateError: NaN, infinity, or two widths.
    """
    _require_features("features", features_SD)
    _require_features("prototypes", prototypes_CD)
    if features_SD.shape[1] != prototypes_CD.shape[1]:
        raise GateError(
            "features",
            f"features are {features_SD.shape[1]} wide, prototypes {prototypes_CD.shape[1]}; take both from one model",
        )
    directions_SD = F.normalize(features_SD.double(), dim=1)
    return (directions_SD @ F.normalize(prototypes_CD.double(), dim=1).T).float()


def separation(similarities_SC: torch.Tensor, labels_S: torch.Tensor) -> tuple[float, float]:
    """(intra, inter) of one member: means over classes, so that a class with more examples does not count more.

    Args:
        similarities_SC: [S, C], C at least 2.
        labels_S: [S] int64, as for `prototypes`.

    Raises:
        GateError: the support is not such.
    """
    _require_features("similarities", similarities_SC)
    _, classes = similarities_SC.shape
    _require_labels(labels_S, len(similarities_SC), classes)
    of_class_SC = F.one_hot(labels_S, classes).double()
    share_S = 1 / (classes * of_class_SC.sum(0)[labels_S])
    cosines_SC = similarities_SC.double()
    own_S = (cosines_SC * of_class_SC).sum(1)
    others_S = (cosines_SC * (1 - of_class_SC)).sum(1) / (classes - 1)
    return float(share_S @ own_S), float(share_S @ others_S)


def merged(
    similarities_of_members: Sequence[torch.Tensor],
    labels_S: torch.Tensor,
    *,
    gamma: float = DEFAULT_GAMMA,
    beta: float = DEFAULT_BETA,
    top_k: int = DEFAULT_TOP_K,
) -> Merge:
    """Score every member on the same support, and weight the best.

    Args:
        similarities_of_members: P times [S, C], each from that member's own features and prototypes.
        labels_S: [S] int64, as for `prototypes`.
        gamma: γ, 0 to 1.
        beta: β, at least 0; the larger, the nearer to the best member alone.
        top_k: k, 1 to P. Of equal scores the first members count.

    Raises:
        GateError: a parameter or the support is not such.
    """
    members = len(similarities_of_members)
    if members < 1:
        raise GateError("members", "there are no members to merge; a pool has at least 1")
    if not 0 <= gamma <= 1:  # NaN too
        raise GateError(
            "gamma", f"gamma={gamma!r} must be between 0 (apart from other classes) and 1 (near to the own class)"
        )
    if not 0 <= beta < math.inf:
        raise GateError("beta", f"beta={beta!r} must be a finite number of at least 0")
    if not 1 <= top_k <= members:
        raise GateError("top_k", f"top_k={top_k!r} must be between 1 and the {members} members of the pool")
    intra_P, inter_P = torch.tensor(
        [separation(cosines_SC, labels_S) for cosines_SC in similarities_of_members], dtype=torch.float64
    ).T
    score_P = gamma * intra_P - (1 - gamma) * inter_P
    chosen_K = score_P.argsort(descending=True, stable=True)[:top_k]
    alpha_P = torch.zeros(members, dtype=torch.float64)
    alpha_P[chosen_K] = torch.softmax(beta * score_P[chosen_K], 0)
    return Merge(intra_P.float(), inter_P.float(), score_P.float(), alpha_P.float())


def uniform(members: int) -> torch.Tensor:
    """α [P] float32: 1/P of every member.

    Raises:
        GateError: there are none.
    """
    if members < 1:
        raise GateError("members", f"members={members!r}: a pool has at least 1")
    return torch.full((members,), 1 / members)


def explicit(alpha: Sequence[float], members: int) -> torch.Tensor:
    """Given weights as α [P] float32, divided by their sum.

    Args:
        alpha: P numbers between 0 and 1, whose sum is 1 up to SUM_TOLERANCE.
        members: P.

    Raises:
        GateError: they are not such.
    """
    if len(alpha) != members:
        raise GateError("alpha", f"alpha has {len(alpha)} numbers; the pool has {members} members, each needs one")
    for place, value in enumerate(alpha):
        if not 0 <= value <= 1:  # NaN too
            raise GateError("alpha", f"alpha[{place}]={value!r} must be between 0 and 1")
    if not abs(math.fsum(alpha) - 1) <= SUM_TOLERANCE:
        raise GateError(
            "alpha", f"alpha sums to {math.fsum(alpha):.6g}, not to 1 within {SUM_TOLERANCE:g}; divide each by the sum"
        )
    return torch.tensor([value / math.fsum(alpha) for value in alpha], dtype=torch.float32)


def classify(features_ND: torch.Tensor, prototypes_CD: torch.Tensor, scale: float, bias: float = 0.0) -> torch.Tensor:
    """Probabilities [N, C] float32: softmax of scale · (cos(f, m_c) + bias). The bias shifts all classes alike.

    Args:
        features_ND: [N, D] float32, of the merged model.
        prototypes_CD: [C, D] float32, of the merged model too.

    Raises:
        GateError: NaN or infinity, or two widths.
    """
    for name, value in (("scale", scale), ("bias", bias)):
        if not math.isfinite(value):
            raise GateError(name, f"{name}={value!r} must be a finite number")
    cosines_NC = similarities(features_ND, prototypes_CD).double()
    return torch.softmax(scale * (cosines_NC + bias), 1).float()


def _require_features(field: str, values: torch.Tensor) -> None:
    if values.dim() != 2 or values.shape[1] < 1:
        raise GateError(
            field, f"{field} have shape {list(values.shape)}; one row of at least one number is needed for each"
        )
    if not values.is_floating_point():
        raise GateError(field, f"{field} have dtype {values.dtype}; they must be floating point")
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise GateError(field, f"{field}[{row}] hold NaN or infinity; check what was embedded there")


def _require_labels(labels_S: torch.Tensor, examples: int, classes: int) -> None:
    if classes < 2:
        raise GateError("classes", f"classes={classes!r}: at least 2 are needed to tell them apart")
    if labels_S.dtype != torch.int64 or labels_S.shape != (examples,):
        raise GateError(
            "labels",
            f"labels have shape {list(labels_S.shape)} and dtype {labels_S.dtype}; the support has {examples} "
            "examples, each needs one whole number (int64)",
        )
    if examples < classes:
        raise GateError(
            "support", f"the support has {examples} examples of {classes} classes; each class needs at least 1"
        )
    if int(labels_S.min()) < 0 or int(labels_S.max()) >= classes:
        raise GateError(
            "labels",
            f"labels run from {int(labels_S.min())} to {int(labels_S.max())}; with {classes} classes they are 0 to "
            f"{classes - 1}",
        )
    if bool((absent_C := torch.bincount(labels_S, minlength=classes) == 0).any()):
        raise GateError(
            "labels", f"class {int(absent_C.nonzero()[0])} has no example in the support; give it at least 1"
        )
