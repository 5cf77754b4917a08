"""The fused kernels compute what PyTorch's own calls compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from models import create_model
from s3net_common import cpu_kernels
from s3net_networks.connections import CONNECTIONS


def largest_difference(fused, plain):
    return ((fused.detach().float() - plain.detach()).abs().max() / plain.detach().abs().max()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(
    ("shape", "out_channels", "kernel_size", "pool"),
    [
        ((8, 12, 8, 8), 12, 3, 1),
        ((3, 5, 7, 7), 6, 1, 2),  # odd size: the pool leaves a row and a column out
        ((2, 400, 4, 4), 8, 1, 2),  # wider than a row of the kernels
        ((1, 12, 6, 6), 12, 1, 3),
        ((4, 24, 8, 6), None, 0, 1),  # without a convolution
    ],
)
def test_forward_backward_and_statistics_equal_plain_pytorch(shape, out_channels, kernel_size, pool, dtype, tolerance):
    torch.manual_seed(0)
    norm, plain_norm = nn.BatchNorm2d(shape[1]), nn.BatchNorm2d(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    plain_norm.load_state_dict(norm.state_dict())
    fused = (torch.randn(shape) * 2 + 1).to(dtype).requires_grad_()
    plain = fused.detach().float().requires_grad_()
    pairs = []
    if out_channels is None:
        out, expected = cpu_kernels.norm_relu(fused, norm), F.relu(plain_norm(plain))
    else:
        conv = nn.Conv2d(shape[1], out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        plain_conv = nn.Conv2d(shape[1], out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        plain_conv.load_state_dict(conv.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = cpu_kernels.norm_relu_conv(fused, norm, conv, pool)
        expected = plain_conv(F.avg_pool2d(F.relu(plain_norm(plain)), pool))
        pairs.append((conv.weight, plain_conv.weight))
    assert out.dtype == dtype
    gradient = torch.randn(expected.shape)
    out.backward(gradient.to(dtype))
    expected.backward(gradient)
    pairs += [(fused, plain), (norm.weight, plain_norm.weight), (norm.bias, plain_norm.bias)]
    assert largest_difference(out, expected) < tolerance
    for parameter, expected in pairs:
        assert largest_difference(parameter.grad, expected.grad) < tolerance
    for name in ("running_mean", "running_var"):
        assert largest_difference(getattr(norm, name), getattr(plain_norm, name)) < 1e-6
    assert norm.num_batches_tracked == 1


def test_the_kernels_are_what_training_on_a_cpu_runs_and_nothing_else():
    model = create_model("s3net_cifar", growth_rate=4, depth=10)
    images = torch.randn(2, 3, 32, 32)
    assert "NormReluConv" in type(model.blocks[0].layers[0](torch.randn(2, 24, 8, 8)).grad_fn).__name__
    model.eval()
    assert "Convolution" in type(model.blocks[0].layers[0](torch.randn(2, 24, 8, 8)).grad_fn).__name__
    model.double().train()
    assert model(images.double()).dtype == torch.float64


def test_a_step_of_training_is_the_plain_networks_step(monkeypatch):
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    states = []
    for use in (True, False):
        torch.manual_seed(1)
        model = create_model("s3net_cifar", growth_rate=6, depth=13, num_classes=10)
        if not use:
            monkeypatch.setattr(cpu_kernels, "_use_kernel", lambda x, norm: False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=2e-4, rtol=2e-3, msg=name)


def test_one_value_a_channel_has_no_variance():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        cpu_kernels.norm_relu(torch.randn(1, 3, 1, 1), nn.BatchNorm2d(3))


@pytest.mark.parametrize("option", ["create_graph", "is_grads_batched"])
def test_second_and_batched_derivatives_in_training_are_refused(option):
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    out = cpu_kernels.norm_relu(x, nn.BatchNorm2d(4))
    gradients = torch.ones_like(out) if option == "create_graph" else torch.ones(3, *out.shape)
    with pytest.raises(RuntimeError, match=r"no second or batched derivatives: call eval\(\) first"):
        torch.autograd.grad(out, x, gradients, **{option: True})


def empirical_ntk(jacobians):
    """Return J J^T `(rows, rows)` of Jacobians `(rows, *shape)`, one per weight tensor."""
    return sum(j.flatten(1) @ j.flatten(1).T for j in jacobians)


def jacobians_of_torch_func(model, images, transform):
    buffers = dict(model.named_buffers())

    def logits(weights, image):
        return torch.func.functional_call(model, (weights, buffers), (image[None],))[0]

    jacobians = torch.func.vmap(transform(logits), (None, 0))(dict(model.named_parameters()), images)
    return [j.flatten(0, 1) for j in jacobians.values()]


@pytest.mark.parametrize("connections", CONNECTIONS)
def test_the_empirical_ntk_by_vmap_of_jacrev_is_that_of_autograd(connections):
    torch.manual_seed(0)
    model = models.S3Net(3, [2, 2], 4, compression=0.5, num_classes=2, block=CONNECTIONS[connections]).double().eval()
    images, weights = torch.randn(3, 3, 8, 8, dtype=torch.float64), list(model.parameters())
    rows = [torch.autograd.grad(logit, weights, retain_graph=True) for logit in model(images).flatten()]
    expected = empirical_ntk([torch.stack(gradients) for gradients in zip(*rows, strict=True)])
    assert expected.shape == (6, 6) and expected.diagonal().min() > 0
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        ntk = empirical_ntk(jacobians_of_torch_func(model, images, transform))
        torch.testing.assert_close(ntk, expected, rtol=1e-9, atol=0)


def test_function_transforms_in_training_give_the_gradient_of_the_kernels():
    model = create_model("s3net_cifar", growth_rate=3, depth=7, num_init_features=4, num_classes=2)
    images, weights = torch.randn(4, 3, 8, 8), dict(model.named_parameters())

    def loss(weights, buffers):
        return torch.func.functional_call(model, (weights, buffers), (images,)).square().mean()

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    by_transform = torch.func.grad(loss)(weights, buffers)
    loss(weights, dict(model.named_buffers())).backward()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, by_transform[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], msg=name)


def test_forward_mode_in_training_is_the_directional_derivative():
    model = create_model("s3net_cifar", growth_rate=3, depth=7, num_init_features=4, num_classes=2).double()
    images, direction = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        out = model(torch.autograd.forward_ad.make_dual(images, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    step = 1e-6
    expected = (model(images + step * direction) - model(images - step * direction)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-5, atol=1e-7)


def test_concatenation_hands_back_dense_gradients():
    parts = [torch.randn(2, c, 4, 4).to(memory_format=torch.channels_last).requires_grad_() for c in (3, 5)]
    out = cpu_kernels.concatenate(parts, training=True)
    assert torch.equal(out, torch.cat(parts, dim=1))
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert torch.equal(parts[0].grad, weight[:, :3]) and torch.equal(parts[1].grad, weight[:, 3:])
    assert parts[1].grad.is_contiguous(memory_format=torch.channels_last)


def test_plain_operations_call_no_kernel(monkeypatch):
    network, images = create_model("s3net_cifar", growth_rate=4, depth=7).train(), torch.randn(2, 3, 8, 8)

    def refuse(*args):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(cpu_kernels, "_apply", refuse)
    with cpu_kernels.plain_operations():
        assert network(images).shape == (2, 100)
    with pytest.raises(AssertionError, match="a kernel was called"):
        network(images)
