"""Offloading to disks says in one line what a node lacks, before DeepSpeed makes folders or compiles anything."""

import pytest

from cluster import deepspeed
from lightning_modules import offload


def test_what_stays_off_the_disks_needs_nothing():
    for config in ({}, deepspeed.settings(2), deepspeed.settings(3, "cpu")):
        offload.require_disks(config)


def test_a_missing_folder_is_named_with_its_option(tmp_path):
    with pytest.raises(
        ValueError, match=f"offload_optimizer.nvme_path {tmp_path}/gone is no folder; make it on"
    ) as error:
        offload.require_disks(deepspeed.settings(3, "nvme", f"{tmp_path}/gone"))
    assert "name another in a copy of configs/deepspeed/zero3_nvme.yaml" in str(error.value)
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_missing_libaio_is_said_with_its_package(is_there, tmp_path, monkeypatch):
    monkeypatch.setattr(offload, "has_asynchronous_io", lambda: is_there)
    config = deepspeed.settings(3, "nvme", str(tmp_path))
    if is_there:
        offload.require_disks(config)
    else:
        with pytest.raises(ValueError, match=r"needs libaio .*Debian: libaio-dev.*deepspeed/zero3_cpu"):
            offload.require_disks(config)
