"""What every network of medseg3d keeps, in a tiny configuration, in 2D and in 3D."""

from __future__ import annotations

import re

import pytest
import torch

from medseg3d.networks import NETWORKS, build

SMALL_UNETR = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 40, "num_heads": 3}
# (name, spatial axes): (arguments, a good size, a bad one, the next size that the network takes)
CONFIGURATIONS = {
    ("unet", 2): ({"channels": (4, 8, 8)}, (12, 16), (9, 12), (12, 12)),
    ("unet", 3): (
        {"channels": (4, (4, 8), 8), "norm": ("group", {"num_groups": 2})},
        (8, 4, 12),
        (8, 5, 9),
        (8, 8, 12),
    ),
    ("vnet", 2): ({}, (32, 16), (33, 16), (48, 16)),
    ("vnet", 3): ({"act": "prelu"}, (16, 16, 16), (16, 32, 7), (16, 32, 16)),
    ("unetr", 2): ({"img_size": (32, 48), **SMALL_UNETR}, (32, 48), (32, 40), (32, 48)),
    ("unetr", 3): ({"img_size": (16, 32, 16), **SMALL_UNETR}, (16, 32, 16), (16, 32, 15), (16, 32, 16)),
    ("swin_unetr", 2): ({"feature_size": 12}, (64, 96), (33, 64), (64, 64)),
    ("fcn", 2): ({"width": 1 / 32, "padding": "same", "stride": 8, "upsampling": "learned"}, (37, 45), None, (1, 7)),
    ("fcn_resnet", 2): ({"backbone_arguments": {"width_per_group": 8}}, (41, 33), None, (1, 7)),
    ("deconvnet", 2): ({"width": 1 / 32}, (224, 256), (225, 90), (256, 224)),
    ("swin", 2): ({"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 3}, (32, 44), (3, 8), (4, 8)),
    ("swin_unetr", 3): ({"feature_size": 12, "use_v2": True}, (32, 32, 64), (32, 32, 32), (64, 32, 32)),
}
SCRIPTABLE = {"unet", "vnet"}  # the others can be traced
PLANAR = {"fcn", "fcn_resnet", "deconvnet"}  # without spatial_dims
CLASSIFIERS = {"swin"}  # one logit a class and image, from num_classes
DETECTORS = {"mask_rcnn", "upsnet"}  # tests/networks/detection has what they keep
CLASSES = 3


class Subject:
    """A network in eval mode with an input of two images."""

    def __init__(self, name, spatial_dims):
        arguments, self.size, self.bad_size, self.next_size = CONFIGURATIONS[name, spatial_dims]
        self.name, self.classifies = name, name in CLASSIFIERS
        dense = {"out_channels": CLASSES, **({} if name in PLANAR else {"spatial_dims": spatial_dims})}
        self.arguments = {"in_channels": 2, **({"num_classes": CLASSES} if self.classifies else dense), **arguments}
        torch.manual_seed(0)
        self.network = self.build()
        self.x = torch.randn(2, 2, *self.size)
        with torch.no_grad():
            self.y = self.network(self.x)

    def build(self):
        network = build(self.name, **self.arguments).eval()
        if self.name == "fcn":  # whose scores start at zero, whatever lies before them
            for name, parameter in network.named_parameters():
                if name.startswith("score"):
                    torch.nn.init.normal_(parameter, std=0.1)
        return network


@pytest.fixture(scope="module", params=CONFIGURATIONS, ids=lambda key: f"{key[0]}-{key[1]}d")
def subject(request):
    return Subject(*request.param)


def test_every_network_is_held_to_the_contract():
    assert {name for name, _ in CONFIGURATIONS} == set(NETWORKS) - DETECTORS


def test_build_names_the_networks_that_there_are():
    with pytest.raises(ValueError, match=r"there is no network 'alexnet3d'; medseg3d has .*deconvnet, unet, vnet"):
        build("alexnet3d")


def test_one_logit_a_class_and_voxel(subject):
    assert subject.y.shape == (2, CLASSES, *(() if subject.classifies else subject.size))
    assert torch.isfinite(subject.y).all()


def test_a_size_that_does_not_fit_is_refused_with_the_next_that_does(subject):
    if subject.bad_size is not None:  # some take any size
        with pytest.raises(ValueError, match=re.escape(f"the next size that it takes is {subject.next_size}")):
            subject.network(torch.zeros(1, 2, *subject.bad_size))
    with torch.no_grad():
        y = subject.network(torch.zeros(1, 2, *subject.next_size))
    assert y.shape[2:] == (() if subject.classifies else subject.next_size)


def test_another_number_of_axes_is_refused(subject):
    axes = len(subject.size)
    with pytest.raises(ValueError, match=f"takes {axes} spatial axes"):
        subject.network(torch.zeros(1, 2, *[16] * (axes + 1)))


def test_a_gradient_reaches_every_parameter(subject):
    x = subject.x[:1].clone().requires_grad_()
    cotangent = torch.randn(subject.y[:1].shape, generator=torch.Generator().manual_seed(1))
    (subject.network(x) * cotangent).sum().backward()
    # What is frozen is there for the keys of published files.
    trained = [(name, parameter) for name, parameter in subject.network.named_parameters() if parameter.requires_grad]
    gradients = {name: parameter.grad for name, parameter in trained}
    subject.network.zero_grad(set_to_none=True)
    without = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    assert not without
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert x.grad.any()


def test_eval_is_deterministic_and_independent_of_the_batch(subject):
    with torch.no_grad():
        assert torch.equal(subject.network(subject.x), subject.y)
        alone = subject.network(subject.x[1:])
    torch.testing.assert_close(alone, subject.y[1:], rtol=1e-4, atol=1e-5)


def test_the_input_is_not_changed(subject):
    x = subject.x.clone()
    with torch.no_grad():
        subject.network(x)
    assert torch.equal(x, subject.x)


def test_state_dict_round_trip(subject):
    other = subject.build()
    with torch.no_grad():
        assert not torch.equal(other(subject.x), subject.y)
        other.load_state_dict(subject.network.state_dict(), strict=True)
        assert torch.equal(other(subject.x), subject.y)


def test_torch_export(subject):
    exported = torch.export.export(subject.network, (subject.x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(subject.x), subject.y, rtol=1e-4, atol=1e-5)


def test_torch_script(subject):
    if subject.name not in SCRIPTABLE:
        pytest.skip(f"{subject.name} is traced, not scripted")
    scripted = torch.jit.script(subject.network)
    with torch.no_grad():
        torch.testing.assert_close(scripted(subject.x), subject.y, rtol=1e-4, atol=1e-5)


def test_torch_trace(subject):
    with torch.no_grad():
        traced = torch.jit.trace(subject.network, subject.x)
        torch.testing.assert_close(traced(subject.x), subject.y, rtol=1e-4, atol=1e-5)
        other = subject.x.flip(2)
        torch.testing.assert_close(traced(other), subject.network(other), rtol=1e-4, atol=1e-5)


def test_torch_compile_sees_one_graph(subject):
    torch._dynamo.reset()
    compiled = torch.compile(subject.network, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(subject.x), subject.y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx(subject, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "network.onnx"
    torch.onnx.export(subject.network, (subject.x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: subject.x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), subject.y, rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_are_close_to_float32(subject):
    network = subject.build().bfloat16()
    network.load_state_dict(subject.network.state_dict())
    with torch.no_grad():
        y = network(subject.x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - subject.y).norm() < 0.03 * subject.y.norm()


def test_bfloat16_is_close_to_float32(subject):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = subject.network(subject.x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - subject.y).norm() < 0.03 * subject.y.norm()


def test_a_monai_tensor_gives_the_same(subject):
    from monai.data import MetaTensor

    with torch.no_grad():
        y = subject.network(MetaTensor(subject.x))
    torch.testing.assert_close(torch.as_tensor(y).as_subclass(torch.Tensor), subject.y, rtol=0, atol=0)
