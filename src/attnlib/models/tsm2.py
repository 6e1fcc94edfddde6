"""TSM2: forecasts of several series by scans along time and along series (Behrouz et al., 2024, arXiv 2403.19888).

Every series is cut into overlapping patches, each of which becomes a token; a block has a Mamba layer along the patches
of a series, which is causal, and scans both ways along the series at every patch; both read learned averages of all
earlier answers. A norm over features and over patches and a linear map of all patches of a series give its future. Each
window is normalised by its own mean and deviation, which the forecast gets back.

The authors released no code. Sizes, softmax averages, residuals and the norm follow the replication of
n8thantran/mambamixer-replication, whose weights load with ``joint=False``, which has two whole Mamba layers along the
series; ``joint=True`` is the paper's equation, in which both ways share their maps and gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_flag, check_int, check_rank, check_real
from ..nn.released import Released, Rule
from ..nn.scan.mamba import BiMamba, Mamba
from ..nn.scan.mambamixer import Averages
from .protocol import answering


class BothNorms(nn.Module):
    """LayerNorm along features, then along patches, of (B, patches, dim)."""

    def __init__(self, patches: int, dim: int):
        super().__init__()
        self.features, self.patches = nn.LayerNorm(dim), nn.LayerNorm(patches)

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(self.features(x).transpose(1, 2)).transpose(1, 2)


class SeriesMixer(nn.Module):
    """Scans both ways along the series (B, M, dim), by two Mamba layers or by one that scans both ways."""

    def __init__(self, dim: int, joint: bool = True, **scan: int):
        super().__init__()
        self.both = BiMamba(dim, **scan) if joint else None  # type: ignore[arg-type]
        self.ahead = None if joint else Mamba(dim, **scan)  # type: ignore[arg-type]
        self.back = None if joint else Mamba(dim, **scan)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.both is not None:
            return self.both(x)
        assert self.ahead is not None and self.back is not None
        return self.ahead(x) + self.back(x.flip(1)).flip(1)


class TSM2(nn.Module):
    """Forecast of several series.

    Args:
        num_series: M.
        seq_len: values that are read, of each.
        pred_len: values that are forecast.
        patch_len, stride: of the patches.
        dim: width of a token.
        depth: blocks.
        d_state, d_conv, expand: of the scans.
        drop: dropout in training.
        joint: both ways along the series share maps and gate.
        averaging: ``"softmax"`` or ``"free"``; see :class:`attnlib.nn.scan.mambamixer.Averages`.
        residual: ``x + mixer(norm(x))`` in place of ``mixer(norm(x))``.
        static_dim: numbers that are known of every series; they become ``seq_len`` more values of it.
        future_len, future_dim: times ahead and numbers that are known of every series at each of them; a mixer along
            the series reads them, and they become ``seq_len`` more values.

    >>> TSM2(3, seq_len=24, pred_len=5, patch_len=8, stride=4, dim=8, depth=1)(torch.randn(2, 24, 3)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        num_series: int,
        seq_len: int = 512,
        pred_len: int = 96,
        patch_len: int = 16,
        stride: int = 8,
        dim: int = 128,
        depth: int = 4,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop: float = 0.1,
        joint: bool = True,
        averaging: str = "softmax",
        residual: bool = True,
        static_dim: int = 0,
        future_len: int = 0,
        future_dim: int = 0,
    ):
        super().__init__()
        given = dict(num_series=num_series, seq_len=seq_len, pred_len=pred_len, stride=stride, dim=dim, depth=depth)
        for name, value in given.items():
            check_int(name, value, least=1)
        check_int("patch_len", patch_len, least=1)
        for name, value in dict(static_dim=static_dim, future_len=future_len, future_dim=future_dim).items():
            check_int(name, value, least=0)
        if bool(future_len) != bool(future_dim):
            raise ValueError(f"future_len={future_len} and future_dim={future_dim} must both be 0, or neither")
        check_real("drop", drop, least=0, below=1)
        check_flag("joint", joint)
        self.residual = check_flag("residual", residual)
        self.num_series, self.seq_len, self.pred_len = num_series, seq_len, pred_len
        self.patch_len, self.stride = patch_len, stride
        self.static_dim, self.future = static_dim, (future_len, future_dim)
        length = seq_len * (1 + bool(static_dim) + bool(future_len))
        if length < patch_len:
            raise ValueError(f"seq_len={seq_len} holds no patch of patch_len={patch_len}")
        patches = (length - patch_len) // stride + 1
        scan = dict(d_state=d_state, d_conv=d_conv, expand=expand)
        self.static = nn.Linear(static_dim, seq_len) if static_dim else None
        self.future_mixer = SeriesMixer(future_len * future_dim, joint, **scan) if future_len else None
        self.future_map = nn.Linear(future_len * future_dim, seq_len) if future_len else None
        self.patch = nn.Linear(patch_len, dim)
        self.pos_embed = nn.Parameter(torch.randn(1, patches, dim) * 0.02)
        self.averages = nn.ModuleList([Averages(i + 1, averaging) for i in range(depth)])
        self.time_norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.series_norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(depth)])
        self.time_mixers = nn.ModuleList([Mamba(dim, **scan) for _ in range(depth)])  # type: ignore[arg-type]
        self.series_mixers = nn.ModuleList([SeriesMixer(dim, joint, **scan) for _ in range(depth)])
        self.drop = nn.Dropout(drop)
        self.norm = BothNorms(patches, dim)
        self.head = nn.Linear(dim * patches, pred_len)

    def _with_known(self, x: Tensor, static: Tensor | None, future: Tensor | None) -> Tensor:
        """(B, M, seq_len), and what is known besides, one behind the other."""
        parts = [x]
        if (future is None) != (self.future_map is None) or (static is None) != (self.static is None):
            raise ValueError(
                f"static and future must be given as the model was built: static_dim={self.static_dim}, "
                f"(future_len, future_dim)={self.future}"
            )
        if future is not None and self.future_mixer is not None and self.future_map is not None:
            wanted = (x.shape[0], self.num_series, *self.future)
            if tuple(future.shape) != wanted:
                raise ValueError(f"future must be (B, M, future_len, future_dim)={wanted}, got {tuple(future.shape)}")
            parts.append(self.future_map(self.future_mixer(future.flatten(2))))
        if static is not None and self.static is not None:
            if tuple(static.shape) != (*x.shape[:2], self.static_dim):
                raise ValueError(
                    f"static must be (B, M, static_dim)={(*x.shape[:2], self.static_dim)}, got {tuple(static.shape)}"
                )
            parts.append(self.static(static))
        return torch.cat(parts, -1) if len(parts) > 1 else x

    def forward(self, x: Tensor, static: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        """(B, seq_len, M) -> (B, pred_len, M)."""
        check_rank("x", x, 3, "(B, seq_len, M)")
        if x.shape[1:] != (self.seq_len, self.num_series):
            raise ValueError(f"x must be (B, seq_len, M)=(B, {self.seq_len}, {self.num_series}), got {tuple(x.shape)}")
        means, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 1e-5
        values = self._with_known(((x - means) / spread).transpose(1, 2), static, future)
        cut = values.unfold(2, self.patch_len, self.stride)  # (B, M, patches, patch_len)
        batch, series, patches = cut.shape[:3]
        y = self.drop(self.patch(cut.flatten(0, 1)) + self.pos_embed)
        tokens, channels = [y], [y]
        for i, averages in enumerate(self.averages):
            y = averages.tokens(tokens, channels)  # type: ignore[operator]
            made = self.drop(self.time_mixers[i](self.time_norms[i](y)))
            tokens.append(made + y if self.residual else made)
            y = averages.channels(tokens, channels)  # type: ignore[operator]
            across = y.unflatten(0, (batch, series)).transpose(1, 2).flatten(0, 1)
            made = self.drop(self.series_mixers[i](self.series_norms[i](across)))
            made = made.unflatten(0, (batch, patches)).transpose(1, 2).flatten(0, 1)
            channels.append(made + y if self.residual else made)
        out = self.head(self.drop(self.norm(channels[-1]).flatten(1)))
        return out.unflatten(0, (batch, series)).transpose(1, 2) * spread + means

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The mean squared error."""
        if prediction.shape != target.shape:
            raise ValueError(f"target must be as the prediction, {tuple(prediction.shape)}, got {tuple(target.shape)}")
        return {"mse": F.mse_loss(prediction, target)}

    @answering
    def predict(self, x: Tensor, static: Tensor | None = None, future: Tensor | None = None) -> Tensor:
        """The forecast in evaluation mode."""
        return self(x, static, future)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From ``TSM2`` of n8thantran/mambamixer-replication, for ``joint=False``."""
        theirs = Released(state_dict, "TSM2 of the replication")
        out: dict[str, Tensor] = {}
        for name, ours in (
            ("token_mixers", r"time_mixers.\1"),
            ("channel_mixers_fwd", r"series_mixers.\1.ahead"),
            ("channel_mixers_bwd", r"series_mixers.\1.back"),
        ):
            out |= theirs.parts(rf"{name}\.(\d+)\.(.+)", ours, Mamba.convert_state_dict)
        rules: dict[str, Rule] = {
            r"patch_embedding\.(weight|bias)": r"patch.\1",
            r"pos_embed": "pos_embed",
            r"token_norms\.(\d+)\.(weight|bias)": r"time_norms.\1.\2",
            r"channel_norms\.(\d+)\.(weight|bias)": r"series_norms.\1.\2",
            r"(alpha|beta|theta|gamma)\.(\d+)": r"averages.\2.\1",
            r"norm_2d\.norm1\.(weight|bias)": r"norm.features.\1",
            r"norm_2d\.norm2\.(weight|bias)": r"norm.patches.\1",
            r"head\.(weight|bias)": r"head.\1",
        }
        return theirs.close(out | theirs.renamed(rules))
