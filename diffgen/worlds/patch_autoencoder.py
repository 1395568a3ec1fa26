"""A linear patch autoencoder with a closed-form fit, in the interface that diffusers pipelines expect of a VAE."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn


class _Point:
    """A distribution without variance, where diffusers expects `latent_dist`."""

    def __init__(self, mean):
        self.mean = mean

    def sample(self, generator=None):
        return self.mean

    def mode(self):
        return self.mean


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """z = P (patch - mean), patch = P^T z + mean, with the rows of P the leading principal components of patches.

    Images [B, 3, H, W] in [-1, 1]; latents [B, latent_channels, H/f, W/f] with f = 2 ** (len(block_out_channels) - 1).
    One global scale (scaling_factor), no whitening: whitening would amplify the noise of the small components.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 24,
        block_out_channels: tuple = (1, 1, 1),  # pipelines read the down-sampling factor from its length
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        f = 2 ** (len(block_out_channels) - 1)
        self.encoder = nn.Conv2d(3, latent_channels, f, stride=f)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, f, stride=f)

    @classmethod
    @torch.no_grad()
    def fit(cls, images: torch.Tensor, latent_channels: int = 24, factor: int = 4) -> PatchAutoencoder:
        """Principal components of all patches of images float [N, 3, H, W] in [-1, 1]."""
        patches = nn.functional.unfold(images, factor, stride=factor).transpose(1, 2).flatten(0, 1).double()
        mean = patches.mean(0)
        _, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        components = vectors.flip(1)[:, :latent_channels].T
        scale = 1 / ((patches - mean) @ components.T).std().item()
        blocks = (1,) * factor.bit_length()
        model = cls(latent_channels, blocks, scaling_factor=scale)
        kernel = components.reshape(latent_channels, 3, factor, factor).float()
        model.encoder.weight.copy_(kernel)
        model.encoder.bias.copy_(-(components @ mean).float())
        model.decoder.weight.copy_(kernel)
        # a bias is one number a channel; the mean patch is nearly constant inside a channel
        model.decoder.bias.copy_(mean.reshape(3, factor * factor).mean(1).float())
        return model

    def encode(self, x, return_dict: bool = True):
        posterior = _Point(self.encoder(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z, return_dict: bool = True, generator=None):
        image = self.decoder(z)
        return DecoderOutput(sample=image) if return_dict else (image,)
