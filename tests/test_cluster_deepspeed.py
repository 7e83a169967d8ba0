"""DeepSpeed's configurations as pure functions, and what is refused of others."""

import pytest
import yaml

from cluster import deepspeed
from lightning_modules.strategies import ZeroStrategy
from mirrorla.config_files import find_config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero1", deepspeed.settings(1)),
        ("zero2", deepspeed.settings(2)),
        ("zero3", deepspeed.settings(3)),
        ("zero3_cpu", deepspeed.settings(3, "cpu")),
        ("zero3_nvme", deepspeed.settings(3, "nvme", "/local/nvme")),
    ],
)
def test_packaged_deepspeed_configurations_are_the_functions(name, expected):
    strategy = yaml.safe_load(find_config(f"deepspeed/{name}").read_text())["trainer"]["strategy"]
    assert strategy["init_args"]["config"] == expected
    assert deepspeed.named_twice(expected) == []


@pytest.mark.parametrize("zero", [None, {}, {"offload_param.device": "nvme"}, {"stage": "2"}, {"stage": 0}, "cpu"])
def test_a_configuration_that_lost_its_stage_is_refused_with_what_is_left(zero):
    with pytest.raises(ValueError, match="has no stage 1, 2 or 3") as error:
        deepspeed.require_stage({"zero_optimization": zero})
    assert f"zero_optimization {zero} has" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, "cpu"), "offload 'cpu' needs stage 2 or 3, not 1"),
        ((2, "nvme", "/x"), "offload 'nvme' needs stage 3, not 2; 'cpu' works with 2"),
        ((3, "nvme"), "nvme_path None belongs to offload 'nvme'"),
        ((3, "cpu", "/x"), "nvme_path '/x' belongs to offload 'nvme', which is 'cpu'"),
    ],
)
def test_offloads_that_a_stage_cannot_do_are_refused(arguments, message):
    with pytest.raises(ValueError, match="offload") as error:
        deepspeed.settings(*arguments)
    assert message in str(error.value)


def test_the_strategy_refuses_it_too():
    with pytest.raises(ValueError, match="has no stage 1, 2 or 3"):
        ZeroStrategy(config={"zero_optimization": {"offload_param.device": "nvme"}})
