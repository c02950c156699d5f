#!/usr/bin/env bash
# Starts a one-node Slurm for tests (munge, slurmctld, slurmd; partitions low and high) on Debian, as root and without
# systemd; installs it first where it is missing. Its files lie in DIR alone: a Slurm of the machine's own is not touched.
#     tests/slurm/up.sh DIR        then: export SLURM_CONF=DIR/slurm.conf
# Safe to run again: what already runs is left alone.
set -euo pipefail
dir=$(mkdir -p "$1" && cd "$1" && pwd)
if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  if [ ! -e /usr/sbin/policy-rc.d ]; then # nothing may start during the install
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends slurm-wlm munge
fi
node=$(hostname -s)
# beside a Slurm of the machine's own, or another of these
port=$(sed -n 's/^SlurmctldPort=//p' "$dir/slurm.conf" 2>/dev/null || true)
port=${port:-$((20000 + RANDOM % 5000 * 2))}
mkdir -p "$dir/state" "$dir/spool" "$dir/log" /run/munge
chown munge:munge /run/munge
cat >"$dir/slurm.conf" <<C
ClusterName=distillery
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits cred_expire + 1 s (the default is 120 s)
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
# look at the queue every second (the default is a minute): tests wait for it
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
NodeName=$node NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=$node Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=$node PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
C
export SLURM_CONF=$dir/slurm.conf
running() { [ -s "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }
munge -n >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged
munge -n | unmunge >/dev/null
running slurmctld || slurmctld -f "$SLURM_CONF"
running slurmd || slurmd -f "$SLURM_CONF" -N "$node"
for _ in $(seq 50); do
  sinfo --noheader --format %T 2>/dev/null | grep --quiet idle && break
  sleep 0.2
done
sinfo
