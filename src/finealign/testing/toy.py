"""What checks are run on: a backbone of a few thousand weights, and drawn images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.backbone.tower_backbone import TowerBackbone
from finealign.method.alignment import saliency_pooled
from finealign.types import Gaze

SIDE, PATCH, WIDTH, EMBED = 16, 8, 12, 8
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


class ToyBackbone(TowerBackbone):
    """A transformer of one block with random weights, always the same. A text is the bytes it is made of."""

    input_size, embed_dim, token_width, logit_scale = SIDE, EMBED, WIDTH, 20.0
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__(identifier="toy")
        generator = torch.Generator().manual_seed(0)
        self._tower = _Tower(generator).eval().requires_grad_(False)
        self._words = torch.randn(256, EMBED, generator=generator)

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        return self._tower

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters and buffers by name."""
        return {**self._tower.state_dict(), "words": self._words}

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode uint8 images (B, 3, S, S) as (B, D), with prompts and salient patches."""
        pixels = images.float().div(255).sub(0.5).div(0.5)
        tokens = self._tower(pixels, gaze.prompts if gaze else None)
        features = normalize(tokens[:, 0], dim=-1)
        if gaze and gaze.salient:
            features = features + saliency_pooled(tokens[:, 1:], scale=self.logit_scale)
        return normalize(features, dim=-1)

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Encode B texts as (B, D)."""
        counts = torch.stack([torch.bincount(torch.tensor([*text.encode(), 0]), minlength=256) for text in sentences])
        return normalize(counts.float() @ self._words, dim=-1)

    def beyond_window(self, sentences: Sequence[str]) -> list[bool]:
        """No text is too long."""
        return [False] * len(sentences)


class _Tower(nn.Module):
    """Patches become tokens, which attend to one another once."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        patches = (SIDE // PATCH) ** 2
        self.embed = nn.Parameter(torch.randn(3 * PATCH**2, WIDTH, generator=generator) / (3 * PATCH**2) ** 0.5)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH, generator=generator))
        self.places = nn.Parameter(torch.randn(1, patches, WIDTH, generator=generator))
        self.norm, self.last_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project = nn.Parameter(torch.randn(WIDTH, EMBED, generator=generator) / WIDTH**0.5)

    def forward(self, pixels: Tensor, prompts: Tensor | None) -> Tensor:
        """Tokens (B, 1 + L, D) of pixels (B, 3, S, S), the one of the whole image first."""
        across = SIDE // PATCH
        patches = pixels.reshape(-1, 3, across, PATCH, across, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = torch.cat([self.first.expand(len(pixels), -1, -1), patches @ self.embed + self.places], dim=1)
        count = tokens.shape[1]
        if prompts is not None:
            tokens = torch.cat([tokens, prompts.expand(len(pixels), -1, -1)], dim=1)
        normed = self.norm(tokens)
        attended = torch.softmax(normed @ normed.transpose(1, 2) / WIDTH**0.5, dim=-1) @ normed
        last: Tensor = self.last_norm(tokens + attended)[:, :count] @ self.project
        return last


def draw_images(folder: Path, *, each: int = 4) -> list[Path]:
    """Write small images of each colour, with noise, and return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(each * len(COLOURS)):
        colour = [*COLOURS.values()][number % len(COLOURS)]
        pixels = np.clip(np.array(colour) + rng.integers(-40, 40, (24, 28, 3)), 0, 255).astype(np.uint8)
        paths.append(folder / f"{number:02d}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
