"""From patch features to rows of the language model's input."""

from __future__ import annotations

import torch
from torch import nn

from mmgpt.config import ProjectorConfig
from mmgpt.errors import UsageError


class Projector(nn.Module):
    """Base: P patches of width D -> T tokens of width H. `tokens` is T."""

    tokens: int

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[N, P, D] -> [N, T, H]."""
        raise NotImplementedError

    def initialize(self, features: torch.Tensor) -> None:
        """Look at a sample of features [N, P, D] before training begins."""
        for module in self.modules():
            if isinstance(module, ActNorm):
                module.initialize(features)


class Linear(Projector):
    """One matrix (LLaVA, Liu et al. 2023, equation 1)."""

    def __init__(self, patches: int, width: int, hidden: int):
        super().__init__()
        self.tokens = patches
        self.proj = nn.Linear(width, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(features)


class MLP(Projector):
    """Two layers with GELU between them: `mlp2x_gelu` of LLaVA-1.5 (Liu et al. 2023b, section 3.2)."""

    def __init__(self, patches: int, width: int, hidden: int, inner: int):
        super().__init__()
        self.tokens = patches
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(features)))


class ActNorm(nn.Module):
    """A scale and a shift for every channel, set from data so that the channels start with mean 0 and deviation 1.

    Data-dependent initialisation of Glow (Kingma and Dhariwal 2018, section 3.1). Features read before a ViT's final norm have a
    few channels a hundred times larger than the rest; a LayerNorm, which divides by all of them together, drowns the others.

    Args:
        width: Channels.
        noise: Standard deviation of Gaussian noise on the result, in training: on features of a frozen encoder, which are the
            same in every epoch, what augmentation is on pictures. It acts as a penalty on the slope of what follows (Bishop
            1995, "Training with noise is equivalent to Tikhonov regularization").
    """

    def __init__(self, width: int, noise: float = 0.0):
        super().__init__()
        self.noise = noise
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def initialize(self, features: torch.Tensor) -> None:
        """Set scale and shift from a sample of features [..., D]."""
        rows = features.flatten(0, -2).float()
        self.scale.copy_(1 / rows.std(0).clamp(min=1e-4))
        self.shift.copy_(-rows.mean(0) * self.scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        normal = features * self.scale + self.shift
        return normal + self.noise * torch.randn_like(normal) if self.training and self.noise else normal


class Pool(Projector):
    """The mean of every factor x factor block of patches, then two layers.

    Fewer tokens without more weights, and blind to where in a block something stands: the quickest to learn from few pictures.
    MM1 (McKinzie et al. 2024, section 3.2) found pooling as good as costlier ways to make tokens fewer.
    """

    def __init__(self, grid: tuple[int, int], width: int, hidden: int, factor: int, inner: int, drop: float, noise: float = 0.0):
        super().__init__()
        _check_factor(grid, factor)
        self.grid, self.factor, self.drop = grid, factor, drop
        self.tokens = grid[0] * grid[1] // factor**2
        self.norm = ActNorm(width, noise)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def initialize(self, features: torch.Tensor) -> None:
        # Means vary less than what they are means of: the norm has to see what it will be given.
        training, self.training = self.training, False
        self.norm.initialize(self.pool(features.float()))
        self.training = training

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(self.pool(features)))))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """[N, rows * columns, D] -> [N, T, D]; in training, the mean is over those patches that were not dropped."""
        number, patches, width = features.shape
        rows, columns, f = *self.grid, self.factor
        shape = number, rows // f, f, columns // f, f
        if not (self.training and self.drop):
            return features.view(*shape, width).mean((2, 4)).flatten(1, 2)
        kept = (torch.rand(number, patches, device=features.device) >= self.drop).to(features.dtype)
        total = (features * kept[..., None]).view(*shape, width).sum((2, 4))
        return (total / kept.view(*shape).sum((2, 4)).clamp(min=1)[..., None]).flatten(1, 2)


def _check_factor(grid: tuple[int, int], factor: int) -> None:
    rows, columns = grid
    if factor < 1 or rows % factor or columns % factor:
        fits = [f for f in range(1, min(grid) + 1) if rows % f == 0 and columns % f == 0]
        raise UsageError(f"model.projector.factor {factor} does not divide the {rows} x {columns} patch grid; these do: {fits}")


class PixelShuffle(Projector):
    """factor x factor neighbouring patches are joined to one token of factor^2 D numbers, then two layers.

    Space to depth as in Idefics3 and nanoVLM.
    """

    def __init__(self, grid: tuple[int, int], width: int, hidden: int, factor: int, inner: int, noise: float = 0.0):
        super().__init__()
        rows, columns = grid
        _check_factor(grid, factor)
        self.grid, self.factor = grid, factor
        self.tokens = rows * columns // factor**2
        self.norm = ActNorm(width, noise)
        self.fc1 = nn.Linear(width * factor**2, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.shuffle(self.norm(features)))))

    def shuffle(self, features: torch.Tensor) -> torch.Tensor:
        """[N, rows * columns, D] -> [N, T, factor^2 D]; the patches of a block stand in reading order."""
        number, _, width = features.shape
        rows, columns, f = *self.grid, self.factor
        blocks = features.view(number, rows // f, f, columns // f, f, width).permute(0, 1, 3, 2, 4, 5)
        return blocks.reshape(number, self.tokens, f * f * width)


class Resampler(Projector):
    """Learned queries attend to the patches: as many tokens as queries, whatever the image size.

    One block of cross-attention and a two-layer perceptron, after the Perceiver resampler of Flamingo (Alayrac et al. 2022,
    section 3.1.1). Patches carry learned positions: attention alone would not know where they stand.
    """

    def __init__(self, patches: int, width: int, hidden: int, queries: int, heads: int):
        super().__init__()
        if hidden % heads:
            raise UsageError(f"model.projector.heads {heads} does not divide the language model's width {hidden}")
        self.tokens = queries
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        self.positions = nn.Parameter(torch.randn(patches, hidden) * 0.02)
        self.input = nn.Linear(width, hidden)
        self.norm_patches = nn.LayerNorm(hidden)
        self.norm_queries = nn.LayerNorm(hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, 4 * hidden)
        self.fc2 = nn.Linear(4 * hidden, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        patches = self.norm_patches(self.input(features) + self.positions)
        queries = self.queries.expand(features.shape[0], -1, -1)
        hidden = queries + self.attention(self.norm_queries(queries), patches, patches, need_weights=False)[0]
        return hidden + self.fc2(nn.functional.gelu(self.fc1(self.norm(hidden))))


def make_projector(config: ProjectorConfig, *, grid: tuple[int, int], width: int, hidden: int) -> Projector:
    """Build the projector a configuration names.

    Args:
        config: Kind and sizes.
        grid: Rows and columns of patches.
        width: Width D of a patch feature.
        hidden: Width H of the language model.
    """
    patches = grid[0] * grid[1]
    inner = config.width or hidden
    if config.kind == "linear":
        return Linear(patches, width, hidden)
    if config.kind == "mlp2x_gelu":
        return MLP(patches, width, hidden, inner)
    if config.kind == "pixel_shuffle":
        return PixelShuffle(grid, width, hidden, config.factor, inner, config.noise)
    if config.kind == "pool":
        return Pool(grid, width, hidden, config.factor, inner, config.drop, config.noise)
    return Resampler(patches, width, hidden, config.queries, config.heads)
