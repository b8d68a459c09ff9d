"""The token with which a client reads its own writes in later requests."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from decimal import Decimal
from fractions import Fraction
from http.cookies import SimpleCookie
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_uow import CausalReads, Database
from asgi_uow.errors import ConfigurationError
from tests.support.private import LONGEST_TOKEN, READ_FROM_WRITER, MustSee

if TYPE_CHECKING:
    from asgi_uow._decision import Headers

SECRET = "a secret of many bytes"
OTHER = b"another secret of many bytes"
NOW = 1_700_000_000.123456
POSITIONS = {"shop": "0/309B998", "audit": "0-1-14,1-1-2"}


def at(now: float, **options: object) -> CausalReads:
    """The option as an application has it that runs at a time."""
    secret: str | bytes = options.pop("secret", SECRET)  # type: ignore[assignment]
    return CausalReads(secret, clock=lambda: now, **options)  # type: ignore[arg-type]


def token_of(reads: CausalReads, positions: dict[str, str] = POSITIONS) -> bytes:
    """What a client has in its jar after a response."""
    name, value = reads.response_header(positions, secure=False)
    assert b"set-cookie" == name
    return value.partition(b";")[0].partition(b"=")[2]


TOKEN = token_of(at(NOW))
in_its_own_time = settings(deadline=None, database=None)


def with_cookie(token: bytes, name: bytes = b"asgi_uow") -> Headers:
    return [(b"cookie", name + b"=" + token)]


# There and back


@in_its_own_time
@given(
    positions=st.dictionaries(st.text(max_size=9), st.text(max_size=20), max_size=5),
    now=st.floats(0, 1e11),
    header=st.sampled_from([None, "X-Position"]),
)
def test_round_trip(positions: dict[str, str], now: float, header: str | None) -> None:
    """What a response gives, a later request brings back."""
    reads = at(now, header=header)
    name, value = reads.response_header(positions, secure=True)
    request = {b"set-cookie": b"cookie"}.get(name, name)
    assert positions == reads.positions([(request, value.partition(b";")[0])])


@pytest.mark.parametrize(
    "headers",
    [
        [(b"cookie", b"a=1; asgi_uow=" + TOKEN + b"; b=2")],
        [(b"cookie", b"a=1;asgi_uow=" + TOKEN + b";b=2")],
        [(b"cookie", b"a=1"), *with_cookie(TOKEN), (b"cookie", b"b=2")],
        [(b"Cookie", b"asgi_uow = " + TOKEN + b" ")],
        [(b"cookie", b"; =; a; =a; asgi_uow; asgi_uow=; asgi_uow=" + TOKEN)],
        [(b"cookie", b"\xff\x00=\xfe; asgi_uow=" + TOKEN)],
        [(b"cookie", b"asgi_uow=forged; asgi_uow=" + TOKEN + b"; asgi_uow=x.y")],
    ],
)
def test_among_others(headers: Headers) -> None:
    """The cookie is found among others, in one header or several."""
    assert POSITIONS == at(NOW).positions(headers)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"cookie", b"")],
        with_cookie(TOKEN, b"asgi_uow2"),
        with_cookie(TOKEN, b"asgi"),
        with_cookie(TOKEN, b"ASGI_UOW"),
        with_cookie(TOKEN, b"x=asgi_uow"),
        [(b"set-cookie", b"asgi_uow=" + TOKEN)],
        [(b"asgi_uow", TOKEN)],
    ],
)
def test_no_token(headers: Headers) -> None:
    """Without the cookie there are no positions."""
    assert {} == at(NOW).positions(headers)


@pytest.mark.parametrize("newest_first", [False, True])
def test_several_tokens(newest_first: bool) -> None:
    """Of several tokens all count; for one database the one that was given last."""
    older = token_of(at(NOW - 1), {"shop": "0/1", "audit": "0/2"})
    newer = token_of(at(NOW), {"shop": "0/3"})
    headers = [*with_cookie(older), *with_cookie(newer)]
    if newest_first:
        headers.reverse()
    assert {"shop": "0/3", "audit": "0/2"} == at(NOW).positions(headers)


def database(host: str) -> Database:
    return Database.from_url(f"postgresql://{host}/shop")


def test_merge() -> None:
    """A new position replaces the old one of its database, an unknown one too."""
    reads = at(NOW)
    known, unknown, new = map(database, ("10.0.0.1", "10.0.0.2", "10.0.0.3"))
    old = reads.merge({"a": "1"}, {known: "1", unknown: READ_FROM_WRITER})
    before = dict(old)
    merged = reads.merge(old, {known: READ_FROM_WRITER, unknown: "2", new: "2"})
    names = [reads.names(db)[0] for db in (known, unknown, new)]
    assert {"a": "1", **dict(zip(names, ["", "2", "2"], strict=True))} == merged
    assert before == old


def test_names() -> None:
    """Where a database is cannot be tried without the secret; all with it agree."""
    db, other = database("10.0.0.5"), database("10.0.0.6")
    [name] = at(NOW).names(db)
    assert [name] == at(NOW + 9).names(database("10.0.0.5"))
    assert [name] != at(NOW).names(other)
    assert [name] != at(NOW, secret=OTHER).names(db)
    assert hashlib.sha256(db.place.encode()).hexdigest()[:8] != name
    secret_and_place = SECRET.encode() + db.place.encode()
    assert hashlib.sha256(secret_and_place).hexdigest()[:8] != name


def test_names_while_a_secret_is_replaced() -> None:
    """What a client wrote before and after is found by whoever knows a secret of it."""
    db = database("10.0.0.5")
    old, both, new = (
        at(NOW, secret=secret) for secret in (SECRET, [OTHER, SECRET], OTHER)
    )
    before = with_cookie(token_of(old, old.merge({}, {db: "0/1"})))
    assert "0/1" == seen(both, before, db)
    positions = both.merge(both.positions(before), {db: "0/2"})
    between = with_cookie(token_of(both, positions))
    turned = at(NOW, secret=[SECRET, OTHER])
    assert ["0/2"] * 3 == [seen(each, between, db) for each in (both, turned, new)]
    assert seen(both, before, database("10.0.0.6")) is None


def seen(reads: CausalReads, headers: Headers, db: Database) -> str | None:
    """Give what a request must see of a database."""
    return MustSee(reads.positions(headers), reads.wait, reads.names).position(db)


# The response


@pytest.mark.parametrize("secure", [True, False])
def test_cookie(secure: bool) -> None:
    """Scripts and other sites' forms do not get the cookie; https keeps it there."""
    reads = at(NOW, cookie="seen", max_age=30.5)
    name, value = reads.response_header(POSITIONS, secure=secure)
    assert b"set-cookie" == name
    cookie = SimpleCookie(value.decode())
    assert ["seen"] == list(cookie)
    attributes = {key: kept for key, kept in cookie["seen"].items() if kept}
    expected = {"path": "/", "max-age": "31", "httponly": True, "samesite": "Lax"}
    assert expected | ({"secure": True} if secure else {}) == attributes
    token = cookie["seen"].value.encode()
    assert re.fullmatch(rb"[\w-]+\.[\w-]+", token)  # nothing to quote
    assert POSITIONS == reads.positions(with_cookie(token, b"seen"))


def test_header() -> None:
    """With a header there is no cookie in either direction."""
    reads = at(NOW, header="X-Position")
    name, value = reads.response_header(POSITIONS, secure=True)
    assert b"x-position" == name
    assert POSITIONS == reads.positions([(b"x-position", value)])
    assert POSITIONS == reads.positions([(b"X-Position", b"old.one, " + value)])
    assert {} == reads.positions([(b"cookie", b"asgi_uow=" + value)])
    assert {} == reads.positions([(b"cookie", b"x-position=" + value)])


def test_too_long() -> None:
    """Positions that are too long for a cookie send the reads to the writer."""
    reads = at(NOW)
    token = token_of(reads, {"shop": "0-1-1," * 1000, "audit": "0/1"})
    writer = {"shop": READ_FROM_WRITER, "audit": READ_FROM_WRITER}
    assert writer == reads.positions(with_cookie(token))


def test_longest() -> None:
    """A token is as long as a browser keeps it, and not longer."""
    reads = at(NOW)
    empty = len(token_of(reads, {"shop": ""}))
    room = LONGEST_TOKEN - len("asgi_uow=") - empty
    position = "9" * (room // 4 * 3)
    token = token_of(reads, {"shop": position})
    assert LONGEST_TOKEN - 4 <= len(b"asgi_uow=" + token) <= LONGEST_TOKEN
    assert {"shop": position} == reads.positions(with_cookie(token))
    longer = token_of(reads, {"shop": position + "9999"})
    assert {"shop": ""} == reads.positions(with_cookie(longer))


# Refused


def resealed(payload: object) -> bytes:
    """The token with other contents under the old signature."""
    body = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=")
    return body + b"." + TOKEN.partition(b".")[2]


BODY, _, SIGNATURE = TOKEN.partition(b".")
TAMPERED = {
    "empty": b"",
    "dot": b".",
    "no signature": BODY,
    "empty signature": BODY + b".",
    "no payload": b"." + SIGNATURE,
    "swapped": SIGNATURE + b"." + BODY,
    "short signature": TOKEN[:-1],
    "long signature": TOKEN + b"A",
    "padded": TOKEN + b"=",
    "other case": BODY + b"." + SIGNATURE.swapcase(),
    "other position": resealed([NOW, {"shop": "FFFFFFFF/FFFFFFFF"}]),
    "renewed": resealed([NOW + 1, POSITIONS]),
    "another shape": resealed({"shop": []}),
    "not base64": b"$$$$." + SIGNATURE,
    "not text": b"\xff\xfe." + SIGNATURE,
    "zero bytes": b"\0" * 40 + b"." + SIGNATURE,
    "two dots": BODY + b".." + SIGNATURE,
    "too long": BODY + b"A" * LONGEST_TOKEN + b"." + SIGNATURE,
    "much too long": b"A" * 1_000_000,
    "quoted": b'"' + TOKEN + b'"',
}


@pytest.mark.parametrize("token", TAMPERED.values(), ids=TAMPERED.keys())
def test_tampered(token: bytes) -> None:
    """What is not exactly what was given counts as nothing."""
    assert {} == at(NOW).positions(with_cookie(token))
    assert {} == at(NOW, header="X-P").positions([(b"x-p", token)])


def test_oversized() -> None:
    """A token over 4 KB is not even looked at, genuine as it may be."""
    many = {f"database {number}": "0/1" for number in range(300)}
    token = token_of(at(NOW), many)
    assert len(token) > LONGEST_TOKEN
    assert {} == at(NOW).positions(with_cookie(token))


@pytest.mark.parametrize("bit", range(8))
def test_each_bit(bit: int) -> None:
    """A token with one bit changed anywhere is refused."""
    for index in range(len(TOKEN)):
        changed = bytearray(TOKEN)
        changed[index] ^= 1 << bit
        assert {} == at(NOW).positions(with_cookie(bytes(changed)))


@in_its_own_time
@given(st.lists(st.tuples(st.sampled_from([b"cookie", b"x-p"]), st.binary())))
def test_any_headers(headers: Headers) -> None:
    """Whatever a client sends, reading it raises nothing and gives nothing."""
    assert {} == at(NOW).positions(headers)
    assert {} == at(NOW, header="X-P").positions(headers)


@in_its_own_time
@given(st.binary(), st.binary())
def test_any_token(payload: bytes, signature: bytes) -> None:
    """Whatever is in our own cookie, reading it raises nothing and gives nothing."""
    token = payload + b"." + signature
    assert {} == at(NOW).positions(with_cookie(token))
    assert {} == at(NOW).positions(with_cookie(payload + b"." + SIGNATURE))


@pytest.mark.parametrize(
    ("age", "counts"),
    [
        (0, True),
        (59, True),
        (61, False),
        (1e9, False),
        (-4, True),  # another server's clock is ahead
        (-6, False),
        (-1e9, False),
        (float("nan"), False),
    ],
)
def test_age(age: float, counts: bool) -> None:
    """A token counts for `max_age` seconds, and not before it was made."""
    expected = POSITIONS if counts else {}
    assert expected == at(NOW + age).positions(with_cookie(TOKEN))


@pytest.mark.parametrize(
    "reader",
    [at(NOW, secret=OTHER), at(NOW, secret=[OTHER]), at(NOW, secret=SECRET + " ")],
)
def test_other_secret(reader: CausalReads) -> None:
    """A token that was signed with another secret is refused."""
    assert {} == reader.positions(with_cookie(TOKEN))


def test_other_name() -> None:
    """The token of another application with the same secret is refused."""
    assert {} == at(NOW, cookie="b").positions(with_cookie(TOKEN, b"b"))
    assert {} == at(NOW, header="asgi_uow2").positions([(b"asgi_uow2", TOKEN)])


def test_rotation() -> None:
    """The first secret signs, each is accepted, one that is gone is refused."""
    both = at(NOW, secret=[OTHER, SECRET])
    assert POSITIONS == both.positions(with_cookie(TOKEN))
    new = with_cookie(token_of(both))
    assert POSITIONS == both.positions(new)
    assert POSITIONS == at(NOW, secret=OTHER).positions(new)
    assert {} == at(NOW).positions(new)


# Options


def test_defaults() -> None:
    """Without options: a cookie, a second of waiting, a minute of memory."""
    reads = CausalReads(SECRET)
    options = (reads.wait, reads.max_age, reads.cookie, reads.header)
    assert (1.0, 60.0, "asgi_uow", None) == options
    assert POSITIONS == reads.positions(with_cookie(token_of(reads)))


def test_repr() -> None:
    """The options can be shown, the secrets cannot."""
    shown = repr(CausalReads([SECRET, OTHER], wait=2))
    assert "CausalReads(wait=2, max_age=60.0, cookie='asgi_uow', header=None)" == shown


def test_frozen() -> None:
    """The options stay what they were checked to be."""
    reads = CausalReads(SECRET)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reads.wait = 2  # type: ignore[misc]


NOT_FINITE = [float("nan"), float("inf")]
NOT_NUMBERS = ["1", None, True, Decimal(1), Fraction(1)]
NOT_SECONDS: list[object] = [*NOT_FINITE, -0.1, *NOT_NUMBERS]
NOT_NAMES: list[object] = ["", "a b", "a=b", "a;b", "ä", "a\r\nb", "a\n", 1]
NOT_SECRETS: list[object] = ["", b"", "fifteen bytes..", [], (), None, 7, {SECRET: 1}]
NONSENSE: dict[str, list[object]] = {
    "secret": [*NOT_SECRETS, [SECRET, "short"], [SECRET, None]],
    "wait": NOT_SECONDS,
    "max_age": [*NOT_SECONDS, 0, 0.5],
    "cookie": [*NOT_NAMES, None],
    "header": NOT_NAMES,
}


@pytest.mark.parametrize(
    ("option", "value"),
    [(option, value) for option, values in NONSENSE.items() for value in values],
)
def test_nonsense(option: str, value: object) -> None:
    """An option that cannot work is refused by name, and no secret is shown."""
    with pytest.raises(ConfigurationError, match=option) as refused:
        at(NOW, **{option: value})
    assert SECRET not in str(refused.value)
    assert "fifteen" not in str(refused.value)


def test_shortest_secret() -> None:
    """Sixteen bytes are enough, also as eight characters of two bytes."""
    for secret in ("s" * 16, "ä" * 8, b"s" * 16, ["s" * 16], ("s" * 16, "t" * 16)):
        reads = CausalReads(secret)
        assert POSITIONS == reads.positions(with_cookie(token_of(reads)))
