"""Connect the ranks of a run to each other, and form their process group."""

import contextlib
import datetime
import fcntl
import os
import socket
import struct
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist

from distributed.launch import Launch, LaunchError
from utils import log, one_line

# Timeout of collective operations, as a multiple of the watchdog's. The watchdog must act first,
# because it knows which rank hangs.
COLLECTIVE_TIMEOUT_FACTOR = 10

RESOLVE_ATTEMPTS = 3  # of a host name, a second apart


class Rendezvous(NamedTuple):
    """What the ranks share once they are connected."""

    store: dist.Store  # with the keys of this start only
    group: dist.ProcessGroup | None = None  # of gloo; None: the default group, or a single rank
    launcher_store: dist.Store | None = None  # torchrun's, which outlives its processes


def join_group(launch: Launch, rank: int, backend: str, timeout: float) -> Rendezvous:
    """Connect to the other ranks and initialize the process group.

    timeout: of each step until all are connected, in seconds; later extend_timeout applies. Raises
    LaunchError if ranks are missing by then, or the nodes contradict each other.
    """
    limit = datetime.timedelta(seconds=timeout)
    missed = (
        f"rank {rank} of {launch.world_size} did not find the others at {launch.init_method} "
        f"within {timeout:g} s (--dist_timeout)"
    )
    host = master_host(launch)
    if host:
        check_resolves(host)
    try:
        store, prefix, launcher_store = make_store(launch, rank, limit), "run", None
        if launch.init_method == "env://":
            launcher_store = store
            prefix = agree_on_prefix(store, rank, launch.world_size, timeout)
        own_store = dist.PrefixStore(prefix, store)
        if launcher_store is None:  # torchrun, which has one, checks the nodes itself
            check_nodes_agree(own_store, launch, rank)
        if host:
            pick_gloo_interface(own_store, launch, rank, host)
        group_store = dist.PrefixStore("group", own_store)
        with end_process_after(timeout, f"{missed}: the processes cannot reach each other"):
            dist.init_process_group(
                backend, store=group_store, rank=rank, world_size=launch.world_size, timeout=limit
            )
            group = None if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, OSError) as error:
        raise LaunchError(f"{missed}: {one_line(error)}") from None
    # A separate connection: the watchdog must not wait for calls of the process group.
    return Rendezvous(dist.PrefixStore(prefix, store.clone()), group, launcher_store)


@contextlib.contextmanager
def end_process_after(timeout: float, message: str) -> Iterator[None]:
    """End the process with status 2 if the context takes longer than `timeout` seconds.

    No watchdog runs while ranks connect, and gloo retries for several times its timeout.
    """

    def end():
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def extend_timeout(rendezvous: Rendezvous, timeout: float) -> None:
    """Raise the timeout of collective operations above that of the running watchdog (seconds)."""
    extended = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_FACTOR * timeout)
    for group in {dist.group.WORLD, rendezvous.group or dist.group.WORLD}:
        dist.distributed_c10d._set_pg_timeout(extended, group)


def make_store(launch: Launch, rank: int, limit: datetime.timedelta) -> dist.Store:
    """Connect to the store of the rendezvous, which rank 0 holds unless the launcher does."""
    url = urllib.parse.urlparse(launch.init_method)
    if url.scheme == "tcp":
        # Unlike dist.rendezvous, this does not wait for world_size ranks: check_nodes_agree names
        # the nodes that are missing, or that derive another world size.
        return dist.TCPStore(
            url.hostname, url.port, is_master=rank == 0, timeout=limit, wait_for_workers=False
        )
    meeting = dist.rendezvous(launch.init_method, rank, launch.world_size, timeout=limit)
    store = next(meeting)[0]
    store.set_timeout(limit)
    return store


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """Agree with the other ranks on a prefix for the keys of this start.

    torchrun's store keeps the keys of earlier starts, and no number in the environment identifies a
    start on all nodes. So rank 0 draws a random prefix, and replies with it to every request,
    including those of earlier starts, until each rank has confirmed it.
    """
    if rank > 0:
        request = uuid.uuid4().hex
        store.set(f"request/{rank}", request)
        prefix = store.get(f"answer/{request}").decode()
        store.set(f"{prefix}/joined/{rank}", "")
        return prefix
    prefix = uuid.uuid4().hex
    missing = set(range(1, world_size))
    deadline = time.monotonic() + timeout
    while missing:
        for other in list(missing):
            if store.check([f"{prefix}/joined/{other}"]):
                missing.remove(other)
            elif store.check([f"request/{other}"]):
                request = store.get(f"request/{other}").decode()
                store.set(f"answer/{request}", prefix)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} are missing")
        time.sleep(0.1)
    return prefix


def check_nodes_agree(store: dist.Store, launch: Launch, rank: int) -> None:
    """Raise LaunchError unless all nodes are connected and have the same number of ranks.

    By default a node has a rank per GPU. If one sees fewer GPUs, the nodes derive different world
    sizes and ranks, and would fail later without naming the cause.
    """
    node, local_rank = divmod(rank, launch.nproc_per_node)
    if local_rank == 0:
        store.set(f"node/{node}", f"{launch.nproc_per_node} {socket.gethostname()}")
    keys = [f"node/{other}" for other in range(launch.world_size // launch.nproc_per_node)]
    try:
        store.wait(keys)
    except RuntimeError:
        missing = [str(number) for number, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(f"nodes that did not connect: {', '.join(missing)}") from None
    nodes = [store.get(key).decode().split(" ", 1) for key in keys]
    for number, (nproc, host) in enumerate(nodes):
        if nproc != nodes[0][0]:
            if local_rank == 0:
                store.set(f"rejected/{node}", "")
            if rank == 0:  # it holds the store, which the others must read first
                with contextlib.suppress(RuntimeError):
                    rejected = [f"rejected/{other}" for other in range(len(nodes))]
                    store.wait(rejected, datetime.timedelta(seconds=10))
            raise LaunchError(
                f"the nodes have different numbers of processes: node {number} ({host}) {nproc}, "
                f"node 0 ({nodes[0][1]}) {nodes[0][0]}; check the GPUs of both, or give "
                "--nproc_per_node"
            )


# --- hosts and network interfaces -----------------------------------------------------------------


def master_host(launch: Launch) -> str:
    """Return the name or address of the host where the ranks meet; "" if they meet in a file."""
    if launch.init_method == "env://":
        return os.environ.get("MASTER_ADDR", "")
    return urllib.parse.urlparse(launch.init_method).hostname or ""


def check_resolves(host: str) -> None:
    """Raise LaunchError if a host name has no address. A store would retry until its timeout.

    A busy name server may need a second attempt.
    """
    for attempt in range(RESOLVE_ATTEMPTS):
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
        if attempt + 1 < RESOLVE_ATTEMPTS:
            time.sleep(1)
    raise LaunchError(
        f"the rendezvous host {host} cannot be resolved here ({reason}); give "
        "--dist-url tcp://ADDRESS:PORT with an address that all nodes can reach"
    )


def pick_gloo_interface(store: dist.Store, launch: Launch, rank: int, host: str) -> None:
    """Set GLOO_SOCKET_IFNAME, if unset, to the network interface that routes to the master.

    By default gloo binds to the address of the host's own name, which on Debian is 127.0.1.1: no
    other node can reach it. The master itself uses the interface on which another node reaches it.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or launch.world_size == launch.nproc_per_node:
        return
    address = route_to(host)
    if rank == launch.nproc_per_node:  # the first one of the second node
        store.set(
            "master_address", socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
        )
    if address is None or is_loopback(address):
        address = store.get("master_address").decode()
    if interface := interface_of(address):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        log.info("gloo uses the network interface %s (%s)", interface, address)
    else:
        log.warning(
            "no network interface has the address %s; set GLOO_SOCKET_IFNAME if the nodes cannot "
            "connect",
            address,
        )


def route_to(host: str) -> str | None:
    """Return the local address from which packets to a host are sent; None without a route."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect(address)
        except OSError:
            return None
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address, IPv4 or IPv6."""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address.split("%")[0]).hex()
        with open("/proc/net/if_inet6") as lines:
            return next((line.split()[5] for line in lines if line.startswith(wanted)), None)
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(any_socket, get_address, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
