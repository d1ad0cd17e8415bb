#!/bin/bash
# A real Slurm and ssh cluster on one Linux machine, for the tests: no systemd, no containers, nothing kept afterwards.
#
# Every node is its own network, host name, process and mount namespace: own address, own processes (they all die with
# it), own /dev/shm. The file system is the machine's, so a checkout is shared by all nodes as it is on a real cluster.
# The bridge between the nodes lies in the controller's namespace: the machine's own network is not touched, and any
# number of clusters may run side by side, each with its own root directory and prefix.
#
#   cluster.sh start [N]         N nodes (2): returns when Slurm has them all idle
#   cluster.sh stop              ends what start began, and only that; may be called twice
#   cluster.sh ctl COMMAND...    runs a command in the controller, the login node: sbatch, squeue, deepspeed, ...
#   cluster.sh on NODE COMMAND...  runs a command in a node
#   cluster.sh kill NODE         the node dies with its link up: its peers see connections closed at once
#   cluster.sh crash NODE        loss of power: its peers hear nothing more
#   cluster.sh up NODE           boots a dead node again; not before sinfo shows it DOWN, else Slurm takes its job for alive
#   cluster.sh cut|heal NODE     its network goes away, and comes back; its processes live on
#   cluster.sh kill-slurmd|start-slurmd NODE   Slurm's daemon alone; the ranks live on
#   cluster.sh shape RATE        all links at that rate, such as 100mbit; `shape none` undoes it
#
# Environment: CLUSTER_ROOT (directory, /tmp/vlm-dist-cluster), CLUSTER_PREFIX (of node names, node), CLUSTER_GPUS per node (8),
# CLUSTER_OWNER (a process id: the cluster is stopped when that process has ended).
set -euo pipefail

ROOT=${CLUSTER_ROOT:-${TMPDIR:-/tmp}/vlm-dist-cluster}
PREFIX=${CLUSTER_PREFIX:-node}
GPUS=${CLUSTER_GPUS:-8}
CONTROLLER=${PREFIX}ctl
# The same for every cluster: addresses of different namespaces never meet.
NETWORK=10.77.0
# More than the machine has, as with a scheduler that is told so: tests start as many tasks as they like.
CPUS=32
# daemons are not on every user's path
export PATH=$PATH:/usr/sbin:/sbin

fail() {
    echo "cluster.sh: $*" >&2
    exit 1
}

# ---------------------------------------------------------------------------------------------------- what there is

node_names() {
    local count
    count=$(cat "$ROOT/run/count" 2>/dev/null || echo 0)
    local number
    for ((number = 1; number <= count; number++)); do
        echo "$PREFIX$number"
    done
}

# The machine's process id of a namespace's first process.
first_pid() { cat "$ROOT/run/$1.pid" 2>/dev/null || true; }

is_up() {
    local pid
    pid=$(first_pid "$1")
    [[ -n $pid ]] && kill -0 "$pid" 2>/dev/null
}

inside() {
    local name=$1
    shift
    is_up "$name" || fail "$name is not up"
    nsenter --target "$(first_pid "$name")" --net --uts --ipc --mount --pid --wd="$PWD" "$@"
}

wait_until_gone() {
    local _
    for _ in {1..200}; do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.02
    done
    return 1
}

# -------------------------------------------------------------------------------------------------------- settings

write_slurm_settings() {
    local count=$1
    # cred_expire: the pause before a requeued job starts; 120 s by default.
    # JobRequeue=0: so that a job that is requeued owes it to its own script.
    # SlurmdTimeout, KillWait, MessageTimeout, intervals: seconds, so that tests of failures last seconds.
    # ReturnToService=2: a node that comes back is used again without an administrator.
    # linuxproc, task/none, config_overrides: no cgroups, and more CPUs and memory than the machine has.
    cat >"$ROOT/etc/slurm.conf" <<SETTINGS
ClusterName=$PREFIX
SlurmctldHost=$CONTROLLER($NETWORK.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=0
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=10
MessageTimeout=5
UnkillableStepTimeout=20
InactiveLimit=0
MinJobAge=3600
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pidfile
SlurmdPidFile=$ROOT/run/slurmd.%n.pidfile
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
GresTypes=gpu
NodeName=${PREFIX}[1-$count] CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=64000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
SETTINGS
    # Devices must be files of their own: a count without files leaves the nodes invalid, one file eight times is fatal.
    echo "NodeName=${PREFIX}[1-$count] Name=gpu File=$ROOT/dev/nvidia[0-$((GPUS - 1))]" >"$ROOT/etc/gres.conf"
    # slurmd always loads a cgroup plugin, and its detection ends it in a namespace without /sys/fs/cgroup; v1 does not.
    echo "CgroupPlugin=cgroup/v1" >"$ROOT/etc/cgroup.conf"
}

write_network_settings() {
    local count=$1 number
    {
        echo "127.0.0.1 localhost"
        echo "$NETWORK.1 $CONTROLLER"
        for ((number = 1; number <= count; number++)); do
            echo "$NETWORK.$((10 + number)) $PREFIX$number"
        done
    } >"$ROOT/etc/hosts"
    # No name server is reachable from a node; without this line look-ups hang or warn.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$ROOT/etc/nsswitch.conf"
    grep -q '^hosts:' "$ROOT/etc/nsswitch.conf" || echo "hosts: files" >>"$ROOT/etc/nsswitch.conf"
    for ((number = 1; number <= count; number++)); do
        echo "$PREFIX$number slots=2"
    done >"$ROOT/hostfile"
}

# Keys and settings of the cluster's own, seen only inside it as /etc/ssh: nobody's ~/.ssh is read or written.
write_ssh_settings() {
    ssh-keygen -q -t ed25519 -N '' -f "$ROOT/ssh/user_key"
    ssh-keygen -q -t ed25519 -N '' -f "$ROOT/ssh/ssh_host_ed25519_key"
    cp "$ROOT/ssh/user_key.pub" "$ROOT/ssh/authorized_keys"
    cat >"$ROOT/ssh/ssh_config" <<SETTINGS
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    IdentityFile /etc/ssh/user_key
    ConnectTimeout 5
SETTINGS
    # PAM: without it, sshd refuses an account without a password. StrictModes: /tmp belongs to everybody.
    cat >"$ROOT/ssh/sshd_config" <<SETTINGS
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PidFile none
UsePAM yes
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UseDNS no
MaxStartups 100
PrintMotd no
SETTINGS
    chmod 600 "$ROOT"/ssh/*
}

# ------------------------------------------------------------------------------------------------- nodes, up and down

# Runs in a fresh mount namespace; nothing of it is seen outside.
# shellcheck disable=SC2016  # its variables are those of the new shell
SET_UP='
    mount --make-rprivate /
    mount --bind "$ROOT/etc/hosts" /etc/hosts
    mount --bind "$ROOT/etc/nsswitch.conf" /etc/nsswitch.conf
    mount --bind "$ROOT/etc" /etc/slurm
    mount --bind "$ROOT/ssh" /etc/ssh
    mount -t tmpfs -o size=2g tmpfs /dev/shm
    hostname "$NAME"
    ip link set lo up
'
# The first process of a node: it reaps, and with it everything in the node ends.
# shellcheck disable=SC2016
BE_NODE=$SET_UP'
    start_slurmd() { slurmd -D -N "$NAME" >>"$ROOT/log/$NAME.slurmd.out" 2>&1 & echo $! >"$ROOT/run/$NAME.slurmd"; }
    trap start_slurmd USR1
    trap : TERM
    /usr/sbin/sshd -D -e >>"$ROOT/log/$NAME.sshd.out" 2>&1 &
    start_slurmd
    touch "$ROOT/run/$NAME.ready"
    while :; do sleep 100000 & wait; done
'
# shellcheck disable=SC2016
BE_CONTROLLER=$SET_UP'
    trap : TERM
    slurmctld -D >>"$ROOT/log/slurmctld.out" 2>&1 &
    touch "$ROOT/run/$NAME.ready"
    while :; do sleep 100000 & wait; done
'

# Starts a first process in namespaces of its own, and returns when it is ready.
boot() {
    local name=$1 program=$2 parent child _
    rm -f "$ROOT/run/$name.ready"
    ROOT=$ROOT NAME=$name setsid nsenter --net="/run/netns/$name" \
        unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc \
        bash -c "$program" "$name" </dev/null >"$ROOT/log/$name.out" 2>&1 &
    parent=$!
    for _ in {1..200}; do
        child=$(pgrep -P "$parent" || true)
        if [[ -n $child && -e $ROOT/run/$name.ready ]]; then
            echo "$child" >"$ROOT/run/$name.pid"
            return 0
        fi
        sleep 0.03
    done
    fail "$name did not start: $(cat "$ROOT/log/$name.out")"
}

boot_node() {
    is_up "$1" && return 0
    mkdir -p "$ROOT/spool/$1"
    ip -n "$1" link set eth0 up
    boot "$1" "$BE_NODE"
}

end_namespace() {
    local pid
    pid=$(first_pid "$1")
    [[ -n $pid ]] || fail "$1 is not up"
    kill -KILL "$pid" 2>/dev/null || true
    wait_until_gone "$pid" || echo "cluster.sh: process $pid of $1 does not end" >&2
    rm -f "$ROOT/run/$1.pid" "$ROOT/run/$1.slurmd"
}

# --------------------------------------------------------------------------------------------------- the whole cluster

require_programs() {
    [[ $(id -u) == 0 ]] || fail "needs root, for namespaces"
    local program
    for program in slurmctld slurmd sbatch munged sshd ssh-keygen pdsh ip unshare nsenter pgrep; do
        command -v "$program" >/dev/null || fail "$program is not installed; .ci/run lists the Debian packages"
    done
}

lay_cables() {
    local count=$1 number name
    ip netns add "$CONTROLLER"
    ip -n "$CONTROLLER" link set lo up
    ip -n "$CONTROLLER" link add bridge type bridge
    ip -n "$CONTROLLER" addr add "$NETWORK.1/24" dev bridge
    ip -n "$CONTROLLER" link set bridge up
    for ((number = 1; number <= count; number++)); do
        name=$PREFIX$number
        ip netns add "$name"
        ip -n "$CONTROLLER" link add "port$number" type veth peer name eth0 netns "$name"
        ip -n "$CONTROLLER" link set "port$number" master bridge up
        ip -n "$name" addr add "$NETWORK.$((10 + number))/24" dev eth0
    done
}

# Slurm's messages are signed by it. Outside the namespaces: they share its socket, which is a file.
start_munge() {
    (umask 077 && head -c 128 /dev/urandom >"$ROOT/etc/munge.key")
    setsid munged --foreground --force --key-file="$ROOT/etc/munge.key" --socket="$ROOT/run/munge.socket" \
        --pid-file="$ROOT/run/munged.pidfile" --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/state/munge.seed" \
        --num-threads=2 </dev/null >"$ROOT/log/munged.out" 2>&1 &
    echo $! >"$ROOT/run/munged.pid"
    local _
    for _ in {1..200}; do
        [[ -S $ROOT/run/munge.socket ]] && return 0
        sleep 0.02
    done
    fail "munged did not start: $(cat "$ROOT/log/munged.out")"
}

wait_until_idle() {
    local count=$1 _
    for _ in {1..300}; do
        [[ $(inside "$CONTROLLER" sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l) == "$count" ]] && return 0
        sleep 0.1
    done
    inside "$CONTROLLER" sinfo -N -l >&2 || true
    fail "the nodes are not idle; logs: $ROOT/log"
}

start() {
    local count=${1:-2} number name
    require_programs
    [[ ! -e $ROOT/run/count ]] || fail "there is a cluster in $ROOT already; stop it first"
    rm -rf "${ROOT:?}"/{etc,log,ssh}
    install -d -m 0755 "$ROOT" "$ROOT"/{etc,run,state,spool,log,dev} /run/sshd /etc/slurm
    install -d -m 0700 "$ROOT/ssh"
    echo "$count" >"$ROOT/run/count"
    # whatever goes wrong from here on, nothing is left behind
    trap 'stop >/dev/null' EXIT
    write_slurm_settings "$count"
    write_network_settings "$count"
    write_ssh_settings
    for ((number = 0; number < GPUS; number++)); do
        mknod -m 666 "$ROOT/dev/nvidia$number" c 1 3 # /dev/null under another name
    done
    lay_cables "$count"
    start_munge
    boot "$CONTROLLER" "$BE_CONTROLLER"
    for name in $(node_names); do
        boot_node "$name"
    done
    wait_until_idle "$count"
    if [[ -n ${CLUSTER_OWNER:-} ]]; then
        # shellcheck disable=SC2016  # its own arguments
        setsid bash -c 'tail --pid="$1" -f /dev/null; "$0" stop' "$(realpath "$0")" "$CLUSTER_OWNER" </dev/null >/dev/null 2>&1 &
        echo $! >"$ROOT/run/watcher.pid"
    fi
    trap - EXIT
    node_names
}

stop() {
    local name pid names
    names="$(node_names) $CONTROLLER"
    for name in $names; do
        is_up "$name" && end_namespace "$name"
    done
    pid=$(cat "$ROOT/run/munged.pid" 2>/dev/null || true)
    [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true
    for name in $names; do
        ip netns del "$name" 2>/dev/null || true
    done
    pid=$(cat "$ROOT/run/watcher.pid" 2>/dev/null || true)
    # the logs stay
    rm -rf "${ROOT:?}"/{state,spool,run,dev}
    # a session of its own; last, since it may be the watcher who stops
    [[ -z $pid ]] || kill -TERM -- "-$pid" 2>/dev/null || true
}

shape() {
    local name
    for name in $(node_names); do
        if [[ $1 == none ]]; then
            ip netns exec "$name" tc qdisc del dev eth0 root 2>/dev/null || true
        else
            # burst: what the kernel may send at once, at least rate / 250 Hz, else the rate is not reached
            ip netns exec "$name" tc qdisc replace dev eth0 root tbf rate "$1" burst 512kb latency 100ms
        fi
    done
}

command=${1:-}
[[ $# == 0 ]] || shift
case $command in
    start) start "$@" ;;
    stop) stop ;;
    ctl) inside "$CONTROLLER" "$@" ;;
    on) inside "$@" ;;
    kill) end_namespace "$1" ;;
    crash)
        ip -n "$1" link set eth0 down # first: the kernel of a dead namespace would still close its connections
        end_namespace "$1"
        ;;
    up) boot_node "$1" ;;
    cut) ip -n "$1" link set eth0 down ;;
    heal) ip -n "$1" link set eth0 up ;;
    kill-slurmd) inside "$1" kill -KILL "$(cat "$ROOT/run/$1.slurmd")" ;;
    start-slurmd) kill -USR1 "$(first_pid "$1")" ;;
    shape) shape "$1" ;;
    *)
        sed -n '2,23s/^# \{0,1\}//p' "$0" >&2
        exit 2
        ;;
esac
