# ruff: noqa: SIM115, E501 - files of processes that live on; lines of configuration files
"""A private, throw-away Slurm cluster on one machine (Debian 12: slurmctld slurmd slurm-client munge libpmix-dev).

  with MiniSlurm(nodes=2, cpus=2, isolate=True) as s: jid = s.sbatch("job.sh"); s.wait(jid, "COMPLETED")

isolate=False: n slurmd on this host, all with this host's name, on 127.0.0.1, free ports.
isolate=True : one outer pid+net+uts+mount namespace (head: munged, slurmctld, bridge 10.77.0.1) and in it one
               net+uts+ipc+pid+mount namespace per node (hostname n1.., 10.77.0.11.., own /dev/shm).
"""

import contextlib
import os
import signal
import socket
import subprocess as sp
import tempfile
import time

CONF = """\
ClusterName=mini
SlurmctldHost={ctlname}({ctladdr})
SlurmctldPort={ctlport}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/munge/sock,cred_expire={cred_expire}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
TmpFS={d}/tmp/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd-%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd-%n.log
SlurmctldDebug={debug}
SlurmdDebug={debug}
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={d}/log/jobcomp.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
{ctlparams}
ReturnToService=1
KillWait={kill_wait}
SlurmdTimeout={slurmd_timeout}
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{extra}
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=8 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=10 State=UP
"""

INIT = r"""#!/bin/bash
set -e
D={d}
mount --make-rprivate / ; mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns
hostname head; mount --bind $D/hosts /etc/hosts
ip link set lo up; ip link add br0 type bridge; ip addr add 10.77.0.1/24 dev br0; ip link set br0 up
for i in $(seq {n}); do
  ip netns add n$i; ip link add v$i type veth peer name eth0 netns n$i; ip link set v$i master br0 up
  ip -n n$i addr add 10.77.0.$((10+i))/24 dev eth0; ip -n n$i link set eth0 up; ip -n n$i link set lo up
done
{munged} &
while [ ! -S $D/munge/sock ]; do sleep .02; done
slurmctld -D -f $D/slurm.conf >$D/log/slurmctld.out 2>&1 &
for i in $(seq {n}); do $D/node.sh $i & done
touch $D/run/up
set +e
while :; do sleep 3600 & wait $!; done
"""
NODE = r"""#!/bin/bash
# start virtual node $1 (called inside the head namespaces); empty TmpFS and SlurmdSpoolDir as after the
# reboot of a diskless node: a left-over $TmpFS/spmix_appdir_<uid>_<job>.<step> or $SlurmdSpoolDir/stepd.slurm.pmix.<job>.<step>
# makes `srun --mpi=pmix` of the requeued job (same job and step id) fail with "task N launch failed: Unspecified error"
rm -rf {d}/tmp/n$1/* {d}/spool/n$1/*
exec nsenter --net=/run/netns/n$1 unshare --uts --mount --ipc --pid --fork --kill-child --mount-proc bash -c '
hostname n'$1'; mount -t tmpfs tmpfs /dev/shm
slurmd -D -N n'$1' -f {d}/slurm.conf >>{d}/log/slurmd'$1'.out 2>&1 &
while :; do sleep 3600 & wait $!; done'
"""


def free_ports(n):
    ss = [socket.socket() for _ in range(n)]
    for s in ss:
        s.bind(("127.0.0.1", 0))
    p = [s.getsockname()[1] for s in ss]
    for s in ss:
        s.close()
    return p


class MiniSlurm:
    def __init__(
        self,
        nodes=1,
        cpus=4,
        isolate=False,
        base=None,
        extra="",
        kill_wait=3,
        slurmd_timeout=10,
        cred_expire=5,
        ctlparams="",
        debug="info",
        user="root",
        node_extra="",
    ):
        self.node_extra = node_extra
        self.n, self.cpus, self.isolate = nodes, cpus, isolate
        self.kw = {
            "extra": extra,
            "kill_wait": kill_wait,
            "slurmd_timeout": slurmd_timeout,
            "cred_expire": cred_expire,
            "ctlparams": f"SlurmctldParameters={ctlparams}"
            if ctlparams
            else "",  # an empty "Key=" line is a parse error
            "debug": debug,
            "user": user,
        }
        self.d = base or tempfile.mkdtemp(prefix="ms.", dir="/tmp")
        self.procs = {}
        self.init = None

    # -- life cycle
    def start(self, timeout=60):
        t0 = time.time()
        d = self.d
        for x in ["state", "spool", "log", "munge", "run", "out"] + [f"tmp/n{i + 1}" for i in range(self.n)]:
            os.makedirs(f"{d}/{x}", exist_ok=True)
        os.chmod(d, 0o755)
        os.chmod(f"{d}/munge", 0o755)
        fd = os.open(f"{d}/munge/key", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, os.urandom(128))
        os.close(fd)
        munged = (
            f"munged -F --socket={d}/munge/sock --key-file={d}/munge/key --pid-file={d}/munge/pid "
            f"--log-file={d}/munge/log --seed-file={d}/munge/seed --num-threads=4"
        )
        if self.isolate:
            ctlname, ctladdr, ctlport = "head", "10.77.0.1", 6817
            nodes = "\n".join(
                f"NodeName=n{i} NodeHostname=n{i} NodeAddr=10.77.0.{10 + i} Port=6818 CPUs={self.cpus} RealMemory=64000 {self.node_extra} State=UNKNOWN"
                for i in range(1, self.n + 1)
            )
        else:
            ctlname, ctladdr = socket.gethostname().split(".")[0], "127.0.0.1"
            ctlport, *ports = free_ports(self.n + 1)
            nodes = "\n".join(
                f"NodeName=n{i} NodeHostname={ctlname} NodeAddr=127.0.0.1 Port={ports[i - 1]} CPUs={self.cpus} RealMemory=64000 {self.node_extra} State=UNKNOWN"
                for i in range(1, self.n + 1)
            )
        with open(f"{d}/slurm.conf", "w") as f:
            f.write(CONF.format(d=d, ctlname=ctlname, ctladdr=ctladdr, ctlport=ctlport, nodes=nodes, **self.kw))
        # cgroup/v1's init() touches nothing; "autodetect" makes slurmd fail where /sys/fs/cgroup is not mounted, or is v2
        # without systemd
        with open(f"{d}/cgroup.conf", "w") as f:
            f.write("CgroupPlugin=cgroup/v1\n")
        if self.isolate:
            with open(f"{d}/hosts", "w") as f:
                f.write(
                    "127.0.0.1 localhost\n10.77.0.1 head\n"
                    + "".join(f"10.77.0.{10 + i} n{i}\n" for i in range(1, self.n + 1))
                )
            for name, txt in (("init.sh", INIT), ("node.sh", NODE)):
                with open(f"{d}/{name}", "w") as f:
                    f.write(
                        txt.replace("{d}", d)
                        .replace("{n}", str(self.n))
                        .replace("{munged}", munged + f" >{d}/munge/out 2>&1")
                    )
                os.chmod(f"{d}/{name}", 0o755)
            self.procs["outer"] = sp.Popen(
                [
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "unshare",
                    "--net",
                    "--uts",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount-proc",
                    f"{d}/init.sh",
                ],
                stdout=open(f"{d}/log/init.out", "w"),
                stderr=sp.STDOUT,
                stdin=sp.DEVNULL,
                start_new_session=True,
            )
            op = self.procs["outer"].pid
            while not os.path.exists(f"{d}/run/up"):
                if self.procs["outer"].poll() is not None:
                    raise RuntimeError(open(f"{d}/log/init.out").read())
                if time.time() - t0 > timeout:
                    self.stop()
                    raise TimeoutError(open(f"{d}/log/init.out").read())
                time.sleep(0.02)
            self.init = int(open(f"/proc/{op}/task/{op}/children").read().split()[0])
        else:
            self._spawn("munged", munged.split(), f"{d}/munge/out")
            while not os.path.exists(f"{d}/munge/sock"):
                time.sleep(0.02)
            self._spawn("slurmctld", ["slurmctld", "-D", "-f", f"{d}/slurm.conf"], f"{d}/log/slurmctld.out")
            for i in range(1, self.n + 1):
                self.start_node(i)
        while True:
            r = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False)
            if r.stdout.split().count("idle") == self.n:
                break
            if time.time() - t0 > timeout:
                self.stop()
                raise TimeoutError("slurm did not come up: " + r.stdout + r.stderr)
            time.sleep(0.05)
        self.t_start = time.time() - t0
        return self

    def _spawn(self, name, cmd, out):
        self.procs[name] = sp.Popen(
            ["setpriv", "--pdeathsig", "KILL", *cmd],
            stdout=open(out, "a"),
            stderr=sp.STDOUT,
            stdin=sp.DEVNULL,
            start_new_session=True,
        )

    def start_node(self, i):
        if self.isolate:
            self.ns_popen([f"{self.d}/node.sh", str(i)])
        else:
            self._spawn(
                f"n{i}", ["slurmd", "-D", "-N", f"n{i}", "-f", f"{self.d}/slurm.conf"], f"{self.d}/log/slurmd{i}.out"
            )

    def node_init_pid(self, i):
        """host pid of the init of node i's pid namespace (isolate=True)"""
        for p in os.listdir("/proc"):
            if p.isdigit():
                with contextlib.suppress(OSError):
                    c = open(f"/proc/{p}/cmdline").read().split("\0")
                    if c[0] == "bash" and f"slurmd -D -N n{i} -f {self.d}/" in " ".join(c):
                        return int(p)
        return None

    def kill_node(self, i, sig=signal.SIGKILL):
        """isolate: power-off (every process of the node dies); else only slurmd dies, its slurmstepd and tasks live on"""
        if self.isolate:
            os.kill(self.node_init_pid(i), sig)
        else:
            self.procs[f"n{i}"].send_signal(sig)
            self.procs[f"n{i}"].wait()

    def stop(self):
        t0 = time.time()
        if self.isolate:
            p = self.procs["outer"]
            if p.poll() is None and self.init:
                os.kill(self.init, signal.SIGKILL)  # whole pid namespace goes
            with contextlib.suppress(Exception):
                p.kill()
            p.wait()
        else:
            with contextlib.suppress(Exception):
                self.run("scancel", "--user=" + self.kw["user"], check=False)
                self.wait_empty(5)
            for name in sorted(self.procs, key=lambda x: (x == "munged", x == "slurmctld")):
                p = self.procs[name]
                p.terminate()
                try:
                    p.wait(10)
                except sp.TimeoutExpired:
                    p.kill()
                    p.wait()
        self.t_stop = time.time() - t0

    def __enter__(self):
        return self.start()

    def __exit__(self, *a):
        self.stop()

    # -- commands
    def cmdline(self, cmd):
        if not self.isolate:
            return list(cmd)
        # not nsenter --wd: that directory would be on the mounts outside, where renaming from the same path inside fails
        return ["nsenter", "-t", str(self.init), "-n", "-u", "-m", "-p", "--", "env", "-C", os.getcwd(), *cmd]

    def ns_popen(self, cmd, **k):
        return sp.Popen(
            self.cmdline(cmd), stdin=sp.DEVNULL, stdout=sp.DEVNULL, stderr=sp.DEVNULL, start_new_session=True, **k
        )

    def run(self, *cmd, check=True, env=None, timeout=120):
        e = dict(os.environ, SLURM_CONF=f"{self.d}/slurm.conf", **(env or {}))
        return sp.run(
            self.cmdline(cmd),
            env=e,
            text=True,
            capture_output=True,
            check=check,
            timeout=timeout,
            stdin=sp.DEVNULL,
        )

    def sbatch(self, script, *opts, args=(), env=None):
        """script: path or text; returns job id"""
        if "\n" in script:
            fd, p = tempfile.mkstemp(suffix=".sh", dir=f"{self.d}/out")
            os.write(fd, script.encode())
            os.close(fd)
            script = p
        r = self.run(
            "sbatch", "--parsable", "-o", f"{self.d}/out/%j.out", "--open-mode=append", *opts, script, *args, env=env
        )
        return int(r.stdout.split(";")[0])

    def info(self, jid):
        t = self.run("scontrol", "-o", "show", "job", str(jid)).stdout
        return dict(kv.split("=", 1) for kv in t.split("\n")[0].split(" ") if "=" in kv)

    def state(self, jid):
        return self.info(jid)["JobState"]

    def wait(self, jid, *states, timeout=60):
        t0 = time.time()
        while True:
            s = self.state(jid)
            if s in states:
                return s
            if time.time() - t0 > timeout:
                raise TimeoutError(f"job {jid} is {s}, wanted {states}")
            time.sleep(0.1)

    def wait_empty(self, timeout):
        t0 = time.time()
        while time.time() - t0 < timeout and self.run("squeue", "-h", check=False).stdout.strip():
            time.sleep(0.1)

    def out(self, jid):
        p = f"{self.d}/out/{jid}.out"
        return open(p).read() if os.path.exists(p) else ""
