"""Client of a policy server: connect, ask for actions, survive a dropped connection.

    client = PolicyClient("ws://127.0.0.1:8000")
    chunks = ActionChunks(client, execute_steps=1)
    client.reset()                                   # a new episode: the server forgets its history
    action = chunks.act(lambda: {"observation/image": draw(), "prompt": "lift the red block"})

Works with websockets 12 to 17 on Python 3.8 and later, with this project's server and with any
other that speaks openpi's wire (metadata on connection, then msgpack request and reply).
"""

from __future__ import annotations

import inspect
import ipaddress
import logging
import os
import socket as sockets
import time
import urllib.request
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterable, Optional
from urllib.parse import urlsplit

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.sync.client import connect

from eval_servers import wire

log = logging.getLogger(__name__)

RESET_REPLY = "reset successful"  # RoboArena's answer to the "reset" endpoint
API_KEY = "VLA_API_KEY"  # environment variable; `launch/serve.py` reads the same


class PolicyServerError(RuntimeError):
    """The server refused the request, cannot be reached, or is no policy server."""


class SessionLostError(RuntimeError):
    """The connection dropped and is up again, but the server has forgotten the episode so far.

    The history went with the connection, so the episode must start over.
    """


class PolicyClient:
    """One connection, and so one session, on a policy server.

    Attributes:
        metadata: what the server says of its policy (model, cameras, chunk, action_dim, ...).
    """

    def __init__(
        self,
        uri: str,
        connect_timeout: float = 60.0,
        request_timeout: float = 300.0,
        api_key: Optional[str] = None,
    ) -> None:
        """Connect, waiting for the server to come up.

        Args:
            uri: ws://host:port
            connect_timeout: seconds to wait for the server, here and after a dropped connection.
            request_timeout: seconds to wait for one reply.
            api_key: of servers that want one; None takes it from the environment.

        Raises:
            PolicyServerError: if no policy server answers within `connect_timeout`, or the key is
                not the server's.
        """
        if urlsplit(uri).scheme not in ("ws", "wss"):
            raise PolicyServerError("server {!r}: write it as ws://host:port".format(uri))
        self.uri = uri
        self.metadata: Dict[str, Any] = {}
        self._connect_timeout = connect_timeout
        self._request_timeout = request_timeout
        self._options = _connect_options(uri)
        # An empty string means "send no key", even where the environment holds one.
        key = os.environ.get(API_KEY, "") if api_key is None else api_key
        if key:
            self._options["additional_headers"] = {"Authorization": "Api-Key " + key}
        self._socket: Any = None
        self._greeting = b""
        self._connect()

    def infer(self, obs: Dict[str, Any]) -> Dict[str, Any]:
        """Actions for one observation: {"actions": float32 [f, a] in robot units, ...}.

        Args:
            obs: flat, with openpi's keys: "observation/image" uint8 [h, w, 3], ..., "prompt" str.

        Raises:
            SessionLostError: the connection dropped; it is up again, with an empty history.
            PolicyServerError: the server refused the observation, or cannot be reached.
        """
        reply = self._request(obs)
        # In answer to an observation text is an error report: actions come as binary.
        if isinstance(reply, str):
            self.close()
            raise PolicyServerError("the policy server refused: {}".format(reply))
        decoded = wire.unpack(reply)
        if not isinstance(decoded, dict) or "actions" not in decoded:
            raise PolicyServerError("the server's reply has no 'actions'; is it a policy server?")
        return decoded

    def reset(self) -> None:
        """Start an episode: the server drops this connection's history.

        Raises:
            SessionLostError, PolicyServerError: as `infer`. After the first the history is empty
                all the same.
        """
        reply = self._request({"endpoint": "reset"})
        # A server that ignores "reset" would mix the histories of two episodes without an error.
        if reply != RESET_REPLY:
            self.close()
            text = reply if isinstance(reply, str) else "{} bytes".format(len(reply))
            raise PolicyServerError("the server does not know 'reset': {}".format(text))

    def unfit(self, instructions: Iterable[str]) -> Dict[str, str]:
        """Return those instructions that the policy cannot be told, each with the reason.

        {} from a server that does not offer to check them.

        Raises:
            SessionLostError, PolicyServerError: as `infer`.
        """
        if "check" not in self.metadata.get("endpoints", ()):
            return {}
        reply = self._request({"endpoint": "check", "instructions": sorted(set(instructions))})
        if isinstance(reply, str):
            self.close()
            raise PolicyServerError("the policy server refused: {}".format(reply))
        return dict(wire.unpack(reply)["unfit"])

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _request(self, message: Dict[str, Any]) -> Any:
        data = wire.pack(message)
        socket = self._socket or self._connect()
        try:
            socket.send(data)
            return socket.recv(timeout=self._request_timeout)
        except TimeoutError:
            self.close()
            raise PolicyServerError(
                "no reply from {} within {:g} s".format(self.uri, self._request_timeout)
            ) from None
        except (ConnectionClosed, OSError) as error:
            # A server that refuses closes at once, so sending may fail before its reason was read.
            refusal = _last_words(socket)
            self.close()
            if refusal:
                raise PolicyServerError("the policy server refused: {}".format(refusal)) from None
            log.warning("connection to %s dropped: %s", self.uri, error)
            self._connect()
            raise SessionLostError(
                "the connection to {} dropped ({}); it is up again, but the history of this"
                " episode is gone: start it over".format(self.uri, error)
            ) from None

    def _connect(self) -> Any:
        # The pause doubles up to 2 s: quick for a server about to listen, cheap for one that
        # compiles.
        deadline, pause, reason = time.monotonic() + self._connect_timeout, 0.1, ""
        while True:
            left, socket = max(deadline - time.monotonic(), 0.1), None
            try:
                socket = connect(self.uri, open_timeout=min(left, 10.0), **self._options)
                _keep_alive(socket.socket)
                greeting: Any = socket.recv(timeout=10.0)
                metadata = wire.unpack(greeting)
                break
            except InvalidURI as error:
                raise PolicyServerError("server {!r}: {}".format(self.uri, error)) from None
            except (OSError, ConnectionClosed, InvalidHandshake, EOFError) as error:
                if isinstance(error, InvalidStatus) and error.response.status_code == 401:
                    raise PolicyServerError(
                        "{} wants its API key: set {}".format(self.uri, API_KEY)
                    ) from None
                # Not up yet, starting, full (HTTP 503): all of these may pass.
                reason = str(error) or type(error).__name__
            except (ValueError, TypeError) as error:
                raise PolicyServerError(
                    "{} answers, but not as a policy server: {}".format(self.uri, error)
                ) from None
            if socket is not None:  # one that never greets would keep a session of the server's
                socket.close()
            if time.monotonic() + pause > deadline:
                raise PolicyServerError(
                    "no policy server at {} after {:g} s ({}); start one with: vla serve"
                    " --checkpoint=DIR --port={}{}".format(
                        self.uri,
                        self._connect_timeout,
                        reason,
                        urlsplit(self.uri).port or 80,
                        _proxy_hint(self.uri),
                    )
                )
            time.sleep(pause)
            if pause < 2.0 <= 2 * pause:  # once, and not of a server that is about to listen
                log.warning(
                    "waiting up to %g s for %s: %s", self._connect_timeout, self.uri, reason
                )
            pause = min(2 * pause, 2.0)
        # Half of a score must not come from another policy that was started on the same port.
        if self._greeting not in (b"", greeting):
            socket.close()
            raise PolicyServerError(
                "{} now serves another policy than before: {} instead of {}".format(
                    self.uri, metadata, self.metadata
                )
            )
        self.metadata, self._greeting, self._socket = metadata, greeting, socket
        return socket


class ActionChunks:
    """Replays the first `execute_steps` actions of a chunk before asking for the next.

    Attributes:
        round_trip_ms: milliseconds of every request, measured here.
        server_ms: of the same requests, the time inside the policy, as the server reports it.
    """

    def __init__(self, client: Any, execute_steps: int = 1) -> None:
        """1 asks at every step, which is how RoboVLMs evaluates.

        Raises:
            ValueError: if `execute_steps` is not within the chunk that the server's policy gives.
        """
        chunk = client.metadata.get("chunk")
        if execute_steps < 1 or (chunk and execute_steps > chunk):
            raise ValueError(
                "execute steps: {} is not in 1..{} (the policy's chunk)".format(
                    execute_steps, chunk or "chunk"
                )
            )
        self._client = client
        self._execute_steps = execute_steps
        self._queue: Deque[np.ndarray] = deque()
        self.round_trip_ms: list = []
        self.server_ms: list = []

    def reset(self) -> None:
        """Forget the actions left over from the last episode or instruction."""
        self._queue.clear()

    def close(self) -> None:
        """Nothing is on its way between two calls of `act`."""

    def act(self, observe: Callable[[], Dict[str, Any]]) -> np.ndarray:
        """The next action, float [a].

        Args:
            observe: gives the observation to send, with the prompt; called only when the replayed
                part of the last chunk is used up.

        Raises:
            SessionLostError, PolicyServerError: as `PolicyClient.infer`.
        """
        if not self._queue:
            obs = observe()
            start = time.perf_counter()
            reply = self._client.infer(obs)
            self.round_trip_ms.append((time.perf_counter() - start) * 1e3)
            infer_ms: Optional[float] = reply.get("server_timing", {}).get("infer_ms")
            if infer_ms is not None:
                self.server_ms.append(float(infer_ms))
            actions = np.asarray(reply["actions"])
            # A chunk that is too short would make the robot re-plan more often than the protocol
            # says.
            if actions.ndim != 2 or len(actions) < self._execute_steps:
                raise PolicyServerError(
                    "the server sent actions of shape {}; expected [at least {}, action"
                    " dimension]".format(actions.shape, self._execute_steps)
                )
            self._queue.extend(actions[: self._execute_steps])
        return self._queue.popleft()


def _last_words(socket: Any) -> str:
    """The text frame of a server that closed while this side was still sending, or ""."""
    try:
        reply = socket.recv(timeout=1.0)
    except (ConnectionClosed, OSError):
        return ""
    return reply if isinstance(reply, str) else ""


def _keep_alive(socket: Any) -> None:
    """Let the kernel find out within a minute that a cable was cut or a machine lost its power.

    It probes the other kernel, which answers however long its process computes.
    """
    socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
    # Seconds of silence, seconds between probes, probes; milliseconds for what was sent.
    for name, value in (
        ("TCP_KEEPIDLE", 20),
        ("TCP_KEEPINTVL", 10),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", 60000),
    ):
        option = getattr(sockets, name, None)  # not every system has every one
        if option is not None:
            socket.setsockopt(sockets.IPPROTO_TCP, option, value)


def _connect_options(uri: str) -> Dict[str, Any]:
    """Arguments of `connect` that exist in the installed websockets (12 to 17)."""
    parameters = inspect.signature(connect).parameters
    # One observation may exceed the default limit of 1 MiB; compressing it takes time a step.
    options: Dict[str, Any] = {"compression": None, "max_size": None}
    if "ping_interval" in parameters:
        # `request_timeout` watches the server instead: some servers of this wire block their
        # event loop while they compile, and would be given up on.
        options["ping_interval"] = None
    # No proxy of the environment can reach this machine's own addresses.
    if "proxy" in parameters and _is_loopback(urlsplit(uri).hostname or ""):
        options["proxy"] = None
    if "legacy" in parameters:
        options["legacy"] = True
    return options


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _proxy_hint(uri: str) -> str:
    """What to try when a proxy of the environment stands between client and server; else ""."""
    host = urlsplit(uri).hostname or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get("http") or proxies.get("all")
    if not proxy:
        return ""
    return "; the environment's proxy {} may be in between: set no_proxy={}".format(proxy, host)
