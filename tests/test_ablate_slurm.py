"""An ablation on a real SLURM cluster: an array for each setting, and the same table as from one machine."""

import pytest

from cluster import slurm
from lightning_modules import cli
from tests.slurm_cluster import running

SLURM = [
    *("--slurm", "slurm/debug", "--slurm.partition=main", "--slurm.gpus_per_node=0", "--slurm.cpus_per_task=1"),
    *("--slurm.time=10:00", "--slurm.signal_lead_s=20", "--slurm.tasks_per_node=1"),
]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_ablation_runs_as_arrays_and_is_collected(digits, tmp_path, capsys):
    root = tmp_path / "ablation"
    words = ["ablate", "digits/classification", "--over", "attention=mirror,relu", "--seeds", "0,1"]
    words += ["--run_dir", str(root), f"--data.path={digits}", "--trainer.max_epochs=1"]
    with running(tmp_path, digits) as cluster:
        assert cli.main([*words, *SLURM]) == 0, capsys.readouterr().err
        for kind in ("mirror", "relu"):
            run = root / f"attention={kind}"
            job = slurm.job_number(run)
            for seed in (0, 1):
                cluster.finish(run / f"seed_{seed}", f"{job}_{seed}")
        assert cli.main([*words, "--collect"]) == 0
        rows = (root / "results.csv").read_text().splitlines()
        assert len(rows) == 5 and all(",finished," in row for row in rows[1:])
        capsys.readouterr()
        assert cli.main([*words, *SLURM]) == 0
        assert "all 4 runs are finished" in capsys.readouterr().out
