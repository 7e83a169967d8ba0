"""The peers' maps against their published formulas, written out token by token over the whole N x N attention."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrorla.feature_maps import PEERS

LINEAR = [kind for kind in PEERS if kind != "softmax"]


def peer(kind, H=3, d=8, dtype=torch.float64):
    torch.manual_seed(0)
    module = PEERS[kind](H, d)
    with torch.no_grad():  # powers away from their common start
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module.to(dtype)


def tokens(N=7, M=9, H=3, d=8, B=2, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, H, d, generator=generator, dtype=dtype) for n in (N, M, M))
    ropes = []
    for n in (N, M):
        angle = 3 * torch.rand(n, d // 2, generator=generator, dtype=torch.float64)
        ropes.append((angle.cos(), angle.sin()))
    return q, k, v, *ropes


# --- the published formulas, one query, one key and one head at a time ------------------------------------------------


def turned(x, table):
    """Channel pairs as complex numbers, times exp(i·angle)."""
    if table is None:
        return x
    numbers = (x[0::2] + 1j * x[1::2]) * (table[0] + 1j * table[1])
    return np.stack((numbers.real, numbers.imag), -1).reshape(-1)


def dot(a, b, rope_a, rope_b):
    return float(turned(a, rope_a) @ turned(b, rope_b))


def relu(x):
    return np.maximum(x, 0)


def focused(x):
    r = relu(x)
    return np.linalg.norm(r) / np.linalg.norm(r**3) * r**3


def norm_aware_query(x, sign):
    norm = math.sqrt((x**2).sum())
    return (relu(sign * x) / norm) ** (3 * (0.5 + math.tanh(norm)))


def similarities(kind, q, k, ropes, power):
    """Per stream the product that weighs values and the one that normalises, of one query and one key."""

    def pair(a, b):
        return np.array([dot(a, b, *ropes), a @ b])

    if kind == "polar":
        p = 1 + 4 / (1 + np.exp(-power))
        (qp, qn), (kp, kn) = ((relu(x) ** p, relu(-x) ** p) for x in (q, k))
        return [pair(qp, kp) + pair(qn, kn), pair(qp, kn) + pair(qn, kp)]
    if kind == "norm_aware":
        return [sum(pair(norm_aware_query(q, s), relu((s * k) ** 3)) for s in (1, -1))]
    maps = {"relu": relu, "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), "focused": focused}
    return [pair(maps[kind](q), maps[kind](k))]


def quadratic(kind, q, k, v, q_rope, k_rope, mask, power):
    """The attention of every query over every key that counts, as one matrix for each stream."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, n, h in np.ndindex(*q.shape[:3]):
        keys = [m for m in range(k.shape[1]) if mask is None or mask[b, m]]
        ropes = [(None if q_rope is None else tuple(t[n].numpy() for t in q_rope))]
        values = np.split(v[b, :, h].numpy(), 2 if kind == "polar" else 1, axis=-1)
        if kind == "softmax":
            scores = []
            for m in keys:
                k_table = None if k_rope is None else tuple(t[m].numpy() for t in k_rope)
                scores.append(dot(q[b, n, h].numpy(), k[b, m, h].numpy(), ropes[0], k_table) / math.sqrt(q.shape[-1]))
            weights = np.exp(scores) / np.exp(scores).sum()
            out[b, n, h] = torch.from_numpy(weights @ v[b, keys, h].numpy())
            continue
        streams = []
        for m in keys:
            k_table = None if k_rope is None else tuple(t[m].numpy() for t in k_rope)
            head_power = None if power is None else power[h].numpy()
            streams.append(similarities(kind, q[b, n, h].numpy(), k[b, m, h].numpy(), (ropes[0], k_table), head_power))
        table = np.array(streams)  # (keys, streams, 2)
        parts = []
        for index, part in enumerate(values):
            weighing, normalising = table[:, index, 0], table[:, index, 1]
            parts.append(weighing @ part[keys] / len(keys) / (normalising.mean() + 1e-6))
        out[b, n, h] = torch.from_numpy(np.concatenate(parts))
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("roped", [False, True], ids=["plain", "roped"])
@pytest.mark.parametrize("kind", PEERS)
def test_each_map_is_its_published_formula(kind, roped, masked):
    q, k, v, q_rope, k_rope = tokens()
    ropes = (q_rope, k_rope) if roped else (None, None)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[6], [9]]) if masked else None
    module = peer(kind)
    power = module.power.detach() if kind == "polar" else None
    expected = quadratic(kind, q, k, v, *ropes, mask, power)
    if masked:
        k[0, 6:], v[0, 6:] = 1e6, -1e6  # what does not count may be anything
    with torch.no_grad():
        found = module(q, k, v, *ropes, mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", LINEAR)
def test_gradients_agree_with_finite_differences(kind):
    q, k, v, q_rope, k_rope = tokens(N=2, M=3, H=2, d=4, B=1)
    module = peer(kind, 2, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def attend(q, k, v, *parameters):
        options = (q, k, v, q_rope, k_rope, None)
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), options)

    assert torch.autograd.gradcheck(attend, (*leaves, *values))


@pytest.mark.parametrize("kind", LINEAR)
@settings(max_examples=25)
@given(data=st.data())
def test_attention_stays_an_average_of_the_values_at_any_scale(kind, data):
    """Non-negative features: without positions every weight is, and their sum is at most one; gradients stay finite."""
    exponents = st.integers(-30, 12)
    N, M = (data.draw(st.integers(1, 4)) for _ in "qk")
    q, k, v, *_ = tokens(N, M, 2, 4, 1, torch.float32, data.draw(st.integers(0, 99)))
    q, k = (x * 10.0 ** data.draw(exponents) * data.draw(st.sampled_from([0.0, 1.0])) for x in (q, k))
    module = peer(kind, 2, 4, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for phi_q, phi_k, _ in module.streams(*leaves):
        for phi in (phi_q, phi_k):
            assert (phi >= 0).all() and phi.isfinite().all()
    out = module(*leaves, None, None, None)
    assert (out.abs() <= v.abs().max() * (1 + 1e-5)).all()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (*leaves, *module.parameters()))


@given(st.lists(st.floats(-50, 50), min_size=6, max_size=6), st.floats(0.1, 10))
def test_focusing_keeps_the_norm_and_the_scale(values, scale):
    x = torch.tensor(values, dtype=torch.float64)[None, None, None]
    phi = peer("focused", 1, 6).queries(x)
    torch.testing.assert_close(phi.norm(), x.relu().norm(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(peer("focused", 1, 6).queries(scale * x), scale * phi, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 999))
def test_both_streams_of_polar_together_forget_signs(seed):
    q, k, v, *_ = tokens(2, 3, 1, 4, 1, seed=seed)
    module = peer("polar", 1, 4)
    with torch.no_grad():
        streams = module.streams(q, k, v)
        total = sum(torch.einsum("bnhd,bmhd->nm", phi_q, phi_k) for phi_q, phi_k, _ in streams)
        power = 1 + 4 * module.power.sigmoid()
    torch.testing.assert_close(total, torch.einsum("bnhd,bmhd->nm", q.abs().pow(power), k.abs().pow(power)))
