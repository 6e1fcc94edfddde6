"""Cascades of softmax and its relatives, and of every operator of the library (:data:`OPERATORS`).

Reference: Nayak et al., 2024, arXiv 2406.10491 (FuseMax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..normalizers import Activated, Normalizer, as_normalizer
from ..types import check_choice
from .cascade import Cascade

_SCORES = """
QK[~p,{k}] += Q[~p,e] * K[~{k},e]
S[~p,{k}] = QK[~p,{k}] * SCALE{bias}
"""


def _online(scores: str, value: str, outer: str, inner: str = "", q: str = "p", tag: str = "", out: str = "AV") -> str:
    """Running maximum, sum and weighted values over a rank, in blocks when ``inner`` is given.

    ``scores`` and ``value`` are written with their ranks; without ``value`` only maximum and sum are kept.
    """
    g, t = outer, tag
    lines = [f"RM{t}[~{q},0] = -inf", f"RD{t}[~{q},0] = 0"]
    local = scores
    if inner:
        lines.append(f"LM{t}[~{q},{g}] max= {scores}")
        local = f"LM{t}[~{q},{g}]"
    lines += [
        f"RM{t}[~{q},{g}+1] = max(RM{t}[~{q},{g}], {local})",
        f"PRM{t}[~{q},{g}] = expsub(RM{t}[~{q},{g}], RM{t}[~{q},{g}+1])",
        f"SLN{t}[~{q},{g}{',' + inner if inner else ''}] = expsub({scores}, RM{t}[~{q},{g}+1])",
    ]
    weight = f"SLN{t}[~{q},{g}{',' + inner if inner else ''}]"
    summed = weight
    if inner:
        lines.append(f"SLD{t}[~{q},{g}] += {weight}")
        summed = f"SLD{t}[~{q},{g}]"
    lines += [
        f"SPD{t}[~{q},{g}] = RD{t}[~{q},{g}] * PRM{t}[~{q},{g}]",
        f"RD{t}[~{q},{g}+1] = {summed} + SPD{t}[~{q},{g}]",
    ]
    if value:
        lines.insert(0, f"RNV{t}[~{q},f,0] = 0")
        lines += [
            f"SLNV{t}[~{q},f,{g}] {'+=' if inner else '='} {weight} * {value}",
            f"SPNV{t}[~{q},f,{g}] = RNV{t}[~{q},f,{g}] * PRM{t}[~{q},{g}]",
            f"RNV{t}[~{q},f,{g}+1] = SLNV{t}[~{q},f,{g}] + SPNV{t}[~{q},f,{g}]",
            f"{out}[~{q},f] = RNV{t}[~{q},f,-1] / RD{t}[~{q},-1]",
        ]
    return "\n".join(lines)


_QKV = {"Q": "b h p e", "K": "b h m e", "V": "b h m f"}

_BLOCKED = {"Q": "b h p e", "K": "b h m1 m0 e", "V": "b h m1 m0 f"}


def softmax_cascade(passes: int = 1, deferred: bool = False) -> Cascade:
    """Softmax attention as the paper writes it, in so many passes over the keys.

    Args:
        passes: 3, the maximum, the sum and the weights one after the other; 2, local maxima of blocks, corrected by the
            global one; 1, a running maximum (FlashAttention, FuseMax).
        deferred: divide after the values are mixed, which saves a pass of the first two and most divisions. The
            one-pass cascade always does.

    >>> [softmax_cascade(n).passes() for n in (3, 2, 1)]
    [3, 2, 1]
    >>> softmax_cascade(1).footprint_text(), softmax_cascade(3).footprint_text()
    ('E + F + 2', 'M + F + 1')
    """
    check_choice("passes", passes, (1, 2, 3))
    if passes == 3:
        text = """
        QK[~p,m] += Q[~p,e] * K[~m,e]
        GM[~p] max= QK[~p,m]
        SN[~p,m] = expsub(QK[~p,m], GM[~p])
        SD[~p] += SN[~p,m]
        """
        if deferred:
            text += "SNV[~p,f] += SN[~p,m] * V[~m,f]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
        else:
            text += "A[~p,m] = SN[~p,m] / SD[~p]\nAV[~p,f] += A[~p,m] * V[~m,f]"
        return Cascade(_dedent(text), _QKV, ["AV"], ("m",), name="three-pass softmax")
    if passes == 2:
        text = """
        QK[~p,m1,m0] += Q[~p,e] * K[~m1,m0,e]
        LM[~p,m1] max= QK[~p,m1,m0]
        SLN[~p,m1,m0] = expsub(QK[~p,m1,m0], LM[~p,m1])
        SLD[~p,m1] += SLN[~p,m1,m0]
        """
        if deferred:
            text += "SLNV[~p,f,m1] += SLN[~p,m1,m0] * V[~m1,m0,f]\n"
        text += """
        GM[~p] max= LM[~p,m1]
        PLM[~p,m1] = expsub(LM[~p,m1], GM[~p])
        SD[~p] += SLD[~p,m1] * PLM[~p,m1]
        """
        if deferred:
            text += "SNV[~p,f] += SLNV[~p,f,m1] * PLM[~p,m1]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
        else:
            text += "A[~p,m1,m0] = SLN[~p,m1,m0] * PLM[~p,m1] / SD[~p]\nAV[~p,f] += A[~p,m1,m0] * V[~m1,m0,f]"
        return Cascade(_dedent(text), _BLOCKED, ["AV"], ("m1", "m0"), name="two-pass softmax")
    text = "QK[~p,m1,m0] += Q[~p,e] * K[~m1,m0,e]\n" + _online("QK[~p,m1,m0]", "V[~m1,m0,f]", "m1", "m0")
    return Cascade(text, _BLOCKED, ["AV"], ("m1", "m0"), name="one-pass softmax")


def unstable_cascade(deferred: bool = False) -> Cascade:
    """Softmax without the maximum, which overflows: two passes, or one when the division is deferred.

    >>> unstable_cascade().passes(), unstable_cascade(deferred=True).passes()
    (2, 1)
    """
    text = "QK[~p,m] += Q[~p,e] * K[~m,e]\nSN[~p,m] = exp(QK[~p,m])\nSD[~p] += SN[~p,m]\n"
    if deferred:
        text += "SNV[~p,f] += SN[~p,m] * V[~m,f]\nAV[~p,f] = SNV[~p,f] / SD[~p]"
    else:
        text += "A[~p,m] = SN[~p,m] / SD[~p]\nAV[~p,f] += A[~p,m] * V[~m,f]"
    return Cascade(text, _QKV, ["AV"], ("m",), name="unstable softmax")


def _dedent(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def attention_cascade(normalizer: str | Normalizer = "softmax", bias: bool = True) -> Cascade:
    """:func:`attnlib.attention` with a normalizer, as the streaming engines run it.

    Args:
        normalizer: one of :mod:`attnlib.normalizers`.
        bias: scores have a bias ``W`` (b h p m), ``-inf`` where a pair may not meet.

    Passes are those of the algorithm as written: a mixture with uniform rows, for one, takes two where weights are made
    and then mixed, and would take one if the two results were mixed instead.

    Returns:
        A cascade with inputs ``Q, K, V, SCALE`` (and ``W``) and the output ``AV``.

    Raises:
        ValueError: a normalizer that is not described.

    >>> [attention_cascade(n).passes() for n in ("softmax", "sigmoid", "clipped_softmax")]
    [1, 1, 2]
    """
    norm = as_normalizer(normalizer)
    inputs = {**_BLOCKED, "SCALE": "", **({"W": "b h p m1 m0"} if bias else {})}
    k = "m1,m0"
    text = _dedent(_SCORES.format(k=k, bias=f" + W[~p,{k}]" if bias else ""))
    s, a, v = f"S[~p,{k}]", f"A[~p,{k}]", f"V[~{k},f]"
    mixed = f"AV[~p,f] += {a} * {v}"
    # Maximum and sum of a first walk, the weights of a second.
    statistics = _online(s, "", "m1", "m0") + "\nGM[~p] = RM[~p,-1]\nGD[~p] = RD[~p,-1]\n"
    soft = f"expsub({s}, GM[~p]) / GD[~p]"
    values = vars(norm)
    if norm.name == "softmax" or (isinstance(norm, Activated) and norm.phi == "exp" and norm.l1 and not norm.power):
        text += _online(s, v, "m1", "m0")
    elif norm.name == "sigmoid":
        text += f"{a} = sigmoid({s} + {values['bias']!r})\n{mixed}"
    elif norm.name == "relu":
        text += f"{a} = relu({s}) / {values['divisor']!r}\n{mixed}"
    elif norm.name == "step":
        text += f"{a} = 1 - less({s}, 0)\n{mixed}"
    elif norm.name == "thresholded":
        text += statistics + f"{a} = less({values['share']!r}, expsub({s}, GM[~p])) * finite({s})\n{mixed}"
    elif norm.name == "clipped_softmax":
        gamma, zeta = values["gamma"], values["zeta"]
        # a pair that may not meet stays 0, whatever the stretch would make of it
        text += statistics + f"{a} = clip({soft} * {zeta - gamma!r} + {gamma!r}) * finite({s})\n{mixed}"
    elif norm.name == "uniform":
        u = values["u"]
        text += f"CNT[~p] += finite({s})\n" + statistics
        text += f"{a} = {soft} * {1 - u!r} + {u!r} * finite({s}) / CNT[~p]\n{mixed}"
    elif norm.name == "softplus_l1" or isinstance(norm, Activated):
        text += _activated(norm if isinstance(norm, Activated) else Activated("softplus"), s, k, v, statistics, soft)
    else:
        raise ValueError(f"normalizer {norm.name!r} is not described as a cascade")
    return Cascade(text, inputs, ["AV"], ("m1", "m0"), name=f"attention, {norm.name}")


def _activated(norm: Activated, s: str, k: str, v: str, statistics: str, soft: str) -> str:
    phi = f"{norm.phi}({s})"
    if norm.power is None:
        if not norm.l1:
            return f"A[~p,{k}] = {phi}\nAV[~p,f] += A[~p,{k}] * {v}"
        return f"SN[~p,{k}] = {phi}\nSD[~p] += SN[~p,{k}]\nSNV[~p,f] += SN[~p,{k}] * {v}\nAV[~p,f] = SNV[~p,f] / SD[~p]"
    first = statistics if norm.phi == "exp" else f"SN[~p,{k}] = {phi}\nGD[~p] += SN[~p,{k}]\n"
    base = soft if norm.phi == "exp" else f"SN[~p,{k}] / GD[~p]"
    # The largest excess is a running value: weights of the power rescale like those of an exponential.
    return f"""CNT[~p] += finite({s})
{first}OFF[~p] = {norm.offset!r} - {norm.offset!r} * less(CNT[~p], {norm.spare!r})
A[~p,{k}] = {base}
EX[~p,{k}] = relu(A[~p,{k}] * CNT[~p] - OFF[~p])
RT[~p,0] = 0
RB[~p,0] = 0
RX[~p,f,0] = 0
RV[~p,f,0] = 0
LT[~p,m1] max= EX[~p,{k}]
RT[~p,m1+1] = max(RT[~p,m1], LT[~p,m1])
PRT[~p,m1] = pow(RT[~p,m1] / RT[~p,m1+1], {norm.power!r})
SH[~p,{k}] = pow(EX[~p,{k}] / RT[~p,m1+1], {norm.power!r})
LB[~p,m1] += SH[~p,{k}]
LX[~p,f,m1] += SH[~p,{k}] * {v}
LV[~p,f,m1] += A[~p,{k}] * {v}
RB[~p,m1+1] = RB[~p,m1] * PRT[~p,m1] + LB[~p,m1]
RX[~p,f,m1+1] = RX[~p,f,m1] * PRT[~p,m1] + LX[~p,f,m1]
RV[~p,f,m1+1] = RV[~p,f,m1] + LV[~p,f,m1]
ANY[~p] = positive(RB[~p,-1])
AV[~p,f] = RX[~p,f,-1] / RB[~p,-1] * ANY[~p] + RV[~p,f,-1] * (1 - ANY[~p])"""


@dataclass(frozen=True)
class Described:
    """An operator of :mod:`attnlib.ops` as a cascade.

    Args:
        functions: names of the functions it describes.
        cascade: makes the cascade.
        along: what the passes are counted over, in words.
    """

    functions: tuple[str, ...]
    cascade: Callable[[], Cascade]
    along: str


def _partial() -> Cascade:
    text = _dedent(_SCORES.format(k="m1,m0", bias=" + W[~p,m1,m0]")) + _online("S[~p,m1,m0]", "V[~m1,m0,f]", "m1", "m0")
    text += "\nTOP[~p] = RM[~p,-1]\nDEN[~p] = RD[~p,-1]\nNUM[~p,f] = RNV[~p,f,-1]"
    inputs = {**_BLOCKED, "SCALE": "", "W": "b h p m1 m0"}
    return Cascade(text, inputs, ["TOP", "DEN", "NUM"], ("m1", "m0"), name="partial attention")


def _merge() -> Cascade:
    text = """
    RM[~p,0] = -inf
    RD[~p,0] = 0
    RNV[~p,f,0] = 0
    RM[~p,s+1] = max(RM[~p,s], TOP[~p,s])
    PRM[~p,s] = expsub(RM[~p,s], RM[~p,s+1])
    PTM[~p,s] = expsub(TOP[~p,s], RM[~p,s+1])
    RD[~p,s+1] = RD[~p,s] * PRM[~p,s] + DEN[~p,s] * PTM[~p,s]
    RNV[~p,f,s+1] = RNV[~p,f,s] * PRM[~p,s] + NUM[~p,f,s] * PTM[~p,s]
    AV[~p,f] = RNV[~p,f,-1] / RD[~p,-1]
    """
    inputs = {"TOP": "b h p s", "DEN": "b h p s", "NUM": "b h p f s"}
    return Cascade(_dedent(text), inputs, ["AV"], ("s",), name="merge of parts")


def _split() -> Cascade:
    text = """
    QK[~p,s,m] += Q[~p,e] * K[~s,m,e]
    S[~p,s,m] = QK[~p,s,m] * SCALE
    LM[~p,s] max= S[~p,s,m]
    SLN[~p,s,m] = expsub(S[~p,s,m], LM[~p,s])
    SLD[~p,s] += SLN[~p,s,m]
    SLNV[~p,f,s] += SLN[~p,s,m] * V[~s,m,f]
    GM[~p] max= LM[~p,s]
    PLM[~p,s] = expsub(LM[~p,s], GM[~p])
    SD[~p] += SLD[~p,s] * PLM[~p,s]
    SNV[~p,f] += SLNV[~p,f,s] * PLM[~p,s]
    AV[~p,f] = SNV[~p,f] / SD[~p]
    """
    inputs = {"Q": "b h p e", "K": "b h s m e", "V": "b h s m f", "SCALE": ""}
    return Cascade(_dedent(text), inputs, ["AV"], ("s", "m"), name="split decoding", letters={("s", "m"): "M"})


def _block_sparse() -> Cascade:
    text = """
    QK[~t,i,c,k] += Q[~t,i,e] * K[~IDX[~t,c],k,e]
    S[~t,i,c,k] = QK[~t,i,c,k] * SCALE + W[~t,i,c,k]
    """
    text = _dedent(text) + _online("S[~t,i,c,k]", "V[~IDX[~t,c],k,f]", "c", "k", q="t,i")
    inputs = {"Q": "b h t i e", "K": "b h n k e", "V": "b h n k f", "IDX": "b h t c", "W": "b h t i c k", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("c", "k"), per=("b", "h", "t", "i"), name="block-sparse attention",
                   letters={("c", "k"): "M", ("t", "i"): "P", ("k", "n"): "N"})  # fmt: skip


def _neighborhood() -> Cascade:
    text = """
    QK[~p,w] += Q[~p,e] * K[~START[p]+w*STEP[p],e]
    S[~p,w] = QK[~p,w] * SCALE + W[p,w]
    """
    text = _dedent(text) + _online("S[~p,w]", "V[~START[p]+w*STEP[p],f]", "w")
    inputs = {"Q": "b h p e", "K": "b h n e", "V": "b h n f", "START": "p", "STEP": "p", "W": "p w", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("w",), name="neighborhood attention")


def _partition() -> Cascade:
    text = """
    QK[~g,i,j] += Q[~QI[g,i],e] * K[~KI[g,j],e]
    S[~g,i,j] = QK[~g,i,j] * SCALE
    """
    text = _dedent(text) + _online("S[~g,i,j]", "V[~KI[g,j],f]", "j", q="g,i", out="OG")
    text += "\nAV[~p,f] = OG[~GROUP[p],SLOT[p],f]"
    inputs = {"Q": "b h p e", "K": "b h n e", "V": "b h n f", "QI": "g i", "KI": "g j", "GROUP": "p", "SLOT": "p",
              "SCALE": ""}  # fmt: skip
    return Cascade(text, inputs, ["AV"], ("j",), per=("b", "h", "g", "i"), name="partition attention",
                   letters={("j",): "M", ("g", "i"): "P", ("g", "j"): "N"})  # fmt: skip


def _reduced() -> Cascade:
    text = """
    KR[~r,e] += K[~r,j,e] * SHARE[j]
    VR[~r,f] += V[~r,j,f] * SHARE[j]
    QK[~p,r] += Q[~p,e] * KR[~r,e]
    S[~p,r] = QK[~p,r] * SCALE
    """
    text = _dedent(text) + _online("S[~p,r]", "VR[~r,f]", "r")
    inputs = {"Q": "b h p e", "K": "b h r j e", "V": "b h r j f", "SHARE": "j", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("r", "j"), name="reduced attention", letters={("r", "j"): "M"})


def _agent() -> Cascade:
    text = """
    AK[~a,m1,m0] += A[~a,e] * K[~m1,m0,e]
    SA[~a,m1,m0] = AK[~a,m1,m0] * SCALE
    """
    text = _dedent(text) + _online("SA[~a,m1,m0]", "V[~m1,m0,f]", "m1", "m0", q="a", tag="A", out="SUM")
    text += "\nQA[~p,a] += Q[~p,e] * A[~a,e]\nSQ[~p,a] = QA[~p,a] * SCALE\n" + _online("SQ[~p,a]", "SUM[~a,f]", "a")
    inputs = {"Q": "b h p e", "A": "b h a e", "K": "b h m1 m0 e", "V": "b h m1 m0 f", "SCALE": ""}
    return Cascade(text, inputs, ["AV"], ("m1", "m0"), per=("b", "h"), name="agent attention")


def _reversed() -> Cascade:
    text = """
    KQ[~m,p] += Q[~m,e] * K[~p,e]
    GM[~m] max= KQ[~m,p]
    SN[~m,p] = expsub(KQ[~m,p] * SCALE, GM[~m] * SCALE)
    SD[~m] += SN[~m,p]
    A[~m,p] = SN[~m,p] * MSG[~m] / SD[~m]
    AV[~p,f] += A[~m,p] * V[~m,f]
    """
    inputs = {"Q": "b h m e", "K": "b h p e", "V": "b h m f", "MSG": "b h m", "SCALE": ""}
    return Cascade(_dedent(text), inputs, ["AV"], ("p",), per=("b", "h"), name="reversed attention")


def _recurrent() -> Cascade:
    text = """
    ST[~d,f,0] = 0
    Z[~d,0] = 0
    ST[~d,f,t+1] = ST[~d,f,t] * G[~t] + K[~t,d] * V[~t,f]
    Z[~d,t+1] = Z[~d,t] * G[~t] + K[~t,d]
    NUM[~t,f] += Q[~t,d] * ST[~d,f,t+1]
    DEN[~t] += Q[~t,d] * Z[~d,t+1]
    AV[~t,f] = NUM[~t,f] / DEN[~t]
    """
    inputs = {"Q": "b h t d", "K": "b h t d", "V": "b h t f", "G": "b h t"}
    return Cascade(
        _dedent(text), inputs, ["AV"], ("t",), per=("b", "h"), name="linear attention, recurrent"
    )  # fmt: skip


def _chunkwise() -> Cascade:
    text = """
    ST[~d,f,0] = 0
    QK[~c,i,j] += Q[~c,i,d] * K[~c,j,d]
    A[~c,i,j] = QK[~c,i,j] * INSIDE[h,i,j]
    NEAR[~c,i,f] += A[~c,i,j] * V[~c,j,f]
    FAR[~c,i,f] += Q[~c,i,d] * REACH[h,i] * ST[~d,f,c]
    AV[~c,i,f] = NEAR[~c,i,f] + FAR[~c,i,f]
    NEW[~d,f,c] += K[~c,i,d] * STAY[h,i] * V[~c,i,f]
    ST[~d,f,c+1] = ST[~d,f,c] * KEEP[h] + NEW[~d,f,c]
    """
    inputs = {"Q": "b h c i d", "K": "b h c i d", "V": "b h c i f", "INSIDE": "h i j", "REACH": "h i", "STAY": "h i",
              "KEEP": "h"}  # fmt: skip
    return Cascade(_dedent(text), inputs, ["AV"], ("c", "i"), per=("b", "h"), name="linear attention, chunkwise",
                   letters={("c", "i"): "T"})  # fmt: skip


def _parallel() -> Cascade:
    text = """
    QK[~p,m] += Q[~p,d] * K[~m,d]
    A[~p,m] = QK[~p,m] * DECAY[h,p,m]
    NUM[~p,f] += A[~p,m] * V[~m,f]
    DEN[~p] += A[~p,m]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f", "DECAY": "h p m"}
    return Cascade(_dedent(text), inputs, ["AV"], ("m",), name="linear attention, parallel")


def _sums() -> Cascade:
    text = """
    ST[~d,f] += K[~m,d] * V[~m,f]
    Z[~d] += K[~m,d]
    NUM[~p,f] += Q[~p,d] * ST[~d,f]
    DEN[~p] += Q[~p,d] * Z[~d]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f"}
    return Cascade(
        _dedent(text), inputs, ["AV"], ("m",), per=("b", "h"), name="linear attention, bidirectional"
    )  # fmt: skip


def _scan() -> Cascade:
    text = """
    ST[~s,0] = 0
    LOG[~t,s] = STEP[~t] * A[h,s]
    DA[~t,s] = exp(LOG[~t,s])
    ST[~s,t+1] = ST[~s,t] * DA[~t,s] + X[~t] * IN[b,t,s]
    Y[~t] += OUT[b,t,s] * ST[~s,t+1]
    """
    inputs = {"STEP": "b h t", "A": "h s", "X": "b h t", "IN": "b t s", "OUT": "b t s"}
    return Cascade(_dedent(text), inputs, ["Y"], ("t",), per=("b", "h"), name="selective scan, recurrent")


def _toeplitz() -> Cascade:
    text = """
    QK[~p,m] += Q[~p,d] * K[~m,d]
    A[~p,m] = QK[~p,m] * C[h,m-p+LAST[p]]
    NUM[~p,f] += A[~p,m] * V[~m,f]
    DEN[~p] += A[~p,m]
    AV[~p,f] = NUM[~p,f] / DEN[~p]
    """
    inputs = {"Q": "b h p d", "K": "b h m d", "V": "b h m f", "C": "h o", "LAST": "p"}
    return Cascade(_dedent(text), inputs, ["AV"], ("m",), name="linear attention with a Toeplitz factor, direct")


def _sampled() -> Cascade:
    inputs = {"V": "b h n f", "IDX": "b h p s", "W": "b h p s"}
    return Cascade("AV[~p,f] += W[~p,s] * V[~IDX[~p,s],f]", inputs, ["AV"], ("s",), name="deformable attention")


def _sampled_3d() -> Cascade:
    text = """
    D[~p,s] += R[~p,s,z] * DEPTH[~IDX[~p,s],z]
    WD[~p,s] = W[~p,s] * D[~p,s]
    AV[~p,f] += WD[~p,s] * V[~IDX[~p,s],f]
    """
    inputs = {"V": "b h n f", "DEPTH": "b h n z", "IDX": "b h p s", "W": "b h p s", "R": "b h p s z"}
    return Cascade(_dedent(text), inputs, ["AV"], ("s",), name="deformable attention in depth")


def _modulation() -> Cascade:
    text = """
    Z1[b,t,c] += X[b,t+k-1,c] * W1[c,k]
    Z2[b,t,c] += Z1[b,t+k-1,c] * W2[c,k]
    POOL[b,c] += Z2[b,t,c] * SHARE[t]
    CTX[b,t,c] = Z1[b,t,c] * G1[b,t] + Z2[b,t,c] * G2[b,t] + POOL[b,c] * G3[b,t]
    Y[b,t,c] = Q[b,t,c] * CTX[b,t,c]
    """
    inputs = {"X": "b t c", "Q": "b t c", "W1": "c k", "W2": "c k", "SHARE": "t", "G1": "b t", "G2": "b t",
              "G3": "b t"}  # fmt: skip
    return Cascade(_dedent(text), inputs, ["Y"], ("t",), per=("b",), name="modulation with a global pool")


def _channels() -> Cascade:
    text = """
    KQ[~c,d] += Q[~n,c] * K[~n,d]
    GM[~c] max= KQ[~c,d]
    SN[~c,d] = expsub(KQ[~c,d] * SCALE, GM[~c] * SCALE)
    SD[~c] += SN[~c,d]
    A[~c,d] = SN[~c,d] / SD[~c]
    Y[~n,c] += A[~c,d] * V[~n,d]
    """
    inputs = {"Q": "b h n c", "K": "b h n d", "V": "b h n d", "SCALE": ""}
    return Cascade(_dedent(text), inputs, ["Y"], ("n",), per=("b", "h"), name="channel attention")


def _nystrom() -> Cascade:
    text = """
    QQ[~p] += Q[~p,e] * Q[~p,e]
    LL[~a] += L[~a,e] * L[~a,e]
    QL[~p,a] += Q[~p,e] * L[~a,e]
    READ[~p,a] = expsub(QL[~p,a], (QQ[~p] + LL[~a]) / 2)
    SUM[~a,f] += READ[~p,a] * V[~p,f]
    PART[~a,f] += INV[~a,c] * SUM[~c,f]
    AV[~p,f] += READ[~p,a] * PART[~a,f]
    """
    inputs = {"Q": "b h p e", "L": "b h a e", "INV": "b h a c", "V": "b h p f"}
    return Cascade(_dedent(text), inputs, ["AV"], ("p",), per=("b", "h"), name="Gaussian attention through landmarks")


#: Every operator of floor 1.
OPERATORS: dict[str, Described] = {
    "attention": Described(
        ("attention", "window_attention", "halo_attention"), lambda: attention_cascade("softmax", bias=False), "keys"
    ),
    "attention_partial": Described(("attention_partial",), _partial, "keys"),
    "merge": Described(("attention_partial",), _merge, "parts of the keys"),
    "split": Described(("split_decoding", "split_partial"), _split, "keys"),
    "block_sparse": Described(
        ("block_sparse_attention", "block_sparse_partial"), _block_sparse, "chosen blocks of keys"
    ),
    "neighborhood": Described(
        ("neighborhood_attention", "neighborhood_partial"), _neighborhood, "keys of the window"
    ),
    "partition": Described(("partition_attention", "grouped_attention"), _partition, "keys of the group"),
    "reduced": Described(("reduced_attention",), _reduced, "keys"),
    "agent": Described(("agent_attention",), _agent, "keys"),
    "reversed": Described(("reversed_attention",), _reversed, "receivers"),
    "nystrom": Described(("nystrom_attention",), _nystrom, "tokens"),
    "linear_recurrent": Described(("linear_attention", "linear_partial"), _recurrent, "tokens"),
    "linear_chunkwise": Described(("linear_attention", "linear_partial"), _chunkwise, "tokens"),
    "linear_parallel": Described(("linear_attention", "linear_partial"), _parallel, "keys"),
    "linear_bidirectional": Described(("linear_attention", "linear_partial"), _sums, "keys"),
    "selective_scan": Described(("selective_scan",), _scan, "tokens"),
    "toeplitz": Described(("toeplitz_attention",), _toeplitz, "keys"),
    "deformable": Described(("deformable_attention",), _sampled, "samples"),
    "deformable_3d": Described(("deformable_attention_3d",), _sampled_3d, "samples"),
    "modulation": Described(
        ("depthwise", "mixed_depthwise", "pyramid", "pool", "gated_sum", "modulate"), _modulation, "tokens"
    ),
    "channel_attention": Described(("channel_attention", "context_attention"), _channels, "tokens"),
    # by cosines, of patches that are cut before and laid over one another behind; distances take a pass for their mean
    "patch_attention": Described(
        ("patch_attention",), lambda: attention_cascade("softmax", bias=False), "patches of the context"
    ),
}  # fmt: skip
