"""A sequence over 2 and 4 processes is what it is on one: outputs, gradients, and few bytes in between."""

import subprocess
import sys
from pathlib import Path

import gloo_runs as runs
import pytest
import torch

from attnlib import parallel

TESTS = Path(__file__).parent.parent
CASES = runs.cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process of both worlds found: world -> [by rank]."""
    folder = tmp_path_factory.mktemp("gloo")
    path = ":".join(str(p) for p in (Path(parallel.__file__).parents[2], TESTS, TESTS.parent))
    env = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, runs.__file__, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return {w: [torch.load(folder / f"{w}.{r}.pt", weights_only=False) for r in range(w)] for w in runs.WORLDS}


@pytest.mark.parametrize("world", runs.WORLDS)
@pytest.mark.parametrize("case", CASES, ids=[f"{f.__name__}-{name}" for f, name in CASES])
def test_several_processes_are_one(found, case, world):
    function, name = case
    whole = runs.held(function(name, True))
    parts = [of_rank[function.__name__, name] for of_rank in found[world]]
    axis = 1 if function in (runs.layer, runs.decoder) else 2
    assert parts[0].keys() == whole.keys()
    for key, value in whole.items():
        # Weights, decays of heads and states are the same in every process; the rest is laid end to end.
        shared = " w " in f" {key} " or key.startswith("state ") or (key == "dg" and value.dim() == 1)
        ours = parts[-1][key] if shared else torch.cat([p[key] for p in parts], axis)
        assert ours.shape == value.shape, key
        scale = max(float(value.abs().max()), 1e-3)  # biases of keys have none
        assert float((ours - value).abs().max()) <= 1e-6 * scale, key


def test_these_mechanisms_are_among_them():
    """Others join when they say that they can."""
    tried = {slug for slug, _ in runs.layers().values()}
    assert {
        "softmax-attention", "lightning-attention-2", "lolcats", "attention-sink-empirical", "hedgehog", "based",
        "based-window", "based-conv", "cosformer", "mamba",
    } <= tried  # fmt: skip


@pytest.mark.parametrize("world", runs.WORLDS)
def test_bytes_of_linear_layers_do_not_grow(found, world):
    for of_rank in found[world]:
        account = of_rank["traffic"]
        short, long = account[16], account[64]
        gradients = world * 2 * 2 * 4 * 4 * 4  # (B, H, D, Dv) of every process, in float32
        states = gradients + world * 2 * 4  # and how much each head decays in a chunk
        for bytes_ in (short, long):
            assert bytes_["0", "forward", "all_gather"] == states
            assert bytes_["0", "backward", "all_gather"] == gradients
        assert account["16 count"] == account["64 count"] == 2
        # Keys and values grow: batch 2, 8 channels each, float32.
        assert short["1", "forward", "all_gather"] == 2 * 16 * 16 * 4
        assert long["1", "backward", "reduce_scatter"] == 2 * 64 * 16 * 4
        assert "layer  phase     collective" in account["table"]


@pytest.mark.parametrize("world", runs.WORLDS)
def test_one_gather_of_states_forward_and_one_backward(found, world):
    size = world * runs.B * runs.H * runs.D * runs.D * 8
    for of_rank in found[world]:
        assert of_rank["traffic"]["plain"] == [("forward", size), ("backward", size)]


@pytest.mark.parametrize("world", runs.WORLDS)
def test_gather_is_the_inverse_of_shard(found, world):
    x, grad = runs.random(2, 8, 3), runs.random(2, 8, 3, seed=1)
    parts = [of_rank["round_trip"] for of_rank in found[world]]
    assert all(torch.equal(p["all"], x) for p in parts)
    # Every process says the same of every chunk.
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts], 1), grad * world)


@pytest.mark.parametrize("world", runs.WORLDS)
def test_states_before_the_sequence_and_chunks_of_unequal_length(found, world):
    from attnlib.ops import linear_attention
    from attnlib.types import State

    q, v = runs.random(runs.B, runs.H, runs.N, runs.D, seed=1), runs.random(runs.B, runs.H, runs.N, runs.DV, seed=2)
    decay = -torch.ones(runs.H).double()
    parts = [of_rank["round_trip"] for of_rank in found[world]]
    state = State({"S": runs.random(runs.B, runs.H, runs.D, runs.DV, seed=7)})
    torch.testing.assert_close(
        torch.cat([p["went"] for p in parts], 2), linear_attention(q, q, v, state=state, decay=decay)
    )
    kept = [i for i in range(runs.N) if i != runs.N // world - 1]  # the first chunk is one token short
    torch.testing.assert_close(
        torch.cat([p["uneven"] for p in parts], 2),
        linear_attention(q[:, :, kept], q[:, :, kept], v[:, :, kept], decay=decay),
    )


MESSAGES = {
    "length": r"x\.shape\[1\]=17 does not divide into equal chunks for 4 processes; pad it to 20",
    "sequence": "sequence=3 does not divide the 4 processes; possible: [1, 2, 4]",
    "outside": "group does not contain this process",
    "mesh": "group is a mesh of 2 dimensions ('data', 'sequence'); choose one of them by its name",
    "type": "group must be a process group, a DeviceMesh, a Group or None, got",
    "whole": "this process holds 16 tokens, but 16 over 4 processes are 4 each",
    "state": "state is not possible while the sequence is cut over processes",
    "alibi": "bias is not possible while the sequence is cut over processes",
    "unable": "model holds 'nprf-rpe-fft-attention' at 'its top', which does not serve a sequence that is cut",
    "conv": "model holds Conv1d at '1', which lets tokens meet",
    "nothing": "model holds no attnlib mechanism",
    "segments": "cu_seqlens is not possible while the sequence is cut over processes",
    "operator": "neighborhood_attention does not serve a sequence that is cut over processes",
    "valid": "valid and state are not possible while the sequence is cut over processes",
    "terraces": "model holds 'lolcats' at 'its top', which does not serve a sequence that is cut",
    "softmax": "this process holds 3 tokens, but 16 over 4 processes are 4 each",
    "fields": "a transfer has no 'size'; possible: layer, phase, collective, what",
}


@pytest.mark.parametrize("key", MESSAGES)
def test_bad_input_is_refused_everywhere_alike(found, key):
    for of_rank in found[4]:
        assert MESSAGES[key].replace("\\", "") in of_rank["errors"][key], of_rank["errors"][key]


def test_the_example_trains_alike_on_two_and_on_four_processes(found):
    two, four = found[2][0]["example"]["all"], found[4][0]["example"]["all"]
    assert two["losses"][0] == pytest.approx(four["losses"][0], rel=1e-5)
    assert two["losses"] == pytest.approx(four["losses"], rel=1e-3)  # rounding, three steps of Adam long
    layers = {layer for layer, _, _ in two["traffic"]}
    assert layers == {"model.layers.0.mixer", "model.layers.1.mixer"}
    pairs = [of_rank["example"]["pairs"] for of_rank in found[4]]
    assert all(p["losses"] == pairs[0]["losses"] for p in pairs)
    # Two sequences of two processes each: the bytes of two processes, and another mean.
    assert pairs[0]["traffic"] == two["traffic"] and pairs[0]["losses"] != four["losses"]


def test_without_processes_it_says_what_is_missing():
    with pytest.raises(ValueError, match="init_process_group"):
        parallel.shard(torch.zeros(1, 4, 2))


def test_the_authors_operators_are_what_they_are(found):
    """Output and gradients of both released operators, recorded under Triton's interpreter in two processes."""
    from safetensors.torch import load_file

    theirs = load_file(runs.FIXTURE)
    parts = [of_rank["released"] for of_rank in found[2]]
    for key in parts[0]:
        ours, expected = torch.cat([p[key] for p in parts], 2), theirs[key]
        ours = ours[:, :, ::7] if key.startswith("512") else ours
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), key
    # Neither is causal attention: the first query reads nothing, or what comes after it.
    assert not theirs["32.False.out"][:, :, 0].any()
    q, k, v = (theirs[f"32.{t}"][:, :, :1] for t in "qkv")
    assert not torch.allclose(theirs["32.True.out"][:, :, :1], (q @ k.mT) @ v)
