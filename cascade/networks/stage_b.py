"""Stage B, the decoder UNet: denoises Stage A's 4-channel latent, guided by Stage C's latent and pooled text.

Source: the Stable Cascade code release, `modules/stage_b.py`.
"""

import torch
from torch import Tensor, nn

from cascade.config import StageBConfig
from cascade.networks.blocks import ChannelNorm, Downsample, Pointwise, Rescaling, Upsample, resize
from cascade.networks.fused import layer_norm
from cascade.networks.unet import Condition, Constants, UNet, to_channels_first, to_channels_last


class StageB(UNet):
    """UNet over (b, 4, h, w) latents with even sides."""

    def __init__(self, config: StageBConfig) -> None:
        super().__init__(config)
        self.config = config
        widths = config.block_out_channels
        patch = config.patch_size**2
        self.effnet_mapper = _mapper(config.effnet_in_channels, widths[0])
        self.pixels_mapper = _mapper(config.pixel_mapper_in_channels, widths[0])
        self.clip_mapper = nn.Linear(
            config.clip_text_pooled_in_channels, config.conditioning_dim * config.clip_seq
        )
        self.embedding = nn.Sequential(
            nn.Identity(), Pointwise(config.in_channels * patch, widths[0]), ChannelNorm()
        )
        for level in range(len(widths)):
            down = (ChannelNorm(), Downsample(widths[level - 1], widths[level])) if level else ()
            self.down_downscalers.append(Rescaling(*down))
        for level in reversed(range(len(widths))):
            up = (ChannelNorm(), Upsample(widths[level], widths[level - 1])) if level else ()
            self.up_upscalers.append(Rescaling(*up))
        self._products = self._find_products()
        self.clf = nn.Sequential(ChannelNorm(), Pointwise(widths[0], config.out_channels * patch))

    def prepare(
        self,
        effnet: Tensor,
        pooled: Tensor,
        size: tuple[int, int],
        pixels: Tensor | None = None,
        *,
        constants: Constants | None = None,
    ) -> Condition:
        """Build the condition of a request.

        Args:
            effnet: latent of Stage C, (b, 16, h, w); zeros for the unguided branch.
            pooled: projected text, (b, 1, pooled width).
            size: height and width of the latent to be denoised, both even.
            pixels: a small guiding picture, (b, 3, h, w); by default zeros, as for the published weights.
            constants: the result of `constants`, if it is already known.
        """
        batch, dtype = pooled.shape[0], self.dtype
        height, width = (side // self.config.patch_size for side in size)
        if pixels is None:
            # A constant picture gives a constant term: one pixel is enough.
            pixels = torch.zeros(1, self.config.pixel_mapper_in_channels, 1, 1, device=self.device)
        semantic = resize(effnet.float().permute(0, 2, 3, 1), height, width).to(dtype)
        features = self.effnet_mapper(semantic)
        guide = self.pixels_mapper(pixels.to(dtype).permute(0, 2, 3, 1))
        features = features + (guide if guide.shape[1:3] == (1, 1) else resize(guide, height, width))
        tokens = self.clip_mapper(pooled.to(dtype)).view(batch, -1, self.config.conditioning_dim)
        return self._prepare(layer_norm(tokens), features, constants=constants)

    def forward(self, latents: Tensor, ratio: Tensor, condition: Condition) -> Tensor:
        """Predict the noise in `latents` (b, 4, h, w) at noise levels `ratio` (b,), 0 clean to 1 noise."""
        latents = latents.to(condition.constants.dtype)
        x = self.embedding(to_channels_last(latents, self.config.patch_size))
        x = self.clf(self._run(x + condition.features, ratio, condition))
        return to_channels_first(x, self.config.patch_size)


def _mapper(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        Pointwise(in_channels, 4 * channels), nn.GELU(), Pointwise(4 * channels, channels), ChannelNorm()
    )
