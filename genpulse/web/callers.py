"""
Whose key a request shows: looked up by id, compared in constant time, remembered for two seconds.

So a revoked key stops opening anything within two seconds, in every process, and a busy caller costs
the ledger one read in that time. An address that shows wrong keys is refused for the rest of the
minute; Redis lets the processes count together, and each counts for itself without it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from genpulse.config import Settings, is_loopback
from genpulse.errors import LedgerUnavailable
from genpulse.ledger import KeyText, Ledger
from genpulse.live import Live
from genpulse.model import SCOPES, ApiKey
from genpulse.tasks.wiring import open_ledger
from genpulse.web.service import OWNER

__all__ = ["Caller", "Callers", "TooManyWrongKeys", "WrongKey", "has_keys", "reason_not_to_listen"]

REMEMBERED_S = 2.0
"""How long a key's row is believed; a revoked key stops within this time."""
WINDOW_S = 60
"""Wrong keys are counted for so long."""
_USED_EVERY_S = 60.0
_MAX_REMEMBERED = 4096

K = TypeVar("K")
V = TypeVar("V")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and what they may do."""

    owner: str
    scopes: frozenset[str]
    key: ApiKey | None = field(default=None, repr=False)
    """``None`` for the single key of the settings, and where no key is needed."""
    shows_key: bool = True

    @property
    def key_id(self) -> str:
        """Whose idempotency keys these are; all who need no key are one, and so is the single key."""
        if self.key is not None:
            return self.key.id
        return "single" if self.shows_key else ""


EVERYBODY = Caller(OWNER, frozenset(SCOPES), shows_key=False)
"""Where no key is needed: whoever reaches the loopback."""
_SINGLE = Caller(OWNER, frozenset(SCOPES))


class WrongKey(Exception):
    """The credentials open nothing; the text says what may be said about them."""


class TooManyWrongKeys(Exception):
    """This address showed too many wrong keys."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


def reason_not_to_listen(settings: Settings) -> str | None:
    """
    Why the API may not listen on the address of *settings*, if it may not.

    On another address than loopback it wants a key, in the settings or in the ledger. A ledger that
    does not answer is no key.
    """
    if settings.api_key.get_secret_value() or is_loopback(settings.host):
        return None
    reason = "without an API key the API listens on loopback only"
    try:
        if has_keys(settings):
            return None
    except LedgerUnavailable as error:
        reason = f"{reason}, and the ledger does not tell of any ({error})"
    return f"GENPULSE_HOST: {reason}: make a key with `genpulse keys create`, or set GENPULSE_API_KEY"


def has_keys(settings: Settings) -> bool:
    """
    Whether the ledger has API keys.

    Raises:
        LedgerUnavailable: It is not known.
    """
    file = settings.ledger_url.removeprefix("sqlite:///")
    if settings.uses_sqlite and not Path(file).exists():  # asking would make it
        return False
    ledger = open_ledger(settings)
    try:
        return ledger.has_keys()
    finally:
        ledger.close()


class Callers:
    """Finds out who asks. Threads share one."""

    def __init__(self, settings: Settings, ledger: Ledger, live: Live) -> None:
        single = settings.api_key.get_secret_value()
        self._single = _digest(single.encode()) if single else ""
        # On another address there is no "without a key": the ledger may be away, but not open.
        self._never_open = bool(single) or not is_loopback(settings.host)
        self._ledger = ledger
        self._keys: _Remembered[str, ApiKey | None] = _Remembered(REMEMBERED_S)
        self._any: _Remembered[str, bool] = _Remembered(REMEMBERED_S)
        self._had_keys = False
        self._used: _Remembered[str, bool] = _Remembered(_USED_EVERY_S)
        self._known: _Remembered[tuple[str, str], bool] = _Remembered(600.0)
        self._wrong = _WrongKeys(live, settings.wrong_keys)

    @property
    def are_known_by_key(self) -> bool:
        """Whether it is certain that a key is needed here."""
        return self._never_open or self._had_keys

    def need_key(self) -> bool:
        """
        Whether a key is needed: one is set or was ever made, or strangers can reach this address.

        Raises:
            LedgerUnavailable: It is not known.
        """
        if self.are_known_by_key:
            return True
        self._had_keys = self._any.get("", self._ledger.has_keys)
        return self._had_keys

    def identify(self, token: bytes, address: str) -> Caller:
        """
        The caller who shows *token*.

        A key that opened something for the same address before is not held up by its neighbours'
        wrong ones.

        Raises:
            WrongKey: It opens nothing.
            TooManyWrongKeys: It was not even looked at.
            LedgerUnavailable: It is not known.
        """
        digest, source = _digest(token), _source(address)
        if not self._known.has((source, digest)):
            self._wrong.check(source)
        try:
            caller = self._look_up(token, digest)
        except _Guess:
            self._known.drop((source, digest))
            self._wrong.note(source)
            raise WrongKey("The API key is not known here.") from None
        self._known.put((source, digest), True)
        return caller

    def still_opens(self, caller: Caller) -> bool:
        """Whether *caller*, who was let in a while ago, would be let in now; yes where that is not known."""
        try:
            if not caller.shows_key:
                return not self.need_key()
            if caller.key is None:
                return True
            key = self._find(caller.key.id)
        except LedgerUnavailable:
            return True
        return key is not None and key.is_usable

    def are_several(self, caller: Caller) -> bool:
        """Whether there may be other owners than that of *caller*: the ledger has, or had, keys."""
        if not caller.shows_key or caller.key is not None:
            return caller.shows_key
        try:
            return self._any.get("", self._ledger.has_keys)
        except LedgerUnavailable:
            return False

    def use_to_note(self, caller: Caller) -> Callable[[], None] | None:
        """What writes this use of a key down, if none was in the last minute; to be called when all is answered."""
        key = caller.key
        if key is None or self._used.has(key.id):
            return None
        self._used.put(key.id, True)

        def note() -> None:
            try:
                self._ledger.note_key_use(key.id)
            except LedgerUnavailable as error:
                _log.info("key_use_not_noted", key_id=key.id, reason=str(error))

        return note

    def _look_up(self, token: bytes, digest: str) -> Caller:
        if self._single and hmac.compare_digest(digest, self._single):
            return _SINGLE
        text = KeyText.parse(token.decode("ascii", "replace"))
        if text is None:
            raise _Guess
        key = self._find(text.id)
        if not text.fits(key) or key is None:
            raise _Guess
        if not key.is_usable:
            raise WrongKey("The API key was revoked." if key.revoked_at else "The API key has expired.")
        return Caller(key.owner, frozenset(key.scopes), key)

    def _find(self, key_id: str) -> ApiKey | None:
        return self._keys.get(key_id, lambda: self._ledger.find_key(key_id))


class _Guess(Exception):
    """Nobody was ever given this key."""


class _WrongKeys:
    """Wrong keys by address, in windows of a minute."""

    def __init__(self, live: Live, limit: int) -> None:
        self._live = live
        self._limit = limit
        self._counts: _Remembered[str, int] = _Remembered(WINDOW_S)

    def check(self, source: str) -> None:
        own, left = self._counts.peek(source, 0)
        if own >= self._limit or (self._live.counted(f"wrong-keys:{source}") or 0) >= self._limit:
            raise TooManyWrongKeys(max(1, int(left) if own else WINDOW_S))

    def note(self, source: str) -> None:
        self._counts.update(source, lambda count: (count or 0) + 1)
        self._live.count(f"wrong-keys:{source}", ttl_s=WINDOW_S)


class _Remembered(Generic[K, V]):
    """A bounded map whose entries end a while after they were put; the oldest go first."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, read: Callable[[], V]) -> V:
        """The value, read anew where it is too old. Readers at the same moment may read twice."""
        with self._lock:
            entry = self._entries.get(key)
        if entry is not None and entry[0] > time.monotonic():
            return entry[1]
        value = read()
        self.put(key, value)
        return value

    def has(self, key: K) -> bool:
        with self._lock:
            entry = self._entries.get(key)
        return entry is not None and entry[0] > time.monotonic()

    def peek(self, key: K, otherwise: V) -> tuple[V, float]:
        """The value, and for how many seconds it stays."""
        with self._lock:
            ends, value = self._entries.get(key, (0.0, otherwise))
        left = ends - time.monotonic()
        return (value, left) if left > 0 else (otherwise, 0.0)

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._put(key, time.monotonic() + self._seconds, value)

    def update(self, key: K, change: Callable[[V | None], V]) -> None:
        """Change a value; its time goes on."""
        with self._lock:
            ends, value = self._entries.get(key, (0.0, None))
            if ends <= time.monotonic():
                ends, value = time.monotonic() + self._seconds, None
            self._put(key, ends, change(value))

    def drop(self, key: K) -> None:
        with self._lock:
            self._entries.pop(key, None)

    def _put(self, key: K, ends: float, value: V) -> None:
        self._entries[key] = (ends, value)
        self._entries.move_to_end(key)
        while len(self._entries) > _MAX_REMEMBERED:
            self._entries.popitem(last=False)


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def _source(address: str) -> str:
    """What counts as one address: of IPv6 the network, for its holder has all the rest of it."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((int(found), 64), strict=False).network_address)
    return str(found)
