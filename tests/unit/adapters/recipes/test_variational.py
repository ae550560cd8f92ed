"""The bound is vbll's, in value and gradient; the refit is the inverse Hessian of a last layer's loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from vbll import DiscClassification

from motet.adapters.heads import Parameterization
from motet.adapters.recipes import variational
from motet.adapters.recipes.variational import SoftmaxHead, VariationalHead, tensors
from tests.support.tolerances import TOLERANCES

CLOSE = TOLERANCES["bound", torch.float64]
ROWS, WIDTH, CLASSES, N_TRAIN = 40, 12, 5, 300
KINDS = [Parameterization.DIAGONAL, Parameterization.DENSE, Parameterization.LOW_RANK]


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x_ND, torch.randint(CLASSES, (ROWS,), generator=generator)


def pair(kind: Parameterization) -> tuple[VariationalHead, Any]:
    """Ours and vbll's with the same parameters, drawn so that no term is small."""
    torch.manual_seed(1)
    theirs = DiscClassification(
        WIDTH,
        CLASSES,
        1 / N_TRAIN,
        parameterization=kind.value,
        prior_scale=variational.PRIOR_SCALE,
        wishart_scale=variational.WISHART_SCALE,
        dof=variational.DOF,
        cov_rank=variational.COVARIANCE_RANK,
    ).double()
    ours = VariationalHead(torch.zeros(CLASSES, WIDTH), kind, N_TRAIN).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            tensor.copy_(0.5 * torch.randn(tensor.shape) - 0.5 * ("logdiag" in name))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_and_its_gradient_are_vblls(kind: Parameterization) -> None:
    ours, theirs = pair(kind)
    x_ND, y_N = batch()
    losses, by_state = [], []
    for head, loss_of in ((ours, ours.loss), (theirs, lambda x, y: theirs(x).train_loss_fn(y))):
        state = x_ND.clone().requires_grad_(True)
        losses.append(loss_of(state, y_N))
        losses[-1].backward()
        by_state.append(state.grad)
        assert head.noise_logdiag.grad.abs().min() > 0
    CLOSE.assert_close(losses[0], losses[1])
    CLOSE.assert_close(by_state[0], by_state[1])
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        CLOSE.assert_close(parameter.grad, expected[name].grad)


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_vblls(kind: Parameterization) -> None:
    ours, theirs = pair(kind)
    x_ND, _ = batch()
    mean_NC, variance_NC = ours.logits(x_ND)
    predicted = theirs.logit_predictive(x_ND)
    CLOSE.assert_close(mean_NC, predicted.mean)
    CLOSE.assert_close(variance_NC, predicted.variance)


def test_the_refit_is_the_inverse_curvature_at_the_means() -> None:
    """The oracle: autograd's Hessian of the penalised cross entropy, summed over the rows, in one class's weights."""
    head = VariationalHead(0.3 * batch(2)[0][:CLASSES].float(), Parameterization.DENSE, N_TRAIN)
    x_ND, y_N = batch(3)
    head.refit(x_ND.float())
    mean_CD = head.W_mean.detach().double()
    _, variance_NC = head.double().logits(x_ND)
    variance_NC = variance_NC - (2 * head.noise_logdiag.double()).exp()
    for number in range(CLASSES):

        def loss(row_D: torch.Tensor, number: int = number) -> torch.Tensor:
            weight_CD = torch.cat([mean_CD[:number], row_D[None], mean_CD[number + 1 :]])
            error = nn.functional.cross_entropy(x_ND @ weight_CD.T, y_N, reduction="sum")
            return error + row_D.square().sum() / (2 * head.prior_variance)

        hessian_DD = torch.autograd.functional.hessian(loss, mean_CD[number])
        expected_N = torch.einsum("nd,de,ne->n", x_ND, torch.linalg.inv(hessian_DD), x_ND)  # type: ignore[arg-type]
        TOLERANCES["refit", torch.float32].assert_close(variance_NC[:, number], expected_N)
    assert head.prior_variance == pytest.approx(2 * variational.PRIOR_SCALE / WIDTH)


def test_a_plain_head_learns_by_cross_entropy() -> None:
    x_ND, y_N = batch()
    head = SoftmaxHead(torch.zeros(CLASSES, WIDTH))
    loss = head.loss(x_ND.float(), y_N)
    assert loss.item() == pytest.approx(math.log(CLASSES))
    loss.backward()
    truth_NC = nn.functional.one_hot(y_N, CLASSES).float()
    expected = (1 / CLASSES - truth_NC).T @ x_ND.float() / ROWS
    TOLERANCES["dense merge", torch.float32].assert_close(head.weight.grad, expected, torch.ones(expected.shape))
    assert tensors(head).keys() == {"weight", "bias"}
