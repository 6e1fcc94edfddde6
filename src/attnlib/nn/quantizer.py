"""Vector quantization: the nearest of K codes stands for a vector.

``q(x) = e_k`` with ``k = argmin_j |x - e_j|^2``. The gradient goes straight through to ``x``, which is drawn to its
code by ``commitment * mean |x - sg(q)|^2``. Codes follow the vectors they stand for by a moving average (``decay``),

    n_k <- decay n_k + (1 - decay) #k,    m_k <- decay m_k + (1 - decay) sum of x at k,    e_k = m_k / n_k,

or, with ``decay=0``, by the gradient of ``mean |sg(x) - q|^2``. Van den Oord et al., 2017, arXiv 1711.00937.

Codes can be read softly: :meth:`VectorQuantizer.soft` is the mean of codes by given weights, which is the code itself
where one weight is one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_float, check_int, check_real, check_valid, check_whole, check_width
from ..types import stats_dtype
from .layers import zero_invalid


class Quantized(NamedTuple):
    """What a :class:`VectorQuantizer` gives.

    ``y`` (B, *grid, dim) codes with the gradient of the input; ``indices`` (B, *grid), -1 for tokens that do not exist;
    ``loss`` of codes and commitment; ``perplexity`` of how often each code was taken, from 1 to K.
    """

    y: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor


class VectorQuantizer(nn.Module):
    """K codes of ``dim`` numbers, channels last.

    Args:
        num_codes: K.
        dim: of a code.
        decay: of the moving average that makes the codes; 0: codes are a parameter with a gradient.
        commitment: weight of what draws vectors to their codes.
        eps: added to every count before sums are divided by it.
        codebook_weight: with ``decay=0``, weight of what draws codes to their vectors.
        compat: ``"authors"``: the moving average as commonly released. It starts at counts of zero, keeps the counts
            with ``eps`` added, and begins at sums that have nothing to do with the codes, so a code that nothing chose
            flies away at the first step. Ours begins at the codes with counts of one: such a code stays where it is.

    >>> q = VectorQuantizer(8, 4)
    >>> out = q(torch.randn(2, 5, 5, 4))
    >>> out.y.shape, out.indices.shape, torch.equal(q.embed(out.indices), q.soft(F.one_hot(out.indices, 8).float()))
    (torch.Size([2, 5, 5, 4]), torch.Size([2, 5, 5]), True)
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self, num_codes: int, dim: int, decay: float = 0.99, commitment: float = 0.25, eps: float = 1e-5,
        compat: str | None = None, codebook_weight: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.codebook_weight = check_real("codebook_weight", codebook_weight, least=0)
        self.num_codes, self.dim = check_int("num_codes", num_codes, least=1), check_int("dim", dim, least=1)
        self.decay = check_real("decay", decay, least=0, below=1)
        self.commitment = check_real("commitment", commitment, least=0)
        self.eps = check_real("eps", eps, above=0)
        check_choice("compat", compat, (None, "authors"))
        self.compat = compat
        if not decay:
            self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))
            return
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        theirs = compat == "authors"
        self.register_buffer("counts", torch.zeros(num_codes) if theirs else torch.ones(num_codes))
        self.register_buffer("sums", torch.randn(num_codes, dim) if theirs else self.codebook.clone())

    def indices(self, x: Tensor) -> Tensor:
        """(B, *grid, dim) -> (B, *grid) numbers of the nearest codes; of equally near ones the first."""
        check_float("x", x)
        check_width("x", x, self.dim)
        high = stats_dtype(x.dtype)
        codes = self.codebook.detach().to(high)
        flat = x.detach().reshape(-1, self.dim).to(high)
        far = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
        return far.argmin(1).reshape(x.shape[:-1])

    def embed(self, indices: Tensor) -> Tensor:
        """Numbers (...) -> codes (..., dim)."""
        check_whole("indices", indices)
        return F.embedding(indices.long(), self.codebook)

    def soft(self, weights: Tensor) -> Tensor:
        """Weights (..., K) -> means of codes (..., dim)."""
        check_float("weights", weights)
        check_width("weights", weights, self.num_codes, "num_codes")
        return weights @ self.codebook.to(weights.dtype)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Quantized:
        """Quantize.

        Args:
            x: (B, *grid, dim).
            valid: (B, *grid) which tokens exist; the others become zeros, move no code and cost nothing.
        """
        check_valid("valid", valid, x.shape[:-1])
        x = zero_invalid(x, valid)
        index = self.indices(x)
        q = self.embed(index)
        high = stats_dtype(x.dtype)
        exists = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
        chosen = F.one_hot(index.flatten(), self.num_codes).to(high) * exists.reshape(-1, 1)
        if self.training and self.decay:
            self._follow(chosen, x.detach().reshape(-1, self.dim).to(high))
        total = exists.sum().clamp(min=1)

        def apart(a: Tensor, b: Tensor) -> Tensor:
            square = (a.to(high) - b.to(high)).square() * exists.unsqueeze(-1)
            return square.sum() / (total * self.dim)

        loss = self.commitment * apart(q.detach(), x)
        if not self.decay:
            loss = self.codebook_weight * apart(q, x.detach()) + loss
        share = chosen.sum(0) / total
        perplexity = torch.exp(-(share * torch.log(share + 1e-10)).sum())
        y = zero_invalid(x + (q.to(x.dtype) - x).detach(), valid)
        return Quantized(y, index if valid is None else index.masked_fill(~valid, -1), loss, perplexity)

    @torch.no_grad()
    def _follow(self, chosen: Tensor, x: Tensor) -> None:
        keep = self.decay
        counts = keep * self.counts + (1 - keep) * chosen.sum(0).to(self.counts)
        sums = keep * self.sums + (1 - keep) * (chosen.T @ x).to(self.sums)
        n = counts.sum()
        smooth = (counts + self.eps) / (n + self.num_codes * self.eps) * n
        self.counts.copy_(smooth if self.compat == "authors" else counts)
        self.sums.copy_(sums)
        self.codebook.copy_(sums / smooth.unsqueeze(1))

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, decay={self.decay}"
