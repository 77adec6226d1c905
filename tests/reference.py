"""Dense references of the relevance rules: loops and matrices, float64, nothing of the package.

A :class:`Walk` computes a network forwards, one operation after the other, and keeps for each how
a gradient at its output becomes a (modified) gradient at its inputs. Convolutions become explicit
matrices; batch statistics are numbers, so each image is treated on its own. Which operations a
block consists of is written out by hand for every block, below.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

EPSILON = 1e-7
GAMMA = 0.25
PLAIN = ("grad_cam", "gradient_activation")
LRP = ("lrp_epsilon", "lrp_zplus", "lrp_gamma", "lrp_composite", "attn_lrp")


def stab(z: Tensor) -> Tensor:
    """One image's ``z`` moved away from zero by EPSILON of its size; zero counts as positive."""
    values = z.flatten().tolist()
    size = math.fsum(map(abs, values)) / len(values)
    shift = EPSILON * 2.0 ** math.floor(math.log2(size)) if size else sys.float_info.min
    return z + shift * torch.where(z >= 0, 1.0, -1.0)


# --- The rules for one affine layer y = matrix @ x + shift of one image ------------------------


def plain(matrix: Tensor, shift: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    return matrix.T @ grad


def epsilon(matrix: Tensor, shift: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    y = matrix @ x + shift
    return matrix.T @ (grad * y / stab(y))


def zplus(matrix: Tensor, shift: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """Relevance in proportion to the positive part of each contribution ``matrix[i, j] * x[j]``."""
    y = matrix @ x + shift
    contributions = matrix * x
    helps = contributions > 0
    ratio = grad * y / stab((contributions * helps).sum(1))
    return ((matrix * helps) * ratio[:, None]).sum(0)


def gamma(matrix: Tensor, shift: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """In proportion to the contributions, those with the output's sign weighed by 1 + GAMMA."""
    y = matrix @ x + shift
    contributions = matrix * x
    agrees = torch.where(y[:, None] >= 0, contributions > 0, contributions < 0)
    ratio = grad * y / stab(y + GAMMA * (contributions * agrees).sum(1))
    return (matrix * (1 + GAMMA * agrees) * ratio[:, None]).sum(0)


CONVOLUTION_RULE = {
    "grad_cam": plain,
    "gradient_activation": plain,
    "lrp_epsilon": epsilon,
    "lrp_zplus": zplus,
    "lrp_gamma": gamma,
    "lrp_composite": zplus,
    "attn_lrp": epsilon,
}
LINEAR_RULE = {**CONVOLUTION_RULE, "lrp_composite": epsilon}


def convolution_matrix(convolution: nn.Conv2d, height: int, width: int) -> tuple[Tensor, tuple]:
    """The matrix of a convolution without its bias, and the shape (c, h, w) of its output.

    ``Conv2dSame`` pads as TensorFlow does: output ceil(in / stride), the odd pixel at the end.
    """
    kernel, stride, dilation = (
        convolution.kernel_size,
        convolution.stride,
        convolution.dilation,
    )
    before, out = [], []
    for axis, size in enumerate((height, width)):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if type(convolution).__name__ == "Conv2dSame":
            length = math.ceil(size / stride[axis])
            total = max((length - 1) * stride[axis] + reach - size, 0)
            before.append(total // 2)
        else:
            before.append(convolution.padding[axis])
            length = (size + 2 * convolution.padding[axis] - reach) // stride[axis] + 1
        out.append(length)
    weight = convolution.weight.detach()
    outputs, inputs_per_group = weight.shape[:2]
    groups, outputs_per_group = convolution.groups, outputs // convolution.groups
    matrix = torch.zeros(
        outputs, out[0], out[1], convolution.in_channels, height, width, dtype=torch.float64
    )
    for group, i, j, ki, kj in product(
        range(groups), range(out[0]), range(out[1]), range(kernel[0]), range(kernel[1])
    ):
        row = i * stride[0] - before[0] + ki * dilation[0]
        column = j * stride[1] - before[1] + kj * dilation[1]
        if 0 <= row < height and 0 <= column < width:
            to = slice(group * outputs_per_group, (group + 1) * outputs_per_group)
            of = slice(group * inputs_per_group, (group + 1) * inputs_per_group)
            matrix[to, i, j, of, row, column] = weight[to, :, ki, kj]
    shape = (outputs, *out)
    return matrix.reshape(math.prod(shape), -1), shape


# --- Walking a network --------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """A value on the way, and how its gradient is handed back: [(parent, grad -> grad), ...]."""

    value: Tensor
    parents: Sequence[tuple[Node, Callable[[Tensor], Tensor]]] = ()


class Walk:
    """Forwards by calling the operations, backwards by :meth:`gradient`.

    Args:
        method: the relevance method whose rules apply.
        training: whether batch norm uses the statistics of the batch.
    """

    def __init__(self, method: str, training: bool) -> None:
        self.method, self.training = method, training
        self.is_lrp = method in LRP
        self.nodes: list[Node] = []

    def add_node(self, value: Tensor, *parents: tuple[Node, Callable[[Tensor], Tensor]]) -> Node:
        self.nodes.append(Node(value.detach(), parents))
        return self.nodes[-1]

    def gradient(self, output: Node, grad: Tensor, layer: Node) -> Tensor:
        """The modified gradient at ``layer`` for the gradient ``grad`` at ``output``."""
        grads = {id(output): grad}
        for node in reversed(self.nodes):
            if id(node) not in grads:
                continue
            for parent, back in node.parents:
                part = back(grads[id(node)])
                grads[id(parent)] = grads.get(id(parent), 0) + part
        return grads[id(layer)]

    def statistics(self, norm: nn.Module, value: Tensor) -> tuple[Tensor, Tensor]:
        """Batch norm as y = scale * x + shift, per channel."""
        if self.training:
            mean = value.mean((0, 2, 3))
            var = ((value - mean[:, None, None]) ** 2).mean((0, 2, 3))
        else:
            mean, var = norm.running_mean, norm.running_var
        scale = norm.weight.detach() / (var + norm.eps).sqrt()
        return scale, norm.bias.detach() - scale * mean

    def affine(self, x: Node, matrix: Tensor, shift: Tensor, shape: tuple, rule: Callable) -> Node:
        flat = x.value.flatten(1)
        value = torch.stack([matrix @ image + shift for image in flat]).reshape(-1, *shape)

        def back(grad: Tensor) -> Tensor:
            pairs = zip(flat, grad.flatten(1), strict=True)
            return torch.stack([rule(matrix, shift, *pair) for pair in pairs]).reshape_as(x.value)

        return self.add_node(value, (x, back))

    def conv(self, x: Node, convolution: nn.Conv2d, norm: nn.Module | None = None) -> Node:
        """A convolution with the batch norm behind it as one affine layer."""
        matrix, shape = convolution_matrix(convolution, *x.value.shape[2:])
        pixels = shape[1] * shape[2]
        shift = torch.zeros(shape[0], dtype=torch.float64)
        if convolution.bias is not None:
            shift = convolution.bias.detach()
        shift = shift.repeat_interleave(pixels)
        if norm is not None:
            flat = x.value.flatten(1)
            raw = torch.stack([matrix @ image + shift for image in flat]).reshape(-1, *shape)
            scale, offset = (s.repeat_interleave(pixels) for s in self.statistics(norm, raw))
            matrix, shift = scale[:, None] * matrix, scale * shift + offset
        return self.affine(x, matrix, shift, shape, CONVOLUTION_RULE[self.method])

    def linear(self, x: Node, layer: nn.Linear) -> Node:
        rule = LINEAR_RULE[self.method]
        weight = layer.weight.detach()
        shift = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        return self.affine(x, weight, shift, shift.shape, rule)

    def norm(self, x: Node, norm: nn.Module) -> Node:
        """A batch norm that no convolution feeds."""
        scale, shift = (s[:, None, None] for s in self.statistics(norm, x.value))
        return self.add_node(scale * x.value + shift, (x, lambda grad: scale * grad))

    def activation(self, x: Node, function: Callable[[Tensor], Tensor]) -> Node:
        y = function(x.value.clone()).detach()
        if self.is_lrp:
            denominator = torch.stack([stab(image) for image in x.value])
            return self.add_node(y, (x, lambda grad: grad * y / denominator))
        return self.plainly(function, x)

    def plainly(self, function: Callable[..., Tensor], *inputs: Node) -> Node:
        """Any function with its ordinary gradient, by the dense Jacobian of each image."""
        values = [node.value for node in inputs]
        output = function(*(value.clone() for value in values))

        def back_to(k: int) -> Callable[[Tensor], Tensor]:
            def back(grad: Tensor) -> Tensor:
                parts = []
                for i in range(len(output)):
                    image = [value[i : i + 1].clone() for value in values]

                    def one(z: Tensor, image: list = image) -> Tensor:
                        return function(*image[:k], z.clone(), *image[k + 1 :]).flatten()

                    jacobian = torch.autograd.functional.jacobian(one, image[k])
                    jacobian = jacobian.reshape(-1, image[k].numel())
                    parts.append((jacobian.T @ grad[i].flatten()).reshape(image[k].shape))
                return torch.cat(parts)

            return back

        return self.add_node(output, *((node, back_to(k)) for k, node in enumerate(inputs)))

    def sum(self, x: Node, y: Node) -> Node:
        return self.add_node(x.value + y.value, (x, lambda g: g), (y, lambda g: g))

    def concat(self, *parts: Node) -> Node:
        edges = [0]
        for part in parts:
            edges.append(edges[-1] + part.value.shape[1])
        backs = [
            (part, lambda grad, a=a, b=b: grad[:, a:b])
            for part, a, b in zip(parts, edges[:-1], edges[1:], strict=True)
        ]
        return self.add_node(torch.cat([part.value for part in parts], 1), *backs)

    def mean(self, x: Node, keepdim: bool = False) -> Node:
        pixels = x.value.shape[2] * x.value.shape[3]
        value = x.value.mean((2, 3), keepdim=keepdim)
        shape = (*x.value.shape[:2], 1, 1)
        return self.add_node(value, (x, lambda g: (g.reshape(shape) / pixels).expand_as(x.value)))

    def halved(self, x: Node) -> Node:
        return self.add_node(x.value, (x, lambda grad: grad / 2))

    def product(self, x: Node, gate: Node) -> Node:
        """``x * gate``; the gate is a constant to LRP."""
        to_x = (x, lambda grad: grad * gate.value)
        if self.is_lrp:
            return self.add_node(x.value * gate.value, to_x)
        to_gate = (gate, lambda grad: (grad * x.value).sum((2, 3), keepdim=True))
        return self.add_node(x.value * gate.value, to_x, to_gate)


# --- The blocks, written out by hand -------------------------------------------------------------


def stem(walk: Walk, block: nn.Module, x: Node) -> Node:
    """convolution, batch norm with activation: ``nn.Sequential(conv, norm_act)``."""
    return walk.activation(walk.conv(x, block[0], block[1]), block[1].act)


def gate_function(gate: nn.Module) -> Callable[[Tensor], Tensor]:
    """The gate, exactly: PyTorch's derivative of ``Hardsigmoid`` holds 1/6 in float32."""
    if isinstance(gate, nn.Hardsigmoid):
        return lambda x: (x + 3).clamp(0, 6) / 6
    return gate


def squeeze_excite(walk: Walk, block: nn.Module, x: Node) -> Node:
    squeezed = walk.conv(walk.mean(x, keepdim=True), block.conv_reduce)
    expanded = walk.conv(walk.activation(squeezed, block.act1), block.conv_expand)
    return walk.product(x, walk.plainly(gate_function(block.gate), expanded))


def depthwise_separable(walk: Walk, block: nn.Module, x: Node) -> Node:
    y = walk.activation(walk.conv(x, block.conv_dw, block.bn1), block.bn1.act)
    if not isinstance(block.se, nn.Identity):
        y = squeeze_excite(walk, block.se, y)
    y = walk.conv(y, block.conv_pw, block.bn2)
    return walk.sum(y, x) if block.has_skip else y


def inverted_residual(walk: Walk, block: nn.Module, x: Node) -> Node:
    y = walk.activation(walk.conv(x, block.conv_pw, block.bn1), block.bn1.act)
    y = walk.activation(walk.conv(y, block.conv_dw, block.bn2), block.bn2.act)
    if not isinstance(block.se, nn.Identity):
        y = squeeze_excite(walk, block.se, y)
    y = walk.conv(y, block.conv_pwl, block.bn3)
    return walk.sum(y, x) if block.has_skip else y


def basic_residual(walk: Walk, block: nn.Module, x: Node) -> Node:
    """resnet18's block, its shortcut by convolution and batch norm where it has one."""
    y = walk.activation(walk.conv(x, block.conv1, block.bn1), block.act1)
    y = walk.conv(y, block.conv2, block.bn2)
    shortcut = x
    if block.downsample is not None:
        shortcut = walk.conv(x, block.downsample[0], block.downsample[1])
    return walk.activation(walk.sum(y, shortcut), block.act2)


def preactivation_bottleneck(walk: Walk, block: nn.Module, x: Node) -> Node:
    start = walk.activation(walk.norm(x, block.norm1), block.norm1.act)
    shortcut = x if block.downsample is None else walk.conv(start, block.downsample.conv)
    y = walk.activation(walk.conv(start, block.conv1, block.norm2), block.norm2.act)
    y = walk.activation(walk.conv(y, block.conv2, block.norm3), block.norm3.act)
    return walk.sum(walk.conv(y, block.conv3), shortcut)


def dense_layer(walk: Walk, layer: nn.Module, *parts: Node) -> Node:
    y = walk.activation(walk.norm(walk.concat(*parts), layer.norm1), layer.norm1.act)
    y = walk.activation(walk.conv(y, layer.conv1, layer.norm2), layer.norm2.act)
    return walk.conv(y, layer.conv2)


def dense_block(walk: Walk, block: nn.Module, x: Node) -> Node:
    parts = [x]
    for layer in block.values():
        parts.append(dense_layer(walk, layer, *parts))
    return walk.concat(*parts)


def visformer_attention(walk: Walk, attention: nn.Module, x: Node) -> Node:
    """Softmax weights are constants to LRP: relevance passes through the values alone.

    To AttnLRP they are not, and half of the relevance of each product goes to each operand.
    """
    h, w = x.value.shape[2:]
    heads, size = attention.num_heads, attention.head_dim

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(qkv.reshape(len(qkv), 3, heads, size, h * w).unbind(1))  # n, heads, size, hw

    def scores(qkv: Tensor) -> Tensor:
        q, k, _ = split(qkv)
        return torch.einsum("bhdi,bhdj->bhij", q, k) * attention.scale

    def mix(qkv: Tensor, attend: Tensor) -> Tensor:
        mixed = torch.einsum("bhij,bhdj->bhdi", attend, split(qkv)[2])
        return mixed.reshape(len(qkv), heads * size, h, w)

    def softmax(z: Tensor) -> Tensor:
        return z.softmax(-1)

    qkv = walk.conv(x, attention.qkv)
    if walk.method == "attn_lrp":
        attend = walk.plainly(softmax, walk.halved(walk.plainly(scores, qkv)))
        return walk.conv(walk.halved(walk.plainly(mix, qkv, attend)), attention.proj)
    if walk.is_lrp:
        attend = walk.add_node(softmax(scores(qkv.value)))
    else:
        attend = walk.plainly(softmax, walk.plainly(scores, qkv))
    return walk.conv(walk.plainly(mix, qkv, attend), attention.proj)


def visformer_block(walk: Walk, block: nn.Module, x: Node) -> Node:
    if block.attn is not None:
        x = walk.sum(x, visformer_attention(walk, block.attn, walk.norm(x, block.norm1)))
    y = walk.activation(walk.conv(walk.norm(x, block.norm2), block.mlp.conv1), block.mlp.act1)
    if block.mlp.conv2 is not None:
        y = walk.activation(walk.conv(y, block.mlp.conv2), block.mlp.act2)
    return walk.sum(x, walk.conv(y, block.mlp.conv3))


def sequential(walk: Walk, layers: nn.Module, x: Node) -> Node:
    """A plain chain of convolutions, linear layers, activations, poolings and flattenings."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = walk.conv(x, layer)
        elif isinstance(layer, nn.Linear):
            x = walk.linear(x, layer)
        elif isinstance(layer, nn.Flatten | nn.AvgPool2d | nn.MaxPool2d):
            x = walk.plainly(layer, x)
        else:
            x = walk.activation(x, layer)
    return x


def relevance(
    method: str,
    images: Tensor,
    targets: Tensor,
    tail: Callable[[Walk, Node], Node],
    training: bool = False,
    signed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Maps (n, h, w) at the activations ``images`` of the classes ``targets``, and the logits.

    Args:
        tail: walks from the layer's activations to the logits (n, classes).
    """
    walk = Walk(method, training)
    layer = walk.add_node(images)
    logits = tail(walk, layer)
    one_hot = nn.functional.one_hot(targets, logits.value.shape[1]).double()
    grad = walk.gradient(logits, one_hot, layer)
    if method == "grad_cam":
        grad = grad.mean((2, 3), keepdim=True)
    maps = (images * grad).sum(1)
    return (maps if signed else maps.clamp(min=0)), logits.value


# --- Nets to compare on --------------------------------------------------------------------------


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Random weights, biases and batch-norm statistics, a third of the scales negative; float64."""
    generator = torch.Generator().manual_seed(seed)
    model.double()

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator).double()

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                sign = torch.where(uniform(module.weight, 0, 3) < 1, -1.0, 1.0)
                module.weight.copy_(sign * uniform(module.weight, 0.5, 1.5))
                module.bias.copy_(uniform(module.bias, -0.5, 0.5))
                module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                bound = math.sqrt(6 / module.weight[0].numel())
                module.weight.copy_(uniform(module.weight, -bound, bound))
                if module.bias is not None:
                    module.bias.copy_(uniform(module.bias, -0.3, 0.3))
    return model


class Tail(nn.Module):
    """A target layer, a block, pooling, a linear head: the block's rules are all there is."""

    def __init__(self, block: nn.Module, channels: int, classes: int = 3) -> None:
        super().__init__()
        self.layer, self.block = nn.Identity(), block
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.layer(x)).mean((2, 3)))
