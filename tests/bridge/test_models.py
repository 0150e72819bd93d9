"""The networks of the bridge: shapes, formulas and parameter counts; a seed gives the same weights."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

from ufm.bridge import models  # noqa: E402


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def layers(channels: int, width: int, blocks: tuple[int, ...], projected: bool) -> int:
    """Parameters of a residual network with a layer of 10 classes, counted by hand."""
    total, at = channels * width * 9 + 2 * width, width
    for stage, n in enumerate(blocks):
        out = width * 2**stage
        for _ in range(n):
            total += at * out * 9 + 2 * out + out * out * 9 + 2 * out
            total += at * out + 2 * out if at != out and projected else 0
            at = out
    return total + at * 10 + 10


def test_parameter_counts() -> None:
    """ResNet-18 has the 11,173,962 of its CIFAR form; ResNet-20 with shortcuts without parameters 269,722, published as 0.27M."""
    for body, count, counted in (
        (models.resnet18(), 11_173_962, layers(3, 64, (2, 2, 2, 2), True)),
        (models.resnet20(), 269_722, layers(3, 16, (3, 3, 3), False)),
        (models.resnet20(1, 8), None, layers(1, 8, (3, 3, 3), False)),
    ):
        found = parameters(models.Network(body, nn.Linear(body.out_features, 10)))
        assert found == counted
        assert count in (None, found)


@pytest.mark.parametrize("make", [models.resnet18, models.resnet20])
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (1, 8)])
def test_residual_bodies(make: object, channels: int, side: int) -> None:
    """Features (B, out_features), nonnegative, of pictures of any small size."""
    body = make(channels, 4)  # type: ignore[operator]
    features = body(torch.randn(3, channels, side, side))
    assert features.shape == (3, body.out_features)
    assert (features >= 0).all()
    assert features.std() > 0


def test_blocks_halve_the_picture() -> None:
    """Each stage but the first has half the sides and twice the channels."""
    body = models.resnet20(3, 4)
    shapes, x = [], body.stem(torch.randn(2, 3, 32, 32))
    for block in body.blocks:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 32, 32)] * 3 + [(8, 16, 16)] * 3 + [(16, 8, 8)] * 3


@pytest.mark.parametrize("projected", [False, True])
def test_block_is_its_formula(projected: bool) -> None:
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)), the shortcut every second pixel between zero channels, or 1 x 1 convolved."""
    block = models.Block(4, 8, 2, projected).eval().double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    y = torch.zeros(2, 8, 3, 3, dtype=torch.float64)
    if projected:
        conv, norm = block.shortcut
        y += (x[:, :, ::2, ::2].permute(0, 2, 3, 1) @ conv.weight[:, :, 0, 0].mT).permute(0, 3, 1, 2) / np.sqrt(1 + norm.eps)
    else:
        y[:, 2:6] += x[:, :, ::2, ::2]
    first = nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1) / np.sqrt(1 + block.bn1.eps)
    inner = nn.functional.conv2d(first.clamp(min=0), block.conv2.weight, padding=1) / np.sqrt(1 + block.bn2.eps)
    torch.testing.assert_close(block(x), (y + inner).clamp(min=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("relu_features", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_its_formula(relu_features: bool, bias: bool) -> None:
    body = models.mlp((12, 9, 7, 5), relu_features=relu_features, bias=bias).double()
    x = torch.randn(20, 3, 2, 2, dtype=torch.float64)
    h = x.reshape(20, 12).numpy()
    linear = [layer for layer in body if isinstance(layer, nn.Linear)]
    for at, layer in enumerate(linear):
        h = h @ layer.weight.detach().numpy().transpose() + (layer.bias.detach().numpy() if bias else 0.0)
        h = np.maximum(h, 0) if at < 2 or relu_features else h
    np.testing.assert_allclose(body(x).detach().numpy(), h, atol=1e-13)
    assert body.out_features == 5
    assert (h < 0).any() != relu_features


def test_mlp_with_batch_norm() -> None:
    """BatchNorm follows each linear layer, which has no bias; before the ReLU each feature has mean 0 and variance 1 over the batch."""
    body = models.mlp((6, 8, 4), batch_norm=True)
    kinds = [type(layer).__name__ for layer in body]
    assert kinds == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU"]
    assert all(layer.bias is None for layer in body if isinstance(layer, nn.Linear))
    features = models.mlp((6, 8, 4), batch_norm=True, relu_features=False)(torch.randn(50, 6))
    assert torch.allclose(features.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(features.var(0, correction=0), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_deep_head_is_its_formula(activation: str, depth: int, bias: bool) -> None:
    """W_L s(... s(W_1 h)) + b with `weights` in the order they act; one bias, of the last layer."""
    head = models.deep_head(6, 3, depth, activation, bias).double()  # type: ignore[arg-type]
    chain = [W.detach().numpy() for W in models.weights(head)]
    assert [W.shape for W in chain] == [(6, 6)] * (depth - 1) + [(3, 6)]
    assert parameters(head) == 36 * (depth - 1) + 18 + 3 * bias
    h = torch.randn(6, 10, dtype=torch.float64)
    z = h.numpy()
    for at, W in enumerate(chain, 1):
        z = W @ z
        z = np.maximum(z, 0) if activation == "relu" and at < depth else z
    z = z + head[-1].bias.detach().numpy()[:, None] if bias else z
    np.testing.assert_allclose(head(h.mT).mT.detach().numpy(), z, atol=1e-13)


def test_weights_are_the_parameters() -> None:
    """A gradient through `weights` reaches the head; a buffer is found too, and a head without a matrix refused."""
    head = models.deep_head(4, 3, 2)
    sum((W**2).sum() for W in models.weights(head)).backward()
    assert torch.equal(head[0].weight.grad, 2 * head[0].weight.detach())
    fixed = nn.Module()
    fixed.register_buffer("weight", torch.ones(3, 4))
    assert models.weights(fixed)[0] is fixed.weight
    assert models.weights(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))[0].shape == (3, 4)
    with pytest.raises(ValueError, match="ReLU holds no weight matrix"):
        models.weights(nn.ReLU())


def made(seed: int) -> list[torch.Tensor]:
    with models.seeded(seed):
        net = models.Network(models.resnet20(1, 4), models.deep_head(16, 3, 2))
    return list(net.state_dict().values())


def test_seeds() -> None:
    """A seed gives the same weights whatever was drawn before, other seeds others; torch's generator is left as it was."""
    first = made(3)
    torch.randn(5)
    before = torch.get_rng_state()
    second, other = made(3), made(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_network_passes_labels_on() -> None:
    """head(body(x)), and head(body(x), labels) where labels are given."""

    class Marked(nn.Linear):
        def forward(self, features: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            logits = super().forward(features)
            return logits if labels is None else logits + labels[:, None]

    net = models.Network(models.mlp((4, 3)), Marked(3, 2))
    x, y = torch.randn(5, 4), torch.arange(5)
    plain = net.head(net.body(x))
    assert torch.equal(net(x), plain)
    assert torch.equal(net(x, y), plain + y[:, None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.mlp((5,)), r"widths is \(5,\)"),
        (lambda: models.mlp((5, 0)), r"widths is \(5, 0\)"),
        (lambda: models.deep_head(4, 3, 0), "depth is 0"),
        (lambda: models.deep_head(4, 3, 2, "tanh"), "activation 'tanh'"),  # type: ignore[arg-type]
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
