"""Read your writes across requests: the client carries what it must see."""

from __future__ import annotations

import base64
import dataclasses
import hmac
import json
import math
import time
from typing import TYPE_CHECKING

from asgi_uow._databases.configuration import check
from asgi_uow.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from asgi_uow._databases.engines import Engines
    from asgi_uow._decision import Headers

READ_FROM_WRITER = ""  # the position of a write whose position could not be learnt
SHORTEST_SECRET = 16
LONGEST_TOKEN = 4096  # bytes of a cookie's name and value that browsers keep
CLOCK_SKEW = 5.0  # seconds by which the clocks of two application servers may differ


@dataclasses.dataclass(frozen=True, slots=True)
class CausalReads:
    """A client that wrote sees its writes in its next requests, on replicas too.

    The response to a request that wrote carries a signed token that says how far a
    replica must be; the client's later requests bring it back. It is signed, not
    encrypted: it shows positions in the database's log, and no data.

    `secret`: at least 16 bytes, the same in every process. Of several the first
    signs and all are accepted, so that a secret can be replaced.
    `wait`: seconds for a replica to get there; after them the writer is read.
    `max_age`: seconds after a write for which this is done.
    `cookie`: the name of the cookie; applications on one host need different ones.
    `header`: the name of a request and response header to use instead of a cookie;
    the client sends back the last value it got.
    `clock`: gives the time in seconds since 1970.

    Raises `ConfigurationError` for a short secret and for options that cannot work.
    """

    secret: dataclasses.InitVar[str | bytes | Sequence[str | bytes]]
    _: dataclasses.KW_ONLY
    wait: float = 1.0
    max_age: float = 60.0
    cookie: str = "asgi_uow"
    header: str | None = None
    clock: Callable[[], float] = dataclasses.field(default=time.time, repr=False)
    _keys: tuple[bytes, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self, secret: str | bytes | Sequence[str | bytes]) -> None:
        object.__setattr__(self, "_keys", _keys(secret))
        options = {"wait": self.wait, "max_age": self.max_age, "cookie": self.cookie}
        check(options if self.header is None else {**options, "header": self.header})

    def positions(self, headers: Headers) -> dict[str, str]:
        """Read the positions in a request's valid tokens, by name of the database."""
        tokens = filter(None, map(self._open, self._tokens(headers)))
        found: dict[str, str] = {}
        for _, positions in sorted(tokens, key=lambda token: token[0]):
            found |= positions
        return found

    def names(self, db: Engines) -> list[str]:
        """Name a database, by each secret; without one its address cannot be tried."""
        message = b"asgi_uow.CausalReads.database:" + db.place.encode()
        digests = (hmac.digest(key, message, "sha256") for key in self._keys)
        return [_encode(digest)[:8].decode() for digest in digests]

    def merge(
        self, old: Mapping[str, str], new: Mapping[Engines, str]
    ) -> dict[str, str]:
        """Join positions; of one database the new, which is beyond the old."""
        return {**old, **{name: new[db] for db in new for name in self.names(db)}}

    def response_header(
        self, positions: Mapping[str, str], *, secure: bool
    ) -> tuple[bytes, bytes]:
        """Make the header that gives the client `positions`, by name of the database.

        `secure`: by https only. What is too long for a cookie is `READ_FROM_WRITER`.
        """
        token = self._seal(positions)
        if not self._fits(token):
            token = self._seal(dict.fromkeys(positions, READ_FROM_WRITER))
        if self.header is not None:
            return self._name, token
        attributes = f"; Max-Age={math.ceil(self.max_age)}; Path=/"
        attributes += "; HttpOnly; SameSite=Lax" + "; Secure" * secure
        return b"set-cookie", self._name + b"=" + token + attributes.encode()

    @property
    def _name(self) -> bytes:
        return (self.header.lower() if self.header else self.cookie).encode()

    def _tokens(self, headers: Headers) -> Iterator[bytes]:
        # There may be several headers, and other cookies.
        for name, value in headers:
            if self.header is not None and name.lower() == self._name:
                yield from (token.strip() for token in value.split(b","))
            elif self.header is None and name.lower() == b"cookie":
                for pair in value.split(b";"):
                    key, _, token = pair.partition(b"=")
                    if key.strip() == self._name:
                        yield token.strip()

    def _seal(self, positions: Mapping[str, str]) -> bytes:
        token = [round(self.clock(), 3), dict(positions)]
        payload = _encode(json.dumps(token, separators=(",", ":")).encode())
        return payload + b"." + self._sign(self._keys[0], payload)

    def _open(self, token: bytes) -> tuple[float, dict[str, str]] | None:
        payload, _, signature = token.partition(b".")
        signatures = (self._sign(key, payload) for key in self._keys)
        are_equal = (hmac.compare_digest(each, signature) for each in signatures)
        if not (self._fits(token) and any(are_equal)):
            return None
        padded = payload + b"=" * (-len(payload) % 4)
        issued, positions = json.loads(base64.urlsafe_b64decode(padded))
        is_current = -CLOCK_SKEW <= self.clock() - issued <= self.max_age
        return (issued, positions) if is_current else None

    def _sign(self, key: bytes, payload: bytes) -> bytes:
        # Keeps apart what else is signed with the secret, or a payload of another form.
        message = b"asgi_uow.CausalReads.2:" + self._name + b":" + payload
        return _encode(hmac.digest(key, message, "sha256"))

    def _fits(self, token: bytes) -> bool:
        return len(self._name) + len(b"=") + len(token) <= LONGEST_TOKEN


@dataclasses.dataclass(frozen=True, slots=True)
class MustSee:
    """What the client of a request has written before, and must see."""

    positions: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    seconds: float = 0.0
    names: Callable[[Engines], Sequence[str]] = lambda _: ()

    def position(self, db: Engines) -> str | None:
        found = map(self.positions.get, self.names(db) if self.positions else ())
        return next((each for each in found if each is not None), None)


def _keys(secret: object) -> tuple[bytes, ...]:
    keys: list[bytes] = []
    for each in secret if isinstance(secret, (list, tuple)) else [secret]:
        key = each.encode(errors="surrogatepass") if isinstance(each, str) else each
        keys.append(key if isinstance(key, bytes) else b"")  # too short
    if min(map(len, keys), default=0) < SHORTEST_SECRET:
        message = f"CausalReads(secret): pass at least {SHORTEST_SECRET} bytes, "
        raise ConfigurationError(message + "such as secrets.token_hex().")
    return tuple(keys)


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
