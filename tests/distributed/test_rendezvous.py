"""The nodes of a run connect, or report why not, on hosts like those of real clusters."""

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from distributed.launch import free_port
from distributed.rendezvous import interface_of, route_to
from tests.helpers import ROOT

MEET = [sys.executable, ROOT / "tests/distributed/meet.py"]


def meet(*nodes):
    """Run meet.py for nodes (command prefix, arguments, environment): (status, text, s) of each."""
    with ExitStack() as stack:
        began = time.monotonic()
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [*prefix, *MEET, *map(str, arguments)],
                    env={**os.environ, **env},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for prefix, arguments, env in nodes
        ]
        results = []
        for process in started:
            out, error = process.communicate(timeout=120)
            results.append((process.returncode, out + error, time.monotonic() - began))
        return results


def last_line(text):
    return text.splitlines()[-1]


def test_nodes_connect_and_sum_over_their_ranks():
    url = f"tcp://127.0.0.1:{free_port()}"
    for status, text, _ in meet(([], (0, url, 1, 60), {}), ([], (1, url, 1, 60), {})):
        assert status == 0, text
        assert "sum of the ranks: [1]" in text


def test_a_node_with_another_number_of_processes_is_named():
    url = f"tcp://127.0.0.1:{free_port()}"
    for status, text, _ in meet(([], (0, url, 1, 60), {}), ([], (1, url, 2, 60), {})):
        assert status == 2, text
        assert "error: the nodes have different numbers of processes: node 1 (" in text
        assert ") 2, node 0 (" in text
        assert "give --nproc_per_node" in text


def test_a_missing_node_is_named():
    url = f"tcp://127.0.0.1:{free_port()}"
    ((status, text, _),) = meet(([], (0, url, 1, 2), {}))
    assert status == 2
    assert last_line(text).endswith("nodes that did not connect: 1")


def test_a_host_name_without_an_address_is_an_error_at_once():
    ((status, text, seconds),) = meet(([], (1, "tcp://no-such-host.invalid:5000", 1, 300), {}))
    assert status == 2
    assert "error: the rendezvous host no-such-host.invalid cannot be resolved" in text
    assert "--dist-url" in text and len(text.splitlines()) == 1
    assert seconds < 60


def test_the_interface_of_an_address_is_found():
    assert route_to("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None


@pytest.fixture
def hosts(tmp_path):
    """Two hosts, as network namespaces with a cable, that resolve their own name to 127.0.1.1.

    Yields the prefix of commands to run on each.
    """
    names = [f"milnce{os.getpid()}-{number}" for number in (0, 1)]
    able = os.geteuid() == 0 and shutil.which("ip") and shutil.which("unshare")
    if able:
        made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True)
        able = made.returncode == 0
    if not able:
        assert not os.environ.get("MILNCE_REQUIRE_NAMESPACES"), "no network namespaces here"
        pytest.skip("needs root and network namespaces")

    def ip(text):
        subprocess.run(["ip", *text.split()], check=True)

    prefixes = []
    try:
        ip(f"netns add {names[1]}")
        ip(f"link add cable0 netns {names[0]} type veth peer name cable1 netns {names[1]}")
        for number in (0, 1):
            for command in (
                f"addr add 10.99.0.{number + 1}/24 dev cable{number}",
                f"link set cable{number} up",
                "link set lo up",
            ):
                ip(f"-n {names[number]} {command}")
            etc_hosts = tmp_path / f"hosts{number}"
            etc_hosts.write_text(
                f"127.0.0.1 localhost\n127.0.1.1 node{number}\n"
                f"10.99.0.{2 - number} node{1 - number}\n"
            )
            script = f"mount --bind {etc_hosts} /etc/hosts && hostname node{number} && exec"
            prefixes.append(
                [
                    *("ip", "netns", "exec", names[number], "unshare", "-m", "-u"),
                    *("bash", "-c", f'{script} "$@"', "bash"),
                ]
            )
        yield prefixes
    finally:
        for number in range(2):
            subprocess.run(["ip", "netns", "del", names[number]], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("master", ["10.99.0.1", "node0"])
def test_hosts_whose_own_name_is_a_loopback_address_connect(hosts, master):
    """Debian and Ubuntu set it to 127.0.1.1 in /etc/hosts, at which gloo would listen."""
    url = f"tcp://{master}:5000"
    nodes = [(prefix, (number, url, 1, 20), {}) for number, prefix in enumerate(hosts)]
    for status, text, _ in meet(*nodes):
        assert status == 0, text
        assert "sum of the ranks: [1]" in text


@pytest.mark.slow
def test_connecting_has_the_timeout_of_the_flag(hosts):
    """Collective operations have ten times as long, but only once a watchdog runs.

    Here each host listens at an address that the other cannot reach: one fails, the other waits.
    """
    url, unreachable = "tcp://10.99.0.1:5000", {"GLOO_SOCKET_IFNAME": "lo"}
    nodes = [(prefix, (number, url, 1, 10), unreachable) for number, prefix in enumerate(hosts)]
    for status, text, seconds in meet(*nodes):
        assert status == 2
        assert "did not find the others" in last_line(text)
        assert seconds < 40
