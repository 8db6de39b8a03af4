#!/usr/bin/env bash
# A SLURM cluster of two nodes, n1 and n2, on this one machine, for tests/test_slurm.py.
#   slurm_cluster.sh start   prints the path of its slurm.conf, to be exported as SLURM_CONF
#   slurm_cluster.sh stop    also ends its jobs
# Needs root and: apt-get install --no-install-recommends slurmd slurmctld slurm-client munge
# All that it writes lies in /run/milnce_slurm, but for the two names in /etc/hosts.
set -euo pipefail
folder=/run/milnce_slurm
export SLURM_CONF=$folder/slurm.conf

write_conf() {
    # "localhost" stands for this machine whatever its name is, and whether or not it resolves.
    # The nodes' CPUs are made up, so that a test may place more tasks than there are cores.
    # Nothing here uses a cgroup, which a container may not have.
    # A job of `high` preempts those of `low`, which get 30 seconds' notice and are requeued. They
    # start again when their credentials have expired; by default those live for two minutes.
    cat >$SLURM_CONF <<CONF
ClusterName=milnce
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16818 CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port=16819 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
}

is_up() {
    local up
    up=$(sinfo --noheader --Node --partition low --states idle,alloc,mix,comp --format %N 2>&1)
    [ "$(xargs <<<"$up")" = "n1 n2" ]
}

start() {
    if [ -e $SLURM_CONF ] && is_up; then
        echo $SLURM_CONF
        return
    fi
    stop
    mkdir -p $folder/state $folder/n1 $folder/n2
    chmod 755 $folder  # else munged refuses it
    write_conf
    for node in n1 n2; do  # the training looks its first node up by name
        getent hosts $node >/dev/null || echo "127.0.0.1 $node" >>/etc/hosts
    done
    (umask 077 && head -c 1024 /dev/urandom >$folder/munge.key)
    munged --key-file=$folder/munge.key --socket=$folder/munge.socket \
        --pid-file=$folder/munged.pid --log-file=$folder/munged.log \
        --seed-file=$folder/munged.seed
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 120); do
        if is_up; then
            echo $SLURM_CONF
            return
        fi
        sleep 0.5
    done
    echo "the SLURM cluster does not come up:" >&2
    sinfo --long --Node >&2 || true
    tail --lines=20 $folder/*.log >&2
    exit 1
}

stop() {
    [ -e $SLURM_CONF ] || return 0
    if is_up; then
        scancel --user=root
        for _ in $(seq 80); do
            [ -n "$(squeue --noheader)" ] || break
            sleep 0.5
        done
    fi
    for daemon in n2 n1 slurmctld munged; do
        end $daemon
    done
    rm -r $folder
}

# Ends the daemon of a pid file and waits for it. Where nobody adopts orphans it stays a zombie.
end() {
    local pid
    pid=$(cat $folder/$1.pid 2>/dev/null) || return 0
    grep -q $folder /proc/$pid/cmdline /proc/$pid/environ 2>/dev/null || return 0
    kill $pid
    for _ in $(seq 100); do
        grep -qs '^State:.[^Z]' /proc/$pid/status || return 0
        sleep 0.1
    done
    kill -9 $pid
}

case "${1:-}" in
    start | stop) "$1" ;;
    *)
        echo "usage: $0 start|stop" >&2
        exit 2
        ;;
esac
