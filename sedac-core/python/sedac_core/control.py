"""Turning SEDAC's knobs in a running server: what may be asked for, the admin call, and its way to every worker.

    GET  /sedac                                     what is in force
    POST /sedac {"exit_rates": [0.2, 0.4, 0.6]}     other target rates; also thresholds, adaptive, enabled, log_lambda

What lies beyond a certificate is refused unless "beyond_certificate": true stands beside it, which gives the certificate up.

sedac_start_server.py --admin puts `Admin` in front of vLLM's server and `Worker` into its workers. The call needs the server's
own API key, and comes from this machine unless SEDAC_ADMIN says otherwise. vLLM hands it to all workers between two steps,
nothing is compiled anew, and KV blocks computed under the old settings are dropped: requests that run are computed again.
"""

import dataclasses
import hmac
import ipaddress
import json
import math
import os
from collections.abc import Awaitable, Callable
from typing import Any

from .cli import SedacError
from .settings import DEFAULTS

PATH = "/sedac"
BEYOND = 'stay within the certificate, or give it up with "beyond_certificate": true'
MAX_BODY = 1 << 16  # bytes


@dataclasses.dataclass(frozen=True)
class Change:
    """What one admin call changes; None stays as it is."""

    enabled: bool | None = None
    adaptive: bool | None = None
    thresholds: tuple[float, ...] | None = None
    exit_rates: tuple[float, ...] | None = None
    log_lambda: float | None = None
    beyond_certificate: bool | None = None  # thresholds or log_lambda may lie beyond the certified ones

    @classmethod
    def parse(cls, asked: Any) -> "Change":
        """From a JSON object; `SedacError` says what was expected."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(asked, dict) or not asked or set(asked) - set(names):
            raise SedacError(
                f"give a JSON object with one or more of {', '.join(names)}, found {json.dumps(asked)[:200]}"
            )
        for name in ("enabled", "adaptive", "beyond_certificate"):
            if not isinstance(asked.get(name, True), bool):
                raise SedacError(f"{name} is true or false, found {asked[name]!r}")
        numbers = {}
        for name in ("thresholds", "exit_rates"):
            if name in asked:
                numbers[name] = _numbers(asked[name])
                if numbers[name] is None or any(value < 0 for value in numbers[name]):
                    raise SedacError(f"{name} are numbers from 0 on, one for each checkpoint, found {asked[name]!r}")
        rates = numbers.get("exit_rates")
        if rates and (list(rates) != sorted(rates) or rates[-1] > 1):
            raise SedacError(f"exit_rates lie from 0 to 1 and do not fall, found {asked['exit_rates']!r}")
        if "log_lambda" in asked:
            (numbers["log_lambda"],) = _numbers([asked["log_lambda"]]) or (math.nan,)
            if not math.isfinite(numbers["log_lambda"]):
                raise SedacError(f"log_lambda is a finite number, found {asked['log_lambda']!r}")
        if "thresholds" in asked and (rates or asked.get("adaptive")):
            raise SedacError("thresholds are fixed, exit_rates and adaptive move them: give one or the other")
        if asked.get("beyond_certificate") and not {"thresholds", "log_lambda"} & set(asked):
            raise SedacError("beyond_certificate goes with thresholds or log_lambda, and adaptive ones never exceed it")
        if rates and asked.get("adaptive") is False:
            raise SedacError("exit_rates are followed by adaptive thresholds: leave adaptive out, or true")
        return cls(**{**asked, **numbers})


def _numbers(given: Any) -> tuple[float, ...] | None:
    """A list of numbers; `inf` may be written as a string, which JSON has no number for."""
    given = [math.inf if value == "inf" else value for value in given] if isinstance(given, list) else []
    if not given or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in given):
        return None
    numbers = tuple(map(float, given))
    return None if any(map(math.isnan, numbers)) else numbers


class Worker:
    """What vLLM's --worker-extension-cls adds to each worker."""

    def sedac_control(self, asked: str) -> dict[str, Any]:
        """Apply a change, or with an empty string only tell: before and now, or the error in one sentence."""
        from .vllm_requests import runtimes_of

        runtime = next(iter(runtimes_of(self.vllm_config)), None)  # type: ignore[attr-defined]
        if runtime is None:
            return {"error": "SEDAC is not in this model: start the server with SEDAC_ENABLED=1"}
        before = runtime.state()
        try:
            if asked:
                runtime.change(Change.parse(json.loads(asked)))
        except SedacError as error:
            return {"error": str(error)}
        return {"before": before, "now": runtime.state()}


Scope, Send = dict[str, Any], Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Admin:
    """ASGI middleware, vLLM's --middleware: answers PATH, and passes everything else on."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]):
        self.app = app
        self.anywhere = os.environ.get("SEDAC_ADMIN", DEFAULTS["SEDAC_ADMIN"]) == "anywhere"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) != PATH:
            return await self.app(scope, receive, send)
        status, answer = await self.answer(scope, receive)
        body = json.dumps(answer).encode() + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def answer(self, scope: Scope, receive: Receive) -> tuple[int, dict[str, Any]]:
        state = scope["app"].state
        if not self.anywhere and not from_here(scope):
            return 403, {"error": "the admin call is for this machine alone (SEDAC_ADMIN)"}
        keys = [key for key in (state.args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        if not keys:
            return 403, {"error": "the admin call needs the server's API key: start it with --api-key or VLLM_API_KEY"}
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not sum(hmac.compare_digest(given, b"Bearer " + key.encode()) for key in keys):
            return 401, {"error": "Unauthorized"}
        if scope["method"] not in ("GET", "POST"):
            return 405, {"error": "GET tells what is in force, POST changes it"}
        asked = ""
        if scope["method"] == "POST":
            try:
                asked = (await read(receive)).decode()
                Change.parse(json.loads(asked))
            except SedacError as error:
                return 400, {"error": str(error)}
            except (ValueError, RecursionError) as error:
                return 400, {"error": f"the body is no JSON ({error})"}
        found = await state.engine_client.collective_rpc("sedac_control", args=(asked,))
        errors = [told["error"] for told in found if "error" in told]
        if errors:
            return 400, {"error": errors[0]}
        if asked:
            try:
                await state.engine_client.reset_prefix_cache(reset_running_requests=True)
            except Exception as error:  # whatever the engine says, the caller must know where things stand
                said = f"settings changed, but blocks of the old ones are still cached ({error}): make the call again"
                return 500, {"error": said, **found[0]}
            return 200, {"workers": len(found), **found[0]}
        return 200, {"workers": len(found), "now": found[0]["now"]}


def from_here(scope: Scope) -> bool:
    """Whether the caller is on this machine; a Unix socket's is."""
    client = scope.get("client")
    try:
        return not client or not client[0] or ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise SedacError(f"the body has more than {MAX_BODY} bytes")
    return body
