"""Where the server listens, whom it lets in, and how much it lets them take."""

import hmac
from dataclasses import dataclass, field

from vla_jax.serve.episodes import AUTO, seconds_of

# openpi's client sends its api_key so.
_SCHEME = "Api-Key "
UNAUTHORIZED = "send the server's API key as 'Authorization: Api-Key KEY'"


@dataclass(frozen=True)
class ServerOptions:
    """Where and how to listen.

    Attributes:
        host: interface; the default is reachable from this machine only. The wire is not
            encrypted: put anything else behind a tunnel or a proxy with TLS.
        port: 0 lets the system choose.
        max_message_bytes: larger requests are refused before they are read.
        max_sessions: clients with a history at a time; one more gets HTTP 503.
        ping_interval: seconds between keep-alive pings.
        ping_timeout: seconds without an answer after which a client counts as gone.
        max_wait: seconds a request waits at most for others that are due, to share a batch.
        idle_timeout: seconds without a request after which a session ends; 0 = never.
        open_timeout: seconds a client has for a handshake, opening or closing, and for sending
            what an HTTP request says it will.
        drain_timeout: seconds that requests have to be answered when the server is told to end;
            what starts and stops servers often kills after 30.
        wire: name of the websocket wire whose clients ask for no path of their own.
        new_episode: what begins an episode of a client that does not say so: auto, off or a number
            of seconds without a request, see `episodes`.
        api_key: what clients must send as "Authorization: Api-Key KEY"; "" lets everyone in.

    Raises:
        ValueError: listing what is illegal.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_message_bytes: int = 16 * 2**20
    max_sessions: int = 64
    ping_interval: float = 20.0
    ping_timeout: float = 20.0
    max_wait: float = 0.005
    idle_timeout: float = 1800.0
    open_timeout: float = 10.0
    drain_timeout: float = 20.0
    wire: str = "websocket"
    new_episode: str = AUTO
    api_key: str = field(default="", repr=False)

    def __post_init__(self):
        problems = []
        if not 0 <= self.port < 65536:
            problems.append(f"port: {self.port} is not in 0..65535")
        for name in ("max_message_bytes", "max_sessions", "open_timeout"):
            if getattr(self, name) <= 0:
                problems.append(f"{name}: must be positive, {getattr(self, name)} is not")
        for name in ("max_wait", "idle_timeout", "drain_timeout"):
            if getattr(self, name) < 0:
                problems.append(f"{name}: must not be negative, {getattr(self, name)} is")
        try:
            seconds_of(self.new_episode)
        except ValueError as error:
            problems.append(str(error))
        if not self.api_key.isascii() or self.api_key != "".join(self.api_key.split()):
            problems.append("api_key: must be ASCII without white space, as it travels in a header")
        if problems:
            raise ValueError("server: " + "; ".join(problems))

    def admits(self, authorization: str | None) -> bool:
        """Whether a request with this Authorization header, or none, may go on."""
        if not self.api_key:
            return True
        received, wanted = authorization or "", _SCHEME + self.api_key
        # In constant time, so that answers do not tell how much of a guess is right.
        # As bytes: of texts it takes ASCII alone, and a header may hold anything.
        return hmac.compare_digest(received.encode("utf-8", "replace"), wanted.encode())
