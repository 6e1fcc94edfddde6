"""Patients with genes, clinical numbers and the time of an event: real where scikit-survival is at hand, or made up.

The real ones are 198 women with node-negative breast cancer (Desmedt et al., 2007; GEO: GSE7390), the 76 genes of a
published signature, age, size, grade and receptor, and the days to a distant metastasis: a file of scikit-survival
(GPL), which is read and not imported. Slides of them are not at hand: :func:`patches` are made up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real
from ...extras import need

SOURCES = ("GSE7390", "generated")
_FILE = "datasets/data/breast_cancer_GSE7390-metastasis.arff"
_GRADES = {b"well differentiated": 1.0, b"intermediate": 2.0, b"poorly differentiated": 3.0}


class Patients(NamedTuple):
    """Genes (B, 76) and clinical numbers (B, 4), of mean 0 and spread 1; time (B,) and event (B,) of 0 and 1."""

    genes: Tensor
    clinical: Tensor
    time: Tensor
    event: Tensor


def _file() -> Path | None:
    found = importlib.util.find_spec("sksurv")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return next((Path(p) / _FILE for p in places if (Path(p) / _FILE).exists()), None)


def sources() -> list[str]:
    """Which of :data:`SOURCES` are at hand."""
    return [s for s in SOURCES if s == "generated" or _file() is not None]


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0).clamp(min=1e-6)


def load(source: str = "GSE7390") -> Patients:
    """The 198 patients, or as many made-up ones, whose risk lies in three genes and one clinical number.

    Args:
        source: of :data:`SOURCES`.

    Raises:
        ImportError: the real ones without scikit-survival.
    """
    check_choice("source", source, SOURCES)
    if source == "generated":
        generator = torch.Generator().manual_seed(7390)
        genes, clinical = (torch.randn(198, n, generator=generator) for n in (76, 4))
        risk = 0.5 * genes[:, :3].sum(1) + 0.5 * clinical[:, 0]
        time = torch.empty(198).exponential_(generator=generator) * (-risk).exp()
        end = 1.5 * torch.rand(198, generator=generator)
        return Patients(_standard(genes), _standard(clinical), torch.minimum(time, end), (time <= end).float())
    path = _file()
    if path is None:
        raise ImportError(
            "source='GSE7390' is a file of scikit-survival, which is not at hand: pip install scikit-survival; "
            "possible without it: 'generated'"
        )
    arff: Any = need("scipy.io.arff", "the patients")
    rows, kinds = arff.loadarff(path)
    names = [n for n in kinds.names() if n.startswith("X")]
    genes = torch.tensor([[float(row[n]) for n in names] for row in rows])
    clinical = torch.tensor(
        [
            [row["age"], row["size"], _GRADES.get(row["grade"], 2.0), float(row["er"] == b"positive")] for row in rows
        ]
    )  # fmt: skip
    time = torch.tensor([float(row["t.tdm"]) for row in rows])
    event = torch.tensor([float(row["e.tdm"] == b"1") for row in rows])
    return Patients(_standard(genes), _standard(clinical), time, event)


def excess(time: Tensor, event: Tensor) -> Tensor:
    """(B,) martingale residuals of no model at all: events of a patient less those that the time foretold.

    Nelson and Aalen's estimate of the cumulated hazard at a patient's time, taken from the event: high for who had the
    event early, low for who went long without.

    >>> excess(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])).tolist()
    [0.5, -0.5]
    """
    at_risk = (time[None] >= time[:, None]).sum(1)
    before = (time[None] <= time[:, None]).to(time.dtype)
    return event - before @ (event / at_risk)


def patches(known: Patients, count: int, shown: float, seed: int, channels: int = 8) -> Tensor:
    """(B, count, channels) made-up features of patches.

    In a quarter of a patient's patches the first channel is lifted, and the second then holds, in noise, how much
    earlier or later than foretold the event came (:func:`excess`), times ``shown``; the other patches hold as much
    there, but of nobody. With ``shown=0`` all is noise.

    Args:
        known: the patients.
        count: patches each.
        shown: how much of the outcome the patches show.
        seed: of everything.
        channels: of a patch, 2 at least.
    """
    check_int("count", count, least=4)
    check_int("channels", channels, least=2)
    check_real("shown", shown, least=0)
    generator = torch.Generator().manual_seed(seed)
    people = len(known.time)
    out = torch.randn(people, count, channels, generator=generator)
    telling = torch.rand(people, count, generator=generator).argsort(1) < count // 4
    own = _standard(excess(known.time, known.event))
    own = own + torch.randn(people, generator=generator)  # what a slide says of a patient is not all
    anyone = torch.randn(people, count, generator=generator) * own.std()
    out[..., 0] += 3 * telling
    out[..., 1] += shown * torch.where(telling, own[:, None], anyone)
    return out
