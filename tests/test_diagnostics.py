import math

import pytest
import torch

from mirrorla import MirrorConfig, create_backbone
from mirrorla.diagnostics import (
    attention_entropy,
    effective_rank,
    head_energy,
    mirror_histograms,
    mirror_metrics,
    probe_layers,
    retained_energy,
)


def pico(**options):
    torch.manual_seed(0)
    return create_backbone("mirrorla_pico", num_classes=10, **options)


@pytest.mark.parametrize("modulation", ["none", "instance", "ema"])
def test_metrics_name_every_layer_and_stay_in_their_ranges(modulation):
    model = pico(mirror=MirrorConfig(modulation=modulation))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    metrics = mirror_metrics(model, torch.randn(4, 3, 64, 64))
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {tag.rsplit("_", 1)[1] for tag in metrics} == {"0", "1", "2", "3", "4"}
    for tag, value in metrics.items():
        assert math.isfinite(value), tag
        if "retained" in tag or "dead" in tag or "entropy" in tag or "offdiag" in tag:
            assert 0 <= value <= 1 + 1e-6, tag
        if "orthogonality" in tag:
            assert value < 1e-5, tag


def test_a_model_without_mirrors_has_no_metrics():
    assert mirror_metrics(create_backbone("resnet10t", num_classes=2), torch.randn(1, 3, 64, 64)) == {}
    softmax = pico(attention=("softmax",) * 4)
    assert mirror_metrics(softmax, torch.randn(1, 3, 64, 64)) == {}


@pytest.mark.parametrize("modulation", ["none", "instance", "ema"])
def test_the_probe_sees_what_the_layer_computes(modulation):
    model = pico(mirror=MirrorConfig(modulation=modulation, init="uniform")).eval()
    seen = []
    hooks = [a.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])) for a in model.attentions()]
    probes = probe_layers(model, torch.randn(2, 3, 64, 64))
    assert len(hooks) == len(seen) == len(probes)
    for (layer, probe), x in zip(probes, seen, strict=True):
        q, k, v, _ = layer.project(x)
        tables = layer.mirrors.token_tables(q, k, None, None)
        if tables is not None:
            from mirrorla.mirrors import block_mirror

            q, k = (block_mirror(t, tables[0].unsqueeze(1), tables[1].unsqueeze(1)) for t in (q, k))
        torch.testing.assert_close(probe.mirrored[0], q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probe.mirrored[1], k, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(probe.v, v, rtol=1e-4, atol=1e-5)


def test_aligned_mirrors_retain_more_energy():
    from mirrorla import align_mirrors

    model, images = pico(mirror=MirrorConfig(modulation="none")), torch.randn(4, 3, 64, 64)
    before = mirror_metrics(model, images)
    align_mirrors(model, images)
    after = mirror_metrics(model, images)
    for layer in range(5):
        tag = f"mirror/retained_energy/k/layer_{layer}"
        assert after[tag] > before[tag] + 0.1


def test_histograms_hold_angles_and_their_modulation():
    model = pico()
    with torch.no_grad():
        for attention in model.attentions():
            attention.mirrors.gain.fill_(2.0)
    histograms = mirror_histograms(model, torch.randn(2, 3, 64, 64))
    delta, theta = histograms["mirror/delta_alpha/layer_0"], histograms["mirror/theta/layer_0"]
    assert theta.shape == (16,) and delta.shape == (32,)
    assert 0 < delta.abs().max() <= math.pi / 8 + 1e-6
    assert (histograms["mirror/rho/layer_0"] <= 1).all()
    assert histograms["mirror/u_head_energy/layer_2"].sum() == pytest.approx(1.0)


def test_retained_energy_of_known_vectors():
    assert retained_energy(torch.tensor([3.0, -4.0])) == pytest.approx(9 / 25)
    assert retained_energy(torch.zeros(3)) == 0.0


def test_effective_rank_of_known_matrices():
    matrices = torch.stack((torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), torch.zeros(4, 4)))
    torch.testing.assert_close(effective_rank(matrices), torch.tensor([4.0, 2.0, 0.0]), rtol=1e-4, atol=1e-4)


def test_entropy_is_one_for_uniform_and_zero_for_one_token():
    phi_q = torch.rand(1, 300, 1, 4) + 0.1
    assert attention_entropy(phi_q, torch.ones(1, 50, 1, 4)) == pytest.approx(1.0, abs=1e-5)
    one_key = torch.zeros(1, 50, 1, 4)
    one_key[:, 7] = 1.0
    assert attention_entropy(phi_q, one_key) == pytest.approx(0.0, abs=1e-5)
    assert attention_entropy(torch.zeros(1, 3, 1, 4), one_key) == pytest.approx(1.0, abs=1e-5)


def test_head_energy_sums_to_one():
    torch.testing.assert_close(head_energy(torch.tensor([1.0, 1.0, 0.0, 2.0]), 2), torch.tensor([1 / 3, 2 / 3]))
