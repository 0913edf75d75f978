"""The admin call where it needs no server: who may make it. What it does is tested on a live one (test_server.py)."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest

from sedac_core.cli import SedacError
from sedac_core.control import PATH, Admin, Change


def call(
    client, monkeypatch, keys=("key",), given=b"Bearer key", mode="loopback", path=PATH, root=""
) -> tuple[int | str, dict]:
    """The status and answer of a GET; 'passed on' where the server behind gets it."""
    monkeypatch.setenv("SEDAC_ADMIN", mode)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    sent = []

    async def behind(scope, receive, send):
        sent.append({"status": "passed on", "body": b"{}"})

    async def send(message):
        sent.append(message)

    async def collective_rpc(method, args):
        assert (method, args) == ("sedac_control", ("",))
        return [{"before": {"enabled": True}, "now": {"enabled": True}}] * 2

    engine = SimpleNamespace(collective_rpc=collective_rpc)
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=list(keys)), engine_client=engine))
    scope = {"type": "http", "method": "GET", "path": root + path, "root_path": root, "client": client, "app": app}
    asyncio.run(Admin(behind)(scope | {"headers": [(b"authorization", given)]}, None, send))
    return sent[0]["status"], json.loads(sent[-1]["body"])


@pytest.mark.parametrize("client", [("127.0.0.1", 5), ("127.8.8.8", 5), ("::1", 5), None])
def test_this_machine_may_ask(client, monkeypatch):
    assert call(client, monkeypatch) == (200, {"workers": 2, "now": {"enabled": True}})


@pytest.mark.parametrize("client", [("10.0.0.7", 5), ("192.168.1.1", 5), ("testclient", 5), ("2001:db8::1", 5)])
def test_another_machine_may_not_unless_it_was_asked_for(client, monkeypatch):
    status, answer = call(client, monkeypatch)
    assert status == 403 and "this machine alone" in answer["error"]
    assert call(client, monkeypatch, mode="anywhere")[0] == 200
    assert call(client, monkeypatch, mode="anywhere", given=b"Bearer wrong")[0] == 401


def test_a_server_without_a_key_has_no_admin_call(monkeypatch):
    status, answer = call(("127.0.0.1", 5), monkeypatch, keys=())
    assert status == 403 and "needs the server's API key" in answer["error"]


def test_giving_the_certificate_up_is_said_beside_what_lies_beyond_it():
    assert Change.parse({"log_lambda": -1, "beyond_certificate": True}).beyond_certificate
    assert Change.parse({"thresholds": [1, "inf"], "beyond_certificate": False}).thresholds == (1.0, math.inf)
    for asked, sentence in (
        ({"beyond_certificate": True}, "beyond_certificate goes with thresholds or log_lambda"),
        ({"exit_rates": [0.1], "beyond_certificate": True}, "adaptive ones never exceed it"),
        ({"log_lambda": -1, "beyond_certificate": 1}, "beyond_certificate is true or false, found 1"),
    ):
        with pytest.raises(SedacError, match=sentence):
            Change.parse(asked)


def test_other_paths_are_passed_on_and_a_root_path_is_seen_through(monkeypatch):
    assert call(("10.0.0.7", 5), monkeypatch, path="/v1/models")[0] == "passed on"
    assert call(("10.0.0.7", 5), monkeypatch, path="/sedac2")[0] == "passed on"
    assert call(("127.0.0.1", 5), monkeypatch, root="/api")[0] == 200
