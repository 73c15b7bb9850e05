"""What a wire is: the messages of one kind of client, as requests to the policy and back.

A wire holds no connection, no history and no policy: bytes come in and a `Request` comes out, a
reply goes in and bytes come out. `serve.websocket` and `serve.rest` own the connections and treat
every wire alike.
"""

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

Message = bytes | str  # what travels in one websocket frame; POST bodies are bytes
MAX_ERROR = 2000  # characters
MAX_NAME = 200  # characters of a session's or an episode's name


def brief(error: Exception | str, limit: int = MAX_ERROR) -> str:
    """One line for a client and the log: an error may quote megabytes that the client sent."""
    # Cut first, and not quite to the limit, as runs of blanks become one below.
    # Also what no line may hold: a control character in a status line would end it.
    text = "".join(c if c.isprintable() else " " for c in str(error)[: 2 * MAX_ERROR])
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


class RequestError(ValueError):
    """A message the server cannot act on; the text goes to the client."""


@dataclass(frozen=True)
class Request:
    """One message, in the words of `vla_jax.inference.protocol`.

    Attributes:
        obs: what the policy is asked about; None where it is not asked anything.
        reset: whether an episode begins here.
        episode: name of the episode, where the client gives one: another name begins another.
        session: of wires without a lasting connection: the client's name for its history; None is
            a request that has none.
        instructions: to be checked by the policy; the reply holds `protocol.UNFIT_KEY` alone.
        answer: sent when the policy is not asked; None sends nothing.
        note: what the wire wants back when it writes the reply, such as a sequence number.
    """

    obs: dict[str, Any] | None = None
    reset: bool = False
    episode: str | None = None
    session: str | None = None
    instructions: tuple[str, ...] | None = None
    answer: Message | None = None
    note: Any = None


def episode_name(obs: dict[str, Any], *keys: str) -> str | None:
    """Take the episode's name out of an observation: any text or number under one of `keys`."""
    names = [obs.pop(key, None) for key in keys]
    name = next((name for name in names if name is not None), None)
    if isinstance(name, np.ndarray) and name.size == 1:
        name = name.item()
    if name is not None and not isinstance(name, (str, int, float, np.generic)):
        raise RequestError(f"{keys[0]}: expected a text or a number, got {type(name).__name__}")
    return None if name is None else str(name)[:MAX_NAME]


class Wire(abc.ABC):
    """The messages of one kind of client.

    Attributes:
        name: as `/metrics` counts its requests.
        path: of the URL that its clients ask for.
    """

    name: ClassVar[str]
    path: ClassVar[str]

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """`metadata` is the policy's, see `inference.protocol.Policy`."""
        self.metadata = metadata

    @abc.abstractmethod
    def read(self, message: Message) -> Request:
        """What the client wants.

        Raises:
            WireError: these bytes are not a message of this wire.
            RequestError: they are one, which asks for what does not exist.
            ObservationError: it asks for actions this policy does not give.
        """

    @abc.abstractmethod
    def write(self, request: Request, reply: dict[str, Any]) -> Message:
        """The policy's reply to `request`, as the client takes it."""

    @abc.abstractmethod
    def refuse(self, request: Request | None, error: Exception) -> Message:
        """Why there is no reply; `request` is None where the message was not even read."""


class WebsocketWire(Wire):
    """Messages on a connection that lasts: it owns one history.

    Attributes:
        answers_pings: whether its clients do, also while their simulator computes; of others that
            went away the session ends with the connection or by `idle_timeout`.
    """

    answers_pings: ClassVar[bool] = True

    @abc.abstractmethod
    def greet(self) -> Message | None:
        """What a client gets as soon as it has connected; None where it speaks first."""


class PostWire(Wire):
    """Messages as bodies of HTTP POST: each stands alone, unless it names a session."""

    content_type: ClassVar[str] = "application/json"
