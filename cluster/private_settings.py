"""The configuration files of a private SLURM cluster."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_SLURM_CONF = """\
ClusterName=private
SlurmctldHost=head(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
InactiveLimit=0
ReturnToService=2
MinJobAge=300
SchedulerParameters=sched_interval=5,bf_interval=3,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Shape:
    """What a private cluster looks like.

    Attributes:
        nodes: how many; they are called node1, node2, ….
        cpus: of each node, whatever this machine has.
        gpus: of each node; names without devices.
        is_running: False for a controller alone, whose nodes are said to be in a cloud: it accepts or refuses scripts.
    """

    nodes: int = 2
    cpus: int = 4
    gpus: int = 8
    is_running: bool = True


def write_settings(folder: Path, shape: Shape) -> None:
    """Write slurm.conf, gres.conf, hosts and a new key into a folder, and make the folders that they name.

    Args:
        folder: the cluster's own.
        shape: nodes and what they have.
    """
    ports = _free_ports(shape.nodes + 1 if shape.is_running else 1)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    devices = folder / "devices"
    devices.mkdir()
    for index in range(shape.gpus):
        (devices / f"gpu{index}").touch()
    memory = 64_000
    common = f"CPUs={shape.cpus} CoresPerSocket={shape.cpus} Sockets=1 RealMemory={memory} Gres=gpu:{shape.gpus}"
    if shape.is_running:
        nodes = [
            f"NodeName=node{i} NodeAddr=127.0.1.{i} Port={ports[i]} {common} State=UNKNOWN"
            for i in range(1, shape.nodes + 1)
        ]
        gres = f"AutoDetect=off\nName=gpu File={devices}/gpu[0-{shape.gpus - 1}]\n" if shape.gpus else ""
    else:
        nodes = [f"NodeName=node[1-{shape.nodes}] {common} State=CLOUD"]
        gres = f"AutoDetect=off\nName=gpu Count={shape.gpus}\n"
    text = _SLURM_CONF.format(folder=folder, controller_port=ports[0], nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    (folder / "gres.conf").write_text(gres)
    hosts = [f"127.0.1.{i} node{i}" for i in range(1, shape.nodes + 1) if shape.is_running]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost head", *hosts]) + "\n")
    for name in ("state", *(f"spool.node{i}" for i in range(1, shape.nodes + 1) if shape.is_running)):
        (folder / name).mkdir()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for free in sockets:
        free.bind(("127.0.0.1", 0))
    ports = [free.getsockname()[1] for free in sockets]
    for free in sockets:
        free.close()
    return ports
