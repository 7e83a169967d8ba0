"""Metrics count every real sample once and padding never."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.evaluation import ClassificationMetrics, mask_padding


def by_hand(logits, labels, weight, k):
    real = weight > 0
    hits = (logits[real].topk(k).indices == labels[real, None]).any(1)
    return hits.float().mean()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 2**31))
def test_metrics_equal_the_plain_formula_whatever_the_batches(count, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    weight = (torch.rand(count, generator=generator) > 0.3).float()
    weight[0] = 1
    metrics = ClassificationMetrics(classes)
    for part in torch.split(torch.arange(count), 7):
        metrics.update(logits[part], labels[part], weight[part])
    torch.testing.assert_close(metrics.top1.compute(), by_hand(logits, labels, weight, 1))
    torch.testing.assert_close(metrics.top5.compute(), by_hand(logits, labels, weight, min(5, classes)))
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(metrics.loss.compute(), (losses * weight).sum() / weight.sum())
    confusion = metrics.confusion.compute()
    assert confusion.sum() == weight.sum()
    assert confusion.diagonal().sum() == (logits.argmax(1) == labels)[weight > 0].sum()


def test_batch_of_padding_changes_nothing():
    metrics = ClassificationMetrics(3)
    metrics.update(torch.eye(3), torch.arange(3), torch.ones(3))
    metrics.update(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.zeros(2))
    assert metrics.top1.compute() == 1
    assert metrics.confusion.compute().sum() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_are_counted_in_float(dtype):
    metrics = ClassificationMetrics(3)
    metrics.update(torch.eye(3, dtype=dtype), torch.arange(3), torch.ones(3))
    assert metrics.loss.compute().dtype == torch.float32


def test_padding_loses_its_label():
    assert mask_padding(torch.tensor([4, 5]), torch.tensor([1.0, 0.0])).tolist() == [4, -1]
