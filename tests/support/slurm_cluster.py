"""A SLURM cluster on the loopback: a real slurmctld, and a real slurmd for each of a few virtual nodes.

It needs Debian's packages `slurmctld slurmd slurm-client munge` and root, and no systemd. All that it writes is in one
folder, and it listens on 127.0.0.1 alone. Its processes end with the process that started them, whatever ends that.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
CPU_NODES = ("n1", "n2")
GPU_NODES = ("g1", "g2")
"""Nodes with two devices that look like GPUs to SLURM."""

_HANGS_S = 300.0
"""What takes longer hangs: a busy machine may stop a process for a minute."""

_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# Requeued jobs wait for this; below 5 it counts as 120.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait={kill_wait}
MinJobAge=3600
MaxArraySize=1001
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldDebug=info
SlurmdDebug=info
SlurmdParameters=config_overrides
"""
_NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000 State=UNKNOWN"
_PARTITION = "PartitionName={name} Nodes={nodes} MaxTime=INFINITE State=UP {options}\n"


def missing() -> str:
    """Return why no cluster can be started here, "" if one can."""
    # Debian's daemons are not on every user's path.
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"a SLURM cluster needs {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "a SLURM cluster on the loopback needs root, to start jobs"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/usr/bin"


#: Reads until the process that started it closes the pipe or dies, and then kills the cluster whose file it is given.
_GUARD = r"""
cat > /dev/null
for round in 1 2 3; do
    for process in /proc/[0-9]*; do
        grep -qsz "^SLURM_CONF=$0\$" "$process/environ" && kill -KILL "${process#/proc/}"
    done
done
"""


@dataclass
class SlurmCluster:
    """A running cluster with the partitions `cpu`, its default, `gpu`, and `preemptible`, which gives way to `cpu`."""

    folder: Path
    cpus: int
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    """``munged``, ``slurmctld``, and each node's slurmd by the name of the node."""

    def __post_init__(self) -> None:
        plain = {name: value for name, value in self.environment.items() if name != "SLURM_CONF"}
        # In a session of its own, out of reach of what interrupts the tests.
        self._guard = subprocess.Popen(
            ["bash", "-c", _GUARD, self.environment["SLURM_CONF"]],
            env=plain,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def call(self, *command: str, cwd: Path | None = None, check: bool = True) -> str:
        """Run a command of SLURM's and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=_HANGS_S, check=False
        )
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """Submit a batch script with its arguments and return the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_HANGS_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """Return the fields of a job, or of each task of an array that has been started."""
        lines = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()
        fields = [dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in lines]
        return sorted(fields, key=lambda job: int(job["JobId"]))

    def states(self, job: str) -> list[str]:
        """Return the state of a job, or of each task of an array."""
        return [task["JobState"] for task in self.jobs(job)]

    def wait_for(self, job: str, *states: str, seconds: float = _HANGS_S) -> None:
        """Wait until the job, or every task of the array, is in one of the states."""
        self.until(lambda: set(self.states(job)) <= set(states), f"job {job} is {', '.join(states)}", seconds)

    def finish(self, job: str, state: str = "COMPLETED", seconds: float = _HANGS_S) -> None:
        """Wait until the job, or every task of the array, has ended, and assert how."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait_for(job, *ended, seconds=seconds)
        assert set(self.states(job)) == {state}, f"{self.states(job)}\n{self.logs()}"

    def until(self, true: Callable[[], object], what: str, seconds: float = _HANGS_S) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}\n{self.logs()}"
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not ended, f"{', '.join(ended)} ended\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def start_node(self, name: str) -> None:
        """Start the slurmd of a node."""
        self._start(name, "slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill a node's slurmd and all that it started there, as a power cut does."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        for process in self._started():
            try:
                if process.environ().get("SLURMD_NODENAME") == name or f"slurmd-{name}" in process.cmdline():
                    process.kill()
            except psutil.Error:
                continue

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _started(self) -> Iterator[psutil.Process]:
        """Yield the processes of this cluster, which all have its configuration in their environment."""
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    yield process
            except psutil.Error:
                continue

    def stop(self) -> None:
        """End all processes, those of jobs included."""
        self._guard.communicate(timeout=_HANGS_S)
        for daemon in self.daemons.values():
            daemon.wait(timeout=_HANGS_S)
        assert not list(self._started()), "processes of the cluster are left"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _configure(folder: Path, host: str, cpus: int, grace: int, kill_wait: int) -> None:
    nodes = (*CPU_NODES, *GPU_NODES)
    control, *ports = _free_ports(1 + len(nodes))
    lines = [_CONFIGURATION.format(host=host, port=control, user=getpass.getuser(), folder=folder, kill_wait=kill_wait)]
    for name, port in zip(nodes, ports, strict=True):
        gres = " Gres=gpu:2" if name in GPU_NODES else ""
        lines.append(_NODE.format(name=name, host=host, port=port, cpus=cpus) + gres + "\n")
        (folder / "spool" / name).mkdir(parents=True)
    for name, members, options in (
        ("cpu", CPU_NODES, "Default=YES PriorityTier=10 PreemptMode=OFF"),
        ("preemptible", CPU_NODES, f"PriorityTier=1 GraceTime={grace}"),
        ("gpu", GPU_NODES, "PriorityTier=1"),
    ):
        lines.append(_PARTITION.format(name=name, nodes=",".join(members), options=options))
    (folder / "slurm.conf").write_text("".join(lines))
    # Any two device files do: SLURM only counts them.
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName={','.join(GPU_NODES)} Name=gpu File=/dev/null\n"
        f"NodeName={','.join(GPU_NODES)} Name=gpu File=/dev/zero\n"
    )


@contextmanager
def slurm_cluster(folder: Path, cpus: int = 64, grace: int = 8, kill_wait: int = 5) -> Iterator[SlurmCluster]:
    """Start a cluster whose files are in ``folder``, and end it.

    Args:
        cpus: CPUs of each node, whatever the machine has.
        grace: seconds from a preemption's warning to the signal that ends a job.
        kill_wait: seconds from there to SIGKILL.
    """
    host = socket.gethostname().split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    _configure(folder, host, cpus, grace, kill_wait)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    # A shell of the job finds the Python that runs the tests.
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{_path()}",
        "SLURM_CONF": str(folder / "slurm.conf"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    cluster = SlurmCluster(folder, cpus, environment)
    try:
        files = {"key-file": key, "socket": folder / "munge.socket", "pid-file": folder / "munged.pid"}
        files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
        # By force, because pytest's folders are closed to other users, who have no part in this cluster.
        options = [f"--{name}={file}" for name, file in files.items()]
        cluster._start("munged", "munged", "--foreground", "--force", *options)
        cluster.until(files["socket"].exists, "munged listens")
        cluster._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(folder / "slurm.conf"))
        for name in (*CPU_NODES, *GPU_NODES):
            cluster.start_node(name)
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        cluster.until(
            lambda: {*CPU_NODES, *GPU_NODES} <= set(cluster.call(*idle, check=False).split()), "all nodes are idle"
        )
        yield cluster
    finally:
        cluster.stop()
