"""The palette encoder: a patch as two colours and a mask that mixes them. Nothing is learned."""

import torch
from torch import Tensor, nn

from tokenizer_hf.encoders.blocks import cut_into_patches

LEAST_CONTRAST = 0.12
"""Distance of a patch's two colours, below which it counts as of one colour."""

SAME_DIRECTION = 0.99
"""Cosine above which two colours count as mixtures of one colour with the background."""


class PaletteEncoder(nn.Module):
    """Pictures (B, 3, H, W) -> latents (B, N, side·side + 6): mask, foreground, background.

    Every value of the mask lies in [0, 1]: 0 paints the background colour, 1 the foreground. With
    ``ground="patch"`` the background is the colour that more of the patch's border has, and a patch
    of one colour has an empty mask and the foreground (0, 0, 0). With ``ground="picture"`` it is
    the background of most patches: the figure is the colour that is farther from it, or where both
    are far (two things touch) the one that covers more, and a patch of another colour alone has a
    full mask. Masks then are what is covered by a thing, and one thing has one pair of colours in
    all its patches; the corner of a second thing in a patch is lost. (Otherwise the patches of a
    thing that fills more than half of them swap colours and mask, two ways to say one thing, and a
    language model whose rows are sums of factors draws them inside out.)

    What a patch shows, in which colour and on which ground are then three separate things, so a
    quantizer with a codebook for each (:class:`ProductQuantizer`) has codes for combinations that
    its training never saw.

    Args:
        num_channels: channels of a picture.
        side: side of a patch, pixels.
        ground: ``"patch"`` or ``"picture"``: whose background a patch is laid on.

    Source: two colours and a mask per block: Campbell et al., "Two bit/pixel full color encoding"
        (SIGGRAPH 1986). Theirs is a bit mask by luminance; ours lies along the line through the
        patch's colours and keeps its in-between values (soft edges).
    """

    def __init__(self, num_channels: int, side: int, ground: str = "patch") -> None:
        super().__init__()
        self.num_channels, self.side, self.ground = num_channels, side, ground
        self.output_dim = side * side + 2 * num_channels

    def forward(self, pixel_values: Tensor) -> Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):
            patches = cut_into_patches(pixel_values.float(), self.side)
            return self._split(patches.unflatten(-1, (-1, self.num_channels)))

    def _split(self, colours_BNPC: Tensor) -> Tensor:
        first, second = self._ends(colours_BNPC)
        line = second - first
        length = line.square().sum(-1, keepdim=True)
        along = colours_BNPC - first.unsqueeze(-2)
        mask = (along @ line.unsqueeze(-1)).squeeze(-1) / length.clamp_min(1e-8)
        mask = mask.clamp(0, 1)
        inner = nn.functional.pad(mask.new_zeros(self.side - 2, self.side - 2), (1,) * 4, value=1.0)
        border = inner.flatten()
        turned = ((mask > 0.5).float() @ border > border.sum() / 2).unsqueeze(-1)
        mask = torch.where(turned, 1 - mask, mask)
        ground = torch.where(turned, second, first)
        figure = torch.where(turned, first, second)
        plain = length.sqrt() < LEAST_CONTRAST
        mask = torch.where(plain, 0.0, mask)
        figure = torch.where(plain, 0.0, figure)
        ground = torch.where(plain, colours_BNPC.mean(-2), ground)
        if self.ground == "picture":
            mask, figure, ground = self._on_one_ground(mask, figure, ground, plain)
        return torch.cat([mask, figure, ground], -1)

    def _on_one_ground(
        self, mask: Tensor, figure: Tensor, ground: Tensor, plain: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lay every patch on the background that most patches of its picture share."""
        near = (torch.cdist(ground, ground) < LEAST_CONTRAST).float()
        most = near.sum(-1).argmax(-1, keepdim=True).unsqueeze(-1)
        members = near.gather(1, most.expand(-1, -1, near.shape[-1]))
        common = members @ ground / members.sum(-1, keepdim=True)

        def away(colour: Tensor) -> Tensor:
            return (colour - common).square().sum(-1, keepdim=True).sqrt()

        bare = plain & (away(ground) < LEAST_CONTRAST)
        figure = torch.where(plain, common, figure)  # the other colour of a patch that has but one
        touching = torch.minimum(away(figure), away(ground)) >= LEAST_CONTRAST  # two things
        less = mask.mean(-1, keepdim=True) < 0.5
        swapped = ~bare & torch.where(touching, less, away(figure) < away(ground))
        mask = torch.where(swapped, 1 - mask, mask)
        figure, ground = (
            torch.where(swapped, ground, figure),
            torch.where(swapped, figure, ground),
        )
        ground = torch.where(touching, common, ground)
        share, figure = self._unmixed(figure, ground, bare)
        return mask * share, torch.where(bare, 0.0, figure), ground

    def _unmixed(self, figure: Tensor, ground: Tensor, bare: Tensor) -> tuple[Tensor, Tensor]:
        """Of each patch's foreground: its share (B, N, 1) of the picture's purest such colour, and
        that colour. A patch with a soft edge alone shows a mixture of a thing's colour and the
        background; a purer one lies in the same direction, seen from the background, and farther
        away."""
        line = torch.where(bare, 0.0, figure - ground)
        length = line.norm(dim=-1, keepdim=True)
        direction = line / length.clamp_min(1e-8)
        alike = direction @ direction.mT > SAME_DIRECTION
        lengths = length.mT.expand(-1, length.shape[1], -1)
        purest = torch.where(alike, lengths, 0.0).argmax(-1, keepdim=True)
        pure = line.gather(1, purest.expand(-1, -1, line.shape[-1]))
        share = length / pure.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        return share.clamp(0, 1), ground + pure

    def _ends(self, colours_BNPC: Tensor) -> tuple[Tensor, Tensor]:
        """The two colours of each patch, (B, N, C) each.

        The pixels that lie farthest apart along the patch's widest colour axis are the first guess;
        each end then is the mean of the pixels near it, so that soft edges do not pull it.
        """
        centred = colours_BNPC - colours_BNPC.mean(-2, keepdim=True)
        covariance = centred.mT @ centred
        axis = torch.linalg.eigh(covariance).eigenvectors[..., -1:]
        place = (centred @ axis).squeeze(-1)
        low, high = place.amin(-1, keepdim=True), place.amax(-1, keepdim=True)
        share = (place - low) / (high - low).clamp_min(1e-8)

        def mean_of(near: Tensor) -> Tensor:
            weight = near.float().unsqueeze(-1)
            return (colours_BNPC * weight).sum(-2) / weight.sum(-2).clamp_min(1)

        return mean_of(share <= 0.1), mean_of((share >= 0.9) | (low == high))
