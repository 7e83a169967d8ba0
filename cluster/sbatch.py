"""The batch script of a job: configuration in, text out. Pure.

The script is meant to be read: it says what it does, and runs the same when submitted by hand. Words that come from
outside are quoted for the shell; values of #SBATCH lines are known to need no quoting (config.py) or have no character
that could (run directories).
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster import preempt
from cluster.config import SlurmConfig

SCRIPT = "job.sh"

# What sbatch's own file name patterns and quoting would read as something else.
_PATH = re.compile(r"/[\w./+,:=@~ -]*")
_LINE = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*")


@dataclass(frozen=True)
class Job:
    """What the script runs, where.

    Attributes:
        arguments: words for the interpreter: ("-m", "lightning_modules.cli", "fit", "--config", …).
        run: run directory, absolute; the script and what it notes are in its job/.
        folder: absolute; relative paths in `arguments` start there.
        interpreter: Python of the process that submits.
        requeue_codes: exit codes of the training after which the same job goes on.
        crash_loop_code: the job's exit code when it gives up.
    """

    arguments: tuple[str, ...]
    run: Path
    folder: Path
    interpreter: str
    requeue_codes: tuple[int, ...]
    crash_loop_code: int

    def __post_init__(self) -> None:
        """Refuse what no script could hold.

        Raises:
            ValueError: naming the path or word.
        """
        if not _PATH.fullmatch(str(self.run)):
            raise ValueError(
                f"run_dir {str(self.run)!r} must be an absolute path of letters, digits, blanks and . _ - + , : = @ ~; "
                "SLURM reads other characters its own way"
            )
        for word in (*self.arguments, str(self.folder), self.interpreter):
            if not _LINE.fullmatch(word):
                raise ValueError(f"option {word!r} must be one line of printable text")


def render(config: SlurmConfig, job: Job) -> str:
    """The batch script.

    Args:
        config: what is asked of SLURM.
        job: what is run.
    """
    sections = [
        "\n".join(["#!/bin/bash", *header(config, job)]),
        f"# Made by `mirrorla submit`; to submit it again by hand: sbatch {shlex.quote(str(job.run / 'job' / SCRIPT))}",
        _where(config, job),
        _surroundings(config),
        preempt.begin(config.max_fruitless_restarts, job.crash_loop_code),
        _MEETING_POINT,
        _training(config, job),
        preempt.end(config, job.requeue_codes),
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def header(config: SlurmConfig, job: Job) -> list[str]:
    """The #SBATCH lines."""
    kind = f"{config.gpu_type}:" if config.gpu_type else ""
    is_fixed = config.min_nodes in (None, config.nodes)
    tasks, cpus = _step_shape(config)
    options: list[tuple[str, object]] = [
        ("job-name", config.job_name or default_name(job.run)),
        ("partition", config.partition),
        ("account", config.account),
        ("qos", config.qos),
        ("constraint", config.constraint),
        ("exclude", config.exclude),
        ("nodes", config.nodes if is_fixed else f"{config.min_nodes}-{config.nodes}"),
        # From tasks per node SLURM counts the job's tasks at its first start, and then waits for as many nodes again,
        # however few would do; cores per node leave it the range. Seen with 22.05.
        ("ntasks-per-node", tasks if is_fixed else None),
        ("cpus-per-task", cpus if is_fixed else None),
        ("mincpus", None if is_fixed else tasks * cpus),
        # Not --gpus-per-task: it hides every rank's GPUs from its neighbours, which NCCL needs.
        ("gpus-per-node", f"{kind}{config.gpus_per_node}" if config.gpus_per_node else None),
        ("mem", config.memory),
        ("time", config.time),
        # Without "B:" the signal reaches the training and not this shell.
        ("signal", f"USR1@{config.signal_lead_s}"),
        ("dependency", config.dependency),
        ("array", config.array),
        ("open-mode", "append"),
        ("output", f'"{job.run}/logs/slurm_%j.out"'),
    ]
    lines = [f"#SBATCH --{name}={value}" for name, value in options if value is not None]
    return [*lines, "#SBATCH --requeue" if config.requeue else "#SBATCH --no-requeue"]


def default_name(run: Path) -> str:
    """A job name from a run directory's: what SLURM would not take becomes a dash."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run.name).strip("-._") or "mirrorla"


def _where(config: SlurmConfig, job: Job) -> str:
    lines = [
        "trap : TERM USR1 # signals are for the training; this shell waits to see how it ends",
        "",
        "# Where: everything is written below the run directory; relative paths start where the job was submitted.",
        f"run={shlex.quote(str(job.run))}",
        f"script=$run/job/{SCRIPT}",
        *(["run=$run/seed_$SLURM_ARRAY_TASK_ID"] if config.array else []),
        "job=$run/job",
        f"cd -- {shlex.quote(str(job.folder))} || exit 2",
        'mkdir -p -m 700 -- "$run" "$job" || exit 2',
        'printf \'%s\\n\' "$SLURM_JOB_ID" > "$job/id"',
        'say() { printf \'%(%F %T)T  job %s on %s: %s\\n\' -1 "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" "$*"; }',
    ]
    return "\n".join(lines)


def _surroundings(config: SlurmConfig) -> str:
    variables = {"PYTHONUNBUFFERED": "1", **config.environment}
    lines = [
        "# Surroundings.",
        *(f"module load {shlex.quote(name)} || exit 2" for name in config.modules),
        *(f"source {shlex.quote(path)} || exit 2" for path in config.source),
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "set -u -o pipefail # not before: what is sourced need not be written for it",
    ]
    return "\n".join(lines)


_MEETING_POINT = """
# Where the processes meet: a free port of the first node, another one at every start.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + restarts) % 20000))
while (exec 3<> "/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2> /dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
export MASTER_ADDR MASTER_PORT
"""


def _training(config: SlurmConfig, job: Job) -> str:
    fixed = ["--run_dir", '"$run"', "--ckpt_path", "last", "--trainer.num_nodes", '"$SLURM_JOB_NUM_NODES"']
    fixed += ["--trainer.devices", str(config.num_tasks_per_node)]
    if not config.gpus_per_node:
        fixed += ["--trainer.accelerator", "cpu"]
    if config.array:
        fixed += ["--seed_everything", '"$SLURM_ARRAY_TASK_ID"', "--data.seed", '"$SLURM_ARRAY_TASK_ID"']
    lines = [
        "# Train. `last` goes on from the newest checkpoint, and starts at step 0 where there is none.",
        f"training=({_words([_interpreter(config, job), *job.arguments])}",
        f"  {' '.join(fixed)})",
        f'launch=({_words(_launch_words(config, job))} --job "$job" --run "$run")',
    ]
    if config.launcher == "torchrun":
        lines += [
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # without it a restart across nodes does not meet again",
            f"agent=({_words([_interpreter(config, job), '-m', 'torch.distributed.run', '--no-python'])}",
            f'  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {config.num_tasks_per_node} --max-restarts 0',
            '  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$SLURM_JOB_ID.$restarts")',
        ]
    if config.launcher == "srun":
        train = _srun(config, ['"${launch[@]}"', "--", '"${training[@]}"'])
    else:
        train = _srun(
            # The "--" before it: torchrun takes what it does not know for abbreviations of its own options.
            config,
            ['"${launch[@]}"', "--agent", "--", '"${agent[@]}"', "--", '"${launch[@]}"', "--", '"${training[@]}"'],
        )
    if not config.min_bandwidth_gb_s:
        return "\n".join([*lines, *train, "code=$?"])
    check = [_interpreter(config, job), "-m", "lightning_modules.bandwidth"]
    options = f'--at-least {config.min_bandwidth_gb_s:g} --strikes "$job/strikes"'
    # Through launch, too: nodes are checked before they measure anything together.
    measure = _srun(config, ['"${launch[@]}"', "--", _words(check), options])
    return "\n".join([*lines, *measure, "code=$?", 'if [ "$code" -eq 0 ]; then', *_indented([*train, "code=$?"]), "fi"])


def _srun(config: SlurmConfig, command: Sequence[str]) -> list[str]:
    tasks, cpus = _step_shape(config)
    # Steps do not inherit --cpus-per-task everywhere, and would then get one core.
    options = ["srun", "--kill-on-bad-exit=1", "--wait=60", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]
    if config.container is not None and config.container_runtime == "pyxis":
        options += [f"--container-image={shlex.quote(config.container)}", '--container-workdir="$PWD"']
        mounts = ",".join(config.container_mounts)
        options += [f'--container-mounts="$run:$run"{"," + shlex.quote(mounts) if mounts else ""}']
    if config.container is not None and config.container_runtime == "apptainer":
        binds = ['--bind "$run"', *(f"--bind {shlex.quote(mount)}" for mount in config.container_mounts)]
        gpus = ["--nv"] if config.gpus_per_node else []
        command = ["apptainer exec", *gpus, '--pwd "$PWD"', *binds, shlex.quote(config.container), *command]
    return [" ".join(options) + " \\", f"  {' '.join(command)}"]


def _step_shape(config: SlurmConfig) -> tuple[int, int]:
    """What srun starts: tasks on each node, cores of each; torchrun is one task that starts the others."""
    per_node = config.num_tasks_per_node
    return (per_node, config.cpus_per_task) if config.launcher == "srun" else (1, config.cpus_per_task * per_node)


def _interpreter(config: SlurmConfig, job: Job) -> str:
    return config.python or ("python" if config.container else job.interpreter)


def _launch_words(config: SlurmConfig, job: Job) -> Sequence[str]:
    words = [_interpreter(config, job), "-m", "cluster.launch", "--gpus", str(config.gpus_per_node)]
    words += ["--cpus", str(config.cpus_per_task)]
    for option, value in (("--min-free-gib", config.min_free_gib), ("--min-shm-gib", config.min_shm_gib)):
        words += [option, f"{value:g}"]
    return words


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _words(words: Iterable[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
