"""What a job asks SLURM for: one frozen dataclass, every field checked by full match.

A field becomes part of an #SBATCH line or of a shell word, so each has a pattern that knows no line feed, quote or
other character with a meaning there. What must hold free text (paths, values of variables) is quoted by sbatch.py.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_NAME = re.compile(r"[A-Za-z0-9][\w.@+-]*", re.ASCII)
_NAMES = re.compile(r"[A-Za-z0-9][\w.@+-]*(,[A-Za-z0-9][\w.@+-]*)*", re.ASCII)
_NODES = re.compile(r"[A-Za-z0-9][\w.-]*(\[[\d,-]+\])?(,[A-Za-z0-9][\w.-]*(\[[\d,-]+\])?)*", re.ASCII)
_CONSTRAINT = re.compile(r"[A-Za-z0-9\[(][\w.&|*,\[\]()-]*", re.ASCII)
_MEMORY = re.compile(r"\d+[KMGT]?", re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,3})(?::(\d{1,2}))?(?::(\d{1,2}))?", re.ASCII)
_DEPENDENCY = re.compile(
    r"singleton|(after|afterany|afterok|afternotok|aftercorr)(:\d+(_\d+)?(\+\d+)?)+"
    r"([,?](after|afterany|afterok|afternotok|aftercorr)(:\d+(_\d+)?(\+\d+)?)+)*",
    re.ASCII,
)
_ARRAY = re.compile(r"\d{1,6}(-\d{1,6}(:\d{1,6})?)?(,\d{1,6}(-\d{1,6}(:\d{1,6})?)?)*(%\d{1,6})?", re.ASCII)
_MODULE = re.compile(r"[A-Za-z0-9][\w.+/-]*", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_IMAGE = re.compile(r"[A-Za-z0-9/.~][\w./:#@+~-]*", re.ASCII)
_MOUNT = re.compile(r"/[\w./+@-]*(:/[\w./+@-]*(:(ro|rw))?)?", re.ASCII)
_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

_PATTERNS: dict[str, tuple[re.Pattern[str], str]] = {
    "job_name": (_NAME, "digits-2-nodes"),
    "partition": (_NAMES, "gpu or gpu,debug"),
    "account": (_NAME, "project42"),
    "qos": (_NAME, "normal"),
    "constraint": (_CONSTRAINT, "a100&nvlink"),
    "exclude": (_NODES, "node[3,7-9]"),
    "gpu_type": (_NAME, "a100"),
    "memory": (_MEMORY, "240G, or 0 for all of a node"),
    "time": (_TIME, "1-00:00:00"),
    "dependency": (_DEPENDENCY, "afterok:1234"),
    "array": (_ARRAY, "0-4 or 1,3,5"),
    "container": (_IMAGE, "/images/torch.sqsh or nvcr.io#nvidia/pytorch:26.01-py3"),
    "python": (_TEXT, "/opt/venv/bin/python"),
    "modules": (_MODULE, "cuda/13.0"),
    "source": (_TEXT, "/home/me/venv/bin/activate"),
    "container_mounts": (_MOUNT, "/data:/data:ro"),
}
_AT_LEAST = {
    "nodes": 1,
    "gpus_per_node": 0,
    "cpus_per_task": 1,
    "signal_lead_s": 1,
    "max_fruitless_restarts": 1,
    "min_nodes": 1,
    "tasks_per_node": 1,
    "min_free_gib": 0,
    "min_shm_gib": 0,
    "min_bandwidth_gb_s": 0,
}
_LIMIT = 100_000


@dataclass(frozen=True)
class SlurmConfig:
    """What a job asks for. Every field left out is the cluster's default.

    Attributes:
        job_name: shown by squeue; the run directory's name if null.
        partition: queue, or several with commas.
        account: whose time is used.
        qos: quality of service.
        constraint: features the nodes must have.
        exclude: nodes to stay away from.
        nodes: machines.
        min_nodes: accept as few as this when so many are not free, at every start anew; null: exactly `nodes`.
        gpus_per_node: GPUs of each machine, one process each; 0 trains on CPUs.
        gpu_type: as the cluster calls it.
        tasks_per_node: processes per machine; only where there are no GPUs.
        cpus_per_task: cores of each process; its data workers share them.
        memory: of each machine; "0" is all of it.
        time: limit, D-HH:MM:SS; a job that reaches it saves, is queued again and goes on.
        signal_lead_s: seconds before the limit at which the processes are told to save.
        dependency: jobs to wait for.
        array: one run for each number, which is its seed, in RUN/seed_<number>.
        launcher: srun starts every process; torchrun one per machine, which starts the others.
        modules: loaded before anything else.
        source: shell files read after that, for example a virtual environment's activate.
        environment: variables set for the training.
        python: interpreter on the nodes; null: the one that submits, or "python" inside a container.
        container: image; null trains without one.
        container_runtime: pyxis (enroot) or apptainer.
        container_mounts: FROM:TO[:ro] seen inside.
        requeue: go on by itself after a preemption, the time limit, a hung rank or a lost node.
        max_fruitless_restarts: restarts in a row without a new checkpoint after which the job gives up.
        min_free_gib: disk that the run directory's file system must have free, on every node before training.
        min_shm_gib: the same for /dev/shm, through which data workers hand over batches.
        min_bandwidth_gb_s: all-reduce bandwidth that the nodes must reach together before training; 0 skips it.

    Raises:
        ValueError: naming the field, its value and a valid one.
    """

    job_name: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int = 1
    gpu_type: str | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int = 8
    memory: str | None = None
    time: str = "1-00:00:00"
    signal_lead_s: int = 300
    dependency: str | None = None
    array: str | None = None
    launcher: Literal["srun", "torchrun"] = "srun"
    modules: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    container: str | None = None
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: tuple[str, ...] = ()
    requeue: bool = True
    max_fruitless_restarts: int = 3
    min_free_gib: float = 1.0
    min_shm_gib: float = 0.0
    min_bandwidth_gb_s: float = 0.0

    def __post_init__(self) -> None:
        """Check every field alone, then those that depend on each other."""
        for name, (pattern, example) in _PATTERNS.items():
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if text is not None and not pattern.fullmatch(text):
                    raise ValueError(f"slurm.{name} {text!r} is not valid; for example {example}")
        for name, least in _AT_LEAST.items():
            number = getattr(self, name)
            if number is not None and not least <= number <= _LIMIT:
                raise ValueError(f"slurm.{name} {number} must be from {least} to {_LIMIT}")
        for name, value in self.environment.items():
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"slurm.environment {name!r} is no name of a variable; for example NCCL_DEBUG")
            if value and not _TEXT.fullmatch(value):
                raise ValueError(f"slurm.environment {name} {value!r} must be one line of printable text")
        self._check_together()

    def _check_together(self) -> None:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"slurm.tasks_per_node {self.tasks_per_node} differs from gpus_per_node {self.gpus_per_node}: one "
                "process drives one GPU; leave tasks_per_node out"
            )
        if self.gpu_type and not self.gpus_per_node:
            raise ValueError(f"slurm.gpu_type {self.gpu_type!r} needs gpus_per_node of 1 or above, not 0")
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"slurm.min_nodes {self.min_nodes} is above nodes {self.nodes}; at most {self.nodes}")
        if self.container_mounts and self.container is None:
            raise ValueError(f"slurm.container_mounts {self.container_mounts[0]!r} needs a slurm.container")
        if self.launcher == "torchrun" and self.min_bandwidth_gb_s:
            raise ValueError(f"slurm.min_bandwidth_gb_s {self.min_bandwidth_gb_s:g} needs launcher srun, not torchrun")
        limit_s = seconds(self.time)
        if limit_s == 0:
            raise ValueError(f"slurm.time {self.time!r} is no time at all; for example 1-00:00:00")
        # SLURM may send the signal up to a minute early.
        if 2 * (self.signal_lead_s + 60) > limit_s and self.signal_lead_s + 60 > 90:
            raise ValueError(
                f"slurm.signal_lead_s {self.signal_lead_s} leaves less than half of slurm.time {self.time} for "
                f"training; at most {max(limit_s // 2 - 60, 30)}"
            )

    @property
    def num_tasks_per_node(self) -> int:
        """Processes on each machine."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.num_tasks_per_node


def seconds(time: str) -> int:
    """A SLURM time limit in seconds: MIN, MIN:SEC, HOURS:MIN:SEC, D-HOURS, D-HOURS:MIN or D-HOURS:MIN:SEC."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"slurm.time {time!r} is not valid; for example 1-00:00:00")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, minutes, extra = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, extra = parts
    else:
        hours, (minutes, extra) = 0, (*parts, 0)[:2]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + extra
