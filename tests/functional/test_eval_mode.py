"""Networks whose mode is unknown, and networks that are wrapped for several processes."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from enc_plugin.functional import fgsm, gbr


class Waiting(nn.parallel.DistributedDataParallel):
    """Its forward pass fails where that of ``DistributedDataParallel`` would wait for the other processes."""

    def forward(self, *args, **kwargs):
        raise TimeoutError


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_frozen_script_has_no_mode_and_the_mode_of_an_exported_program_is_unknown():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    images, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    frozen = torch.jit.freeze(torch.jit.script(network))
    torch.testing.assert_close(fgsm(frozen, images, labels, 0.1), fgsm(network, images, labels, 0.1))
    torch.testing.assert_close(gbr(frozen, images), gbr(network, images))
    with pytest.raises(ValueError, match="mode of an exported program is unknown.*pass the network"):
        fgsm(torch.export.export(network, (images,)).module(), images, labels, 0.1)


@pytest.fixture
def _alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("around", [lambda model: model, lambda model: nn.Sequential(nn.Hardtanh(), model)])
def test_measurements_do_not_wait_for_other_processes(around):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    images, labels = torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    wrapped = around(Waiting(network)).eval()
    plain = around(network).eval()
    assert torch.equal(gbr(wrapped, images), gbr(plain, images))
    assert torch.equal(fgsm(wrapped, images, labels, 0.1), fgsm(plain, images, labels, 0.1))
    with pytest.raises(TimeoutError):  # it is as it was
        wrapped(images)
