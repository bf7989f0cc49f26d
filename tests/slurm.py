"""A real one-node Slurm in a temporary folder, with a link to it in /etc/slurm where jobs look: two partitions, `low`
preempted by `high`; two GPUs that exist on paper. Needs root and Debian's Slurm packages."""
import contextlib, os, shutil, socket, subprocess, tempfile, time
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins"
ETC, FILES = Path("/etc/slurm"), ("slurm.conf", "gres.conf")
CONF = """ClusterName=repopt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port1}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
MinJobAge=3600
ReturnToService=2
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=0 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing() -> str:
    "Why there can be no Slurm here, or ''"
    if os.geteuid(): return "a Slurm of one's own needs root"
    if any((ETC/n).exists() for n in FILES):
        return f"{ETC} has a configuration already: there is a Slurm here, which is left alone"
    gone = [p for p in ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
            if not shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
    return f"no {', '.join(gone)} here (apt-get install {PACKAGES})" if gone else ""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def cluster():
    "The environment in which sbatch, squeue and scontrol speak to it, for as long as the block lasts"
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
    folder.chmod(0o755)
    for d in ("state", "spool"): (folder/d).mkdir()
    (folder/"munge.key").write_bytes(os.urandom(128))
    (folder/"munge.key").chmod(0o600)
    (folder/"slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], port=free_port(),
                                                 port1=free_port(), folder=folder, cpus=os.cpu_count()))
    (folder/"gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    for n in FILES:
        ETC.mkdir(exist_ok=True)
        (ETC/n).unlink(missing_ok=True)
        (ETC/n).symlink_to(folder/n)       # a dangling link is one that a killed test left
    env = {**os.environ, "SLURM_CONF": str(folder/"slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    own = [f"--{k}-file={folder}/munge.{k}" for k in ("key", "pid", "log", "seed")]
    daemons = [subprocess.Popen(c, env=env, stdout=open(folder/"out", "a"), stderr=subprocess.STDOUT) for c in
               (["munged", "-F", "--force", f"--socket={folder}/munge.socket", *own], ["slurmctld", "-D", "-i"],
                ["slurmd", "-D"])]
    try:
        deadline = time.time() + 60
        while "idle" not in (said := subprocess.run(["sinfo", "-h", "-o", "%T"], env=env, capture_output=True,
                                                    text=True).stdout):
            if time.time() > deadline:
                raise RuntimeError(f"Slurm did not come up: {said} {(folder/'out').read_text()[-2000:]}")
            time.sleep(.3)
        yield env
    finally:
        subprocess.run(["scancel", "-u", "root"], env=env)
        time.sleep(1)
        for d in reversed(daemons):
            d.terminate()
            d.wait(30)
        for n in FILES: (ETC/n).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
