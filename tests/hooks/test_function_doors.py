"""Functions of techniques: numbers and shapes that mean nothing are refused by the argument's name."""

import pytest
import torch

from attnlib import cache, look, reduce, steer
from attnlib.steer import sink_calibration
from attnlib.steer.diffusion import uniform_maps

Z, NAN = torch.zeros, float("nan")
ONE = torch.ones
W, SINKS = ONE(1, 2, 3, 4), Z(1, 1, 4, dtype=torch.bool)
ROWS = ONE(1, 3, dtype=torch.bool)
LONG = Z(2, dtype=torch.long)

CALLS = {
    "contrast/cutoff": (lambda: steer.contrast(Z(1, 3), Z(1, 3), 1.0, -1.0, -0.1), "cutoff must be"),
    "contrast/batch": (lambda: steer.contrast(Z(1, 3), Z(2, 3), 1.0, -1.0), "other must have shape"),
    "contrast/a": (lambda: steer.contrast(Z(1, 3), Z(1, 3), NAN, -1.0), "a must be"),
    "sensitive/none": (lambda: steer.sensitive_heads(Z(2, 0)), "divergence must be"),
    "token/k": (lambda: steer.token_divergence({0: Z(1, 2)}, 3), "divergences"),
    "token/zero": (lambda: steer.token_divergence({0: Z(1, 2)}, 0), "k must be"),
    "sinks/compat": (lambda: sink_calibration.find_sinks(Z(2, 1, 3), 0.1, LONG, "theirs"), "compat"),
    "sinks/first": (lambda: sink_calibration.find_sinks(Z(2, 1, 3), 0.1, LONG + 3), "first points at key 3"),
    "calibrate/sinks": (lambda: steer.calibrate(W, SINKS[..., :3]), "sinks must have shape"),
    "calibrate/beta": (lambda: steer.calibrate(W, SINKS, NAN), "beta must be"),
    "boost/gain": (lambda: steer.boost(W, Z(3)), "gain must broadcast"),
    "boost/longer": (lambda: steer.boost(W[0, 0], W), "gain must broadcast"),
    "sets/ratio": (lambda: steer.boost_sets(Z(1, 8), Z(1, 8), 7.5), "ratio must be"),
    "tokens/dims": (lambda: steer.sink_tokens(Z(1, 2, 4), (4,)), "sink_dims"),
    "tokens/none": (lambda: steer.sink_tokens(Z(1, 2, 4), ()), "sink_dims must name"),
    "redistribute/p": (lambda: steer.redistribute(W, SINKS, SINKS, ROWS, p=1.5), "p must be"),
    "redistribute/compat": (lambda: steer.redistribute(W, SINKS, SINKS, ROWS, compat="x"), "compat"),
    "spread/size": (lambda: steer.spread_relevance(Z(1, 2, 2), (0, 4)), "size"),
    "spread/blur": (lambda: steer.spread_relevance(Z(1, 2, 2), (4, 4), NAN), "blur must be"),
    "spread/meta": (lambda: steer.spread_relevance(Z(1, 2, 2, device="meta"), (4, 4)), "relevance must hold values"),
    "pixels/std": (lambda: steer.mask_pixels(Z(1, 3, 2, 2), ONE(1, 2, 2).bool(), (0.0,), (0.0,)), "std must hold"),
    "pixels/mean": (lambda: steer.mask_pixels(Z(1, 3, 2, 2), ONE(1, 2, 2).bool(), (0.0,) * 2), "mean must hold"),
    "cam/grid": (lambda: steer.grad_cam(W, W, ROWS, (2, 0)), "grid"),
    "quantile/q": (lambda: uniform_maps.quantile(Z(3), 1.5), "q must be"),
    "quantile/none": (lambda: uniform_maps.quantile(Z(0), 0.5), "x must hold"),
    "scores/size": (lambda: reduce.spatial_scores(LONG, (-3, 4), 0.25), "size"),
    "scores/rate": (lambda: reduce.spatial_scores(LONG, (1, 2), 0.0), "rate must be"),
    "scores/place": (lambda: reduce.spatial_scores(LONG - 1, (1, 2), 0.5), "place must hold"),
    "rate/layer": (lambda: reduce.adaptive_rate(8, 8), "layer must be"),
    "rate/layers": (lambda: reduce.adaptive_rate(0, 0), "layers must be"),
    "atp/layers": (lambda: reduce.atp_losses([Z(2)], [1, 2], LONG), "layers must name 1"),
    "atp/kept": (lambda: reduce.atp_losses([], [], LONG), "kept must hold"),
    "atp/batch": (lambda: reduce.atp_losses([Z(3)], [1], LONG), "kept"),
    "atp/target": (lambda: reduce.atp_losses([Z(2)], [1], LONG, target=-1.0), "target must be"),
    "labels/id": (lambda: reduce.exit_labels(W[0], W[0], torch.full((2, 3), 4)), "labels points at token id 4"),
    "flops/lengths": (lambda: reduce.prefill_flops([reduce.BlockCost(1, 1)], [1, 2]), "lengths must be one"),
    "flops/batch": (lambda: reduce.prefill_flops([reduce.BlockCost(1, 1)], [1], -1), "batch must be"),
    "cost/nan": (lambda: reduce.BlockCost(NAN, 1), "per_token must be"),
    "kmeans/first": (lambda: reduce.cosine_kmeans(Z(3, 2), 2, first=3), "first must be"),
    "kmeans/iterations": (lambda: reduce.cosine_kmeans(Z(3, 2), 2, -1), "iterations must be"),
    "merge/empty": (lambda: reduce.merge_clusters(Z(2, 2), LONG, ONE(2), 2), "labels must name each"),
    "merge/beyond": (lambda: reduce.merge_clusters(Z(2, 2), LONG + 1, ONE(2), 1), "labels points at cluster 1"),
    "merge/negative": (lambda: reduce.merge_clusters(Z(2, 2), LONG, -ONE(2), 1), "weights must not be negative"),
    "ensemble/none": (lambda: reduce.ensemble([]), "layers must hold"),
    "ensemble/shapes": (lambda: reduce.ensemble([Z(1, 2), Z(1, 3)]), "layers must be of one shape"),
    "focus/types": (lambda: reduce.focus(Z(2, 2), Z(2, 3).half()), "share one floating dtype"),
    "ranks/none": (lambda: reduce.rank_consistency(Z(2, 0, 3)), "scores must be"),
    "greedy/tolerance": (lambda: reduce.greedy_search(sum, 1, 2, NAN), "tolerance must be"),
    "sigmoid/first": (lambda: reduce.sigmoid_search(sum, 2, 4, 0.5, first_layer=2), "first_layer must be"),
    "bayesian/noise": (lambda: reduce.bayesian_search(sum, [(0.0, 1.0)], 2, noise=-1.0), "noise must be"),
    "votes/heads": (lambda: cache.snapkv_votes(Z(1, 3, 4, 2), Z(1, 2, 4, 2), 1, 1), "heads of k"),
    "votes/width": (lambda: cache.snapkv_votes(Z(1, 2, 4, 2), Z(1, 2, 4, 3), 1, 1), "k must have shape"),
    "topk/counts": (lambda: cache.TopK()(Z(1, 1, 3), torch.tensor([[4]])), "counts points at key 4"),
    "sink_rate/sinks": (lambda: look.sink_rate(Z(1, 1, 3), Z(1, 1, 3), sinks=0), "sinks must be"),
    "map/call": (lambda: look.image_map({"weights": [], "keys": []}, LONG[None], (1, 1)), "call must be"),
    "map/entry": (lambda: look.image_map({"entropy": []}, LONG[None], (1, 1)), "entry holds no 'weights'"),
    "picture/opacity": (lambda: look.map_over_image(Z(2, 2), Z(3, 2, 2), opacity=2.0), "opacity must be"),
    "picture/empty": (lambda: look.map_over_image(Z(2, 2), Z(3, 2, 0)), "image must hold"),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_what_means_nothing_is_refused_by_name(call):
    make, words = CALLS[call]
    with pytest.raises((TypeError, ValueError), match=words):
        make()


def test_a_search_may_begin_without_scattered_points():
    best, value, history = reduce.bayesian_search(lambda p: -((p[0] - 0.5) ** 2), [(0.0, 1.0)], 1, explore=0)
    assert best == (0.5,) and value == 0.0 and len(history) == 1
