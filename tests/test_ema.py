"""The averaged copy: its arithmetic, its buffers, its restart."""

import pytest
import torch
from torch import nn

from lightning_modules.ema import ExponentialAverage


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


@pytest.fixture
def model():
    net = network()
    net(torch.randn(2, 3, 8, 8))
    return net


def wander(model, average, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(100 + step)
        model(torch.randn(4, 3, 8, 8))  # moves BatchNorm's statistics
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(model, step=step + 1)


def test_average_is_the_recurrence(model):
    average = ExponentialAverage(model, decay=0.9)
    weights = []
    for step in range(4):
        wander(model, average, 1, step)
        weights.append(model[0].weight.detach().clone())
    expected = weights[0]  # the first update copies
    for weight in weights[1:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.module[0].weight, expected)


def test_batchnorm_statistics_are_averaged_and_counters_copied(model):
    average = ExponentialAverage(model, decay=0.5)
    wander(model, average, 1)
    before = model[1].running_mean.clone()
    wander(model, average, 1, 1)
    torch.testing.assert_close(average.module[1].running_mean, (before + model[1].running_mean) / 2)
    assert average.module[1].num_batches_tracked == model[1].num_batches_tracked


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warmup"])
def test_restart_from_the_state_dict_is_bit_exact(model, warmup):
    average = ExponentialAverage(model, decay=0.97, warmup=warmup)
    wander(model, average, 5)
    other = network()
    other(torch.randn(2, 3, 8, 8))
    resumed = ExponentialAverage(other, decay=0.97, warmup=warmup)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(average.state_dict())
    wander(model, average, 5, 5)
    wander(other, resumed, 5, 5)
    for name, value in average.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_warmup_grows_to_the_decay(model):
    average = ExponentialAverage(model, decay=0.9, warmup=True)
    decays = [average.get_decay(step) for step in range(1, 200)]
    assert decays == sorted(decays)
    assert decays[0] == 0
    assert decays[-1] == 0.9


def test_copy_stays_in_evaluation_mode_and_untrained(model):
    average = ExponentialAverage(model, decay=0.9).train()
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_decay_is_refused_with_its_value(model, decay):
    with pytest.raises(ValueError, match=f"model.ema_decay {decay} must lie between 0 and 1"):
        ExponentialAverage(model, decay=decay)
