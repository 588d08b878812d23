"""What is kept of parameters follows them, however they are changed."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch.func import functional_call

from medseg3d.layers import residual, winograd
from medseg3d.layers.derived import Derived, is_plain_eager
from medseg3d.layers.residual import UpBlock
from medseg3d.layers.winograd import Conv3d
from medseg3d.networks import UNETR, SwinUNETR


@pytest.fixture(autouse=True)
def keep_from_the_smallest_size_on(monkeypatch):
    monkeypatch.setattr(winograd, "FROM_VOXELS", 1)
    monkeypatch.setattr(residual, "MERGE_FROM_VOXELS", 1)


def kept(module):
    """Whether anything of the module's parameters is kept."""
    values = (value for part in module.modules() for value in vars(part).values())
    return any(isinstance(value, Derived) and value._value is not None for value in values)


def conv():
    return Conv3d(32, 32, 3, padding=1), (torch.randn(1, 32, 8, 6, 5).contiguous(memory_format=torch.channels_last_3d),)


def up_block():
    return UpBlock(3, 40, 32, "instance"), (torch.randn(1, 40, 4, 3, 3), torch.randn(1, 32, 8, 6, 6))


def swin_unetr():
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1))
    return network.eval(), (torch.randn(1, 1, 64, 32, 32),)


def load_state_dict(module, state):
    module.load_state_dict(state)


def copy_data(module, state):
    for name, parameter in module.named_parameters():
        parameter.data.copy_(state[name])


def copy_into_the_memory_of(module, state):
    for name, parameter in module.named_parameters():
        torch.from_numpy(parameter.detach().numpy()).copy_(state[name])


@pytest.mark.parametrize(
    ("birth", "mode"),
    [
        (contextlib.nullcontext, torch.no_grad),
        (contextlib.nullcontext, torch.inference_mode),
        (torch.inference_mode, torch.inference_mode),  # its parameters count no versions
    ],
)
@pytest.mark.parametrize("change", [load_state_dict, copy_data, copy_into_the_memory_of])
@pytest.mark.parametrize("make", [conv, up_block, swin_unetr])
def test_a_module_has_the_weights_that_it_was_given_last(make, change, birth, mode):
    torch.manual_seed(0)
    other, inputs = make()
    with birth():
        module = make()[0]
    with mode():
        before = module(*inputs)
        assert kept(module)
        duplicate = copy.deepcopy(module)
        assert not kept(duplicate)
        change(module, other.state_dict())
        expected = other(*inputs)
        assert not torch.allclose(expected, before, rtol=0, atol=1e-3)
        torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=0)
        torch.testing.assert_close(duplicate(*inputs), before, rtol=0, atol=0)


VIEWS = {
    "all": lambda x: x,
    "later": lambda x: x[:, 1:],
    "every_other": lambda x: x[..., ::2],
    "turned": lambda x: x.mT,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (4, 6), (4, 3, 3, 3, 3), (2, 8, 3, 3)])
@pytest.mark.parametrize("view", VIEWS)
def test_one_value_that_changes_in_its_last_place_is_seen(shape, dtype, view):
    derived, source = Derived(), VIEWS[view](torch.rand(shape, dtype=dtype))
    with torch.no_grad():
        first = derived(torch.clone, source)
        assert derived(torch.clone, source) is first
        last = source.data[(-1,) * len(shape)]
        last.copy_(torch.nextafter(last, torch.full_like(last, 2)))
        assert not torch.equal(source, first)
        assert torch.equal(derived(torch.clone, source), source)


def unetr():
    network = UNETR(1, 2, (16, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=4)
    return network.eval(), (torch.randn(1, 1, 16, 32, 32),)


@pytest.mark.parametrize("make", [swin_unetr, unetr])
def test_torch_func_gives_the_gradients_of_autograd(make):
    torch.manual_seed(0)
    network, (x,) = make()
    network, x = network.double(), x.double()  # so that no voxel falls on the other side of a kink
    learnt = {name: value for name, value in network.named_parameters() if value.requires_grad}

    def loss(parameters):
        return functional_call(network, parameters, (x,)).square().mean()

    expected = torch.autograd.grad(loss(learnt), list(learnt.values()))
    got = torch.func.grad(loss)({name: value.detach() for name, value in learnt.items()})
    for name, gradient in zip(learnt, expected, strict=True):
        torch.testing.assert_close(got[name], gradient, msg=name)
    assert is_plain_eager() and not torch.func.vmap(lambda x: x * is_plain_eager())(torch.ones(2)).any()


def test_nothing_is_kept_off_the_cpu_or_with_gradients():
    derived = Derived()
    with torch.no_grad():
        derived(torch.clone, torch.zeros(2, 2, device="meta"))
    derived(torch.clone, torch.zeros(2, 2))
    assert derived._key is None
