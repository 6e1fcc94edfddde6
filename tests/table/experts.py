from attnlib.check import Case

_EXPERTS = tuple((n, {"num_experts": n}) for n in (4, 16, 64))
_MOA = dict(dim=16, num_heads=2, num_experts=3)

ROWS = [
    Case("bam-soft-moa-upcycling", _MOA, (12,), symbols={"experts": _EXPERTS}),
    Case(
        "bam-soft-moa-upcycling",
        dict(_MOA, num_kv_heads=1, shared_kv=True, causal=True, rotary=1e4),
        (12,),
        "shared-causal",
    ),
    Case("bam-soft-moa-upcycling", dict(_MOA, top_k=2, renormalize=True, causal=True), (12,), "top-causal"),
    Case("bam-soft-moa-upcycling", dict(_MOA, top_k=1, shared_kv=True), (3, 4), "top-image"),
]
