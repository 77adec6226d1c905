"""Dense references of relevance through transformer blocks; see :mod:`reference` for the walk.

Layer norms are matrices, one per token. AttnLRP is written as its paper has it, in relevances
instead of factors: what a product hands to each term is that term over twice the product.
"""

from collections.abc import Callable

import torch
from reference import LINEAR_RULE, Node, Walk, randomize
from torch import Tensor, nn


def linearly(walk: Walk, function: Callable[[Tensor], Tensor], x: Node) -> Node:
    """A rearrangement, a sum or another function that is linear without a bias."""
    value, back = torch.func.vjp(function, x.value)
    return walk.add_node(value, (x, lambda grad: back(grad)[0]))


def token_linear(walk: Walk, x: Node, layer: nn.Linear) -> Node:
    """A linear layer on each token (n, l, c): one large matrix per image."""
    n_tokens = x.value.shape[1]
    matrix = torch.kron(torch.eye(n_tokens).double(), layer.weight.detach())
    shift = layer.bias.detach().repeat(n_tokens)
    shape = (n_tokens, layer.out_features)
    return walk.affine(x, matrix, shift, shape, LINEAR_RULE[walk.method])


def layer_norm(walk: Walk, x: Node, norm: nn.LayerNorm) -> Node:
    """Over the last axis; its deviation counts as a number, but for Grad-CAM."""
    if walk.method == "grad_cam":
        return walk.plainly(norm, x)
    size = x.value.shape[-1]
    gamma, centring = norm.weight.detach(), torch.eye(size).double() - 1 / size
    matrices, outputs = [], []
    for token in x.value.reshape(-1, size):
        deviation = (sum((entry - token.mean()) ** 2 for entry in token) / size + norm.eps).sqrt()
        matrices.append(torch.diag(gamma / deviation) @ centring)
        outputs.append(matrices[-1] @ token + norm.bias.detach())

    def back(grad: Tensor) -> Tensor:
        pairs = zip(matrices, grad.reshape(-1, size), strict=True)
        return torch.stack([matrix.T @ g for matrix, g in pairs]).reshape(x.value.shape)

    return walk.add_node(torch.stack(outputs).reshape(x.value.shape), (x, back))


def attention(walk: Walk, module: nn.Module, x: Node, bias: Tensor | float = 0.0) -> Node:
    """Tokens (n, l, c) to tokens, with ``bias`` on the scores (n, heads, l, l)."""
    n, n_tokens, channels = x.value.shape
    heads = module.num_heads

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        parts = qkv.reshape(len(qkv), n_tokens, 3, heads, channels // heads).unbind(2)
        return tuple(part.transpose(1, 2) for part in parts)  # n, heads, l, d

    def scores(qkv: Tensor) -> Tensor:
        q, k, _ = split(qkv)
        return torch.einsum("bhid,bhjd->bhij", q, k) * module.scale

    def mix(weights: Tensor, qkv: Tensor) -> Tensor:
        return torch.einsum("bhij,bhjd->bihd", weights, split(qkv)[2]).flatten(2)

    qkv = token_linear(walk, x, module.qkv)
    z = scores(qkv.value) + bias
    weights = z.softmax(-1)
    value = mix(weights, qkv.value)
    if walk.method == "attn_lrp":
        q, k, v = split(qkv.value)

        def back(grad: Tensor) -> Tensor:
            o = value.reshape(n, n_tokens, heads, -1).transpose(1, 2)
            r_o = o * grad.reshape(n, n_tokens, heads, -1).transpose(1, 2)
            terms = weights[..., None] * v[:, :, None]  # n, heads, i, j, d
            shares = terms / (2 * o[:, :, :, None]) * r_o[:, :, :, None]
            r_v, r_weights = shares.sum(2), shares.sum(4)
            r_z = z * (r_weights - weights * r_weights.sum(-1, keepdim=True))
            terms = q[:, :, :, None] * k[:, :, None] * module.scale
            shares = terms / (2 * z[..., None]) * r_z[..., None]
            r_q, r_k = shares.sum(3), shares.sum(2)
            factors = torch.stack([r_q / q, r_k / k, r_v / v])  # 3, n, heads, l, d
            return factors.permute(1, 3, 0, 2, 4).reshape(qkv.value.shape)

        y = walk.add_node(value, (qkv, back))
    elif walk.is_lrp:
        y = walk.plainly(mix, walk.add_node(weights), qkv)
    else:
        biased = walk.sum(walk.plainly(scores, qkv), walk.add_node(z - scores(qkv.value)))
        y = walk.plainly(mix, walk.plainly(lambda s: s.softmax(-1), biased), qkv)
    return token_linear(walk, y, module.proj)


def times(walk: Walk, x: Node, factor: Tensor) -> Node:
    return walk.add_node(x.value * factor, (x, lambda grad: grad * factor))


def mlp(walk: Walk, block: nn.Module, x: Node) -> Node:
    y = walk.activation(token_linear(walk, x, block.fc1), block.act)
    return token_linear(walk, y, block.fc2)


def vit_block(walk: Walk, block: nn.Module, x: Node) -> Node:
    """Layer scale and the draws of stochastic depth, which the block has kept, are factors."""
    y = attention(walk, block.attn, layer_norm(walk, x, block.norm1))
    x = walk.sum(x, times(walk, y, block.ls1.gamma.detach() * block.drop_path1.drawn))
    y = mlp(walk, block.mlp, layer_norm(walk, x, block.norm2))
    return walk.sum(x, times(walk, y, block.ls2.gamma.detach() * block.drop_path2.drawn))


def list_windows(rows: int, columns: int, side: int, shift: int) -> tuple[list, list]:
    """For each window the positions in it, None for padding, and in which image part each is.

    The image is shifted cyclically, padded at the end, and cut: what a window joins from two ends
    does not look at each other.
    """
    padded = [-(-length // side) * side for length in (rows, columns)]
    windows, parts = [], []

    def part(at: int, length: int) -> int:
        return (at >= length - side) + (at >= length - shift) if shift else 0

    def position(row: int, column: int) -> tuple[int, int] | None:
        if row >= rows or column >= columns:
            return None
        return (row + shift) % rows, (column + shift) % columns

    for top in range(0, padded[0], side):
        for left in range(0, padded[1], side):
            cells = [(top + i, left + j) for i in range(side) for j in range(side)]
            windows.append([position(*cell) for cell in cells])
            parts.append([(part(r, padded[0]), part(c, padded[1])) for r, c in cells])
    return windows, parts


def swin_block(walk: Walk, block: nn.Module, x: Node) -> Node:
    """Maps (n, h, w, c) to maps; the attention sees each window as an image of its own."""
    n, rows, columns, channels = x.value.shape
    side, shift = block.window_size[0], block.shift_size[0]
    windows, parts = list_windows(rows, columns, side, shift)

    def cut(maps: Tensor) -> Tensor:
        empty = maps.new_zeros(channels)
        return torch.stack(
            [
                torch.stack([empty if at is None else image[at] for at in window])
                for image in maps
                for window in windows
            ]
        )

    def join(tokens: Tensor) -> Tensor:
        images = []
        for image in tokens.reshape(n, len(windows), side * side, channels):
            at = {
                position: image[i, j]
                for i, window in enumerate(windows)
                for j, position in enumerate(window)
                if position is not None
            }
            images.append(
                torch.stack([at[row, column] for row in range(rows) for column in range(columns)])
            )
        return torch.stack(images).reshape(n, rows, columns, channels)

    table = block.attn.relative_position_bias_table.detach()  # (2 side - 1)^2, heads
    bias = torch.zeros(len(windows), table.shape[1], side**2, side**2).double()
    for w, of_window in enumerate(parts):
        for i in range(side**2):
            for j in range(side**2):
                down, right = i // side - j // side, i % side - j % side
                bias[w, :, i, j] = table[(down + side - 1) * (2 * side - 1) + right + side - 1]
                if of_window[i] != of_window[j]:
                    bias[w, :, i, j] -= 100

    y = linearly(walk, cut, layer_norm(walk, x, block.norm1))
    y = attention(walk, block.attn, y, bias.repeat(n, 1, 1, 1))
    x = walk.sum(x, linearly(walk, join, y))
    tokens = linearly(walk, lambda maps: maps.flatten(1, 2), layer_norm(walk, x, block.norm2))
    y = mlp(walk, block.mlp, tokens)
    return walk.sum(x, linearly(walk, lambda t: t.reshape(n, rows, columns, channels), y))


def convnext_block(walk: Walk, block: nn.Module, x: Node) -> Node:
    h, w = x.value.shape[2:]
    y = linearly(walk, lambda m: m.flatten(2).mT, walk.conv(x, block.conv_dw))
    y = mlp(walk, block.mlp, layer_norm(walk, y, block.norm))
    y = times(walk, y, block.gamma.detach())
    return walk.sum(linearly(walk, lambda t: t.mT.unflatten(2, (h, w)), y), x)


# --- Nets to compare on --------------------------------------------------------------------------


def randomize_all(model: nn.Module, seed: int) -> nn.Module:
    """As :func:`reference.randomize`, with norms, tokens, scales and position biases."""
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).double()
            if "norm" in name or "gamma" in name:
                parameter.copy_(0.4 * noise + name.endswith(("weight", "gamma")))
            elif "token" in name or "embed" in name or "bias_table" in name:
                parameter.copy_(0.3 * noise)
    return model
