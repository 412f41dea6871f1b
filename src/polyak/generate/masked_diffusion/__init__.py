"""Masked diffusion without time: the first-hitting sampler, ancestral sampling, decoding, and two measures of text.

Zheng, Chen, Mao, Liu, Zhu and Zhang, "Masked Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate
Categorical Sampling", arXiv 2409.02908. A token is the mask with probability ``1 - alpha(t)``. Backwards, with n masks left at t,
the next one is revealed at

    tau = alpha^-1(1 - u^(1/n) (1 - alpha(t))),   u uniform on (0, 1),

at a position that is uniform among the n, with a token drawn from what the network says of it there. So L calls and L draws make
an exact sample; a network that is not told the time need not know tau.

The process and its loss are :class:`polyak.generate.MaskedProcess`, draws and their law :mod:`polyak.generate.discrete`.

Example:
    >>> process = MaskedProcess(vocab=5)
    >>> denoiser = TokenDenoiser(lambda x: torch.zeros(*x.shape, 5), process)  # x -> logits
    >>> sample(denoiser, (2, 8), solver=FirstHitting(), generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 8])
"""

from polyak.generate.masked_diffusion.ancestral import MaskedAncestral
from polyak.generate.masked_diffusion.decoding import generate_masked
from polyak.generate.masked_diffusion.first_hitting import FirstHitting
from polyak.generate.masked_diffusion.metrics import generative_perplexity, sentence_entropy

__all__ = ["FirstHitting", "MaskedAncestral", "generate_masked", "generative_perplexity", "sentence_entropy"]
