import math

import pytest
import torch
from functional.test_jacobian import images, network

from enc_plugin.functional import gbr, gbr_penalty


def test_the_penalty_is_the_mean_gbr_and_its_gradient_that_of_the_literal_norm():
    net, x = network("residual"), images().requires_grad_()
    penalty = gbr_penalty(x, net(x), projections=4)
    torch.testing.assert_close(penalty, gbr(net, x).mean(), rtol=1e-10, atol=0)
    weight = net[0].weight
    (found,) = torch.autograd.grad(penalty, weight)

    def norm(w):
        jacobian = torch.func.vmap(
            torch.func.jacrev(lambda v: torch.func.functional_call(net, {"0.weight": w}, v[None]))
        )
        return jacobian(x.detach()).square().sum() / len(x)

    torch.testing.assert_close(found, torch.func.grad(norm)(weight.detach()), rtol=1e-8, atol=1e-12)


def test_the_penalty_is_unbiased():
    net, x = network("plain"), images(3)
    many = x.repeat(300, 1, 1, 1).requires_grad_()
    found = gbr_penalty(many, net(many), projections=1, generator=torch.Generator().manual_seed(2))
    exact = gbr(net, x)
    spread = gbr(net, many.detach(), projections=1, generator=torch.Generator().manual_seed(3)).std()
    assert abs(found - exact.mean()) < 4 * spread / math.sqrt(len(many))


@pytest.mark.parametrize("projections", [1, 2, 3])
def test_the_penalty_of_outputs_on_an_accelerator_reads_nothing_from_it(projections):
    """Tensors of the meta device have no values: whatever would read one raises."""
    x = torch.empty(4, 5, device="meta", requires_grad=True)
    penalty = gbr_penalty(x, x @ torch.empty(5, 3, device="meta"), projections=projections)
    assert penalty.device.type == "meta"
    assert penalty.shape == ()
