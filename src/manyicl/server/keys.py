"""API keys: `mk_<id>_<secret>`. The database keeps an HMAC of each, with a secret that is in a file beside it.

A key is 256 random bits, which nobody guesses, so that a slow hash as for passwords would add nothing. The secret
of the HMAC keeps write access to the database alone from being enough to make a valid key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path

from sqlalchemy import insert, select, update

from manyicl.atomic import sync_folder
from manyicl.errors import MachineError, UserError, quoted
from manyicl.server.database import HMAC_FILE_NAME, Database, give_to_owner_of_folder
from manyicl.server.records import Caller, KeyRecord, Scope
from manyicl.server.tables import api_keys, utc_now

SECRET_BYTES = 32
ALL_SCOPES: frozenset[Scope] = frozenset(("manage", "predict"))
_MOST_KEY_CHARACTERS = 200


class KeyStore:
    """Makes, lists, revokes and checks API keys."""

    def __init__(self, database: Database, data: Path, clock: Callable[[], datetime] = utc_now) -> None:
        """Take the database, and the data folder, which holds the secret of the HMACs.

        Args:
            database: Open database.
            data: Data folder.
            clock: Gives the time in UTC.
        """
        self._database = database
        self._file = data / HMAC_FILE_NAME
        self._clock = clock
        self._secret: bytes | None = None

    def create(
        self,
        owner: str,
        name: str,
        scopes: Iterable[Scope] = ALL_SCOPES,
        *,
        requests_per_minute: int | None = None,
        rows_per_minute: int | None = None,
    ) -> tuple[str, KeyRecord]:
        """Make a key. It is returned this once; nothing that is kept gives it again.

        Args:
            owner: Whose tasks it opens.
            name: What it is for.
            scopes: What it allows.
            requests_per_minute: Limit of this key; None for the server's.
            rows_per_minute: Limit of this key on rows to predict; None for the server's.

        Returns:
            The key, and its record.

        Raises:
            UserError: If there are keys, and the file with the secret of their HMACs is missing.
        """
        if not owner.strip():
            raise UserError("wrong_value", "an owner has a name", found=quoted(owner), field="owner")
        key_id = secrets.token_hex(8)
        key = f"mk_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
        limits = {"requests_per_minute": requests_per_minute, "rows_per_minute": rows_per_minute}
        record = KeyRecord(key_id, owner, name, frozenset(scopes), self._clock(), None, *limits.values())
        values = {"id": key_id, "owner": owner, "name": name, "scopes": sorted(record.scopes)}
        self._make_secret()
        with self._database.writing() as connection:
            connection.execute(
                insert(api_keys).values(hmac=self._hmac(key), created_at=record.created_at, **values, **limits)
            )
        return key, record

    def list(self) -> Sequence[KeyRecord]:
        """Return all keys, revoked ones too, oldest first."""
        columns = api_keys.c
        kept = [columns[name] for name in KeyRecord.__slots__]
        with self._database.reading() as connection:
            rows = connection.execute(select(*kept).order_by(columns.position)).mappings()
            return [KeyRecord(**{**row, "scopes": frozenset(row["scopes"])}) for row in rows]

    def revoke(self, key_id: str) -> KeyRecord:
        """Revoke a key, from the next request on; one that is revoked stays so.

        Raises:
            UserError: If there is no such key.
        """
        columns = api_keys.c
        revoking = update(api_keys).where(columns.id == key_id, columns.revoked_at.is_(None))
        with self._database.writing() as connection:
            connection.execute(revoking.values(revoked_at=self._clock()))
        found = next((record for record in self.list() if record.id == key_id), None)
        if found is None:
            remedy = "`manyicl keys list` names all."
            raise UserError("unknown_key_id", f"there is no key with the id {quoted(key_id)}", remedy=remedy)
        return found

    def has_keys(self) -> bool:
        """Tell whether a key is valid."""
        query = select(api_keys.c.id).where(api_keys.c.revoked_at.is_(None)).limit(1)
        with self._database.reading() as connection:
            return connection.execute(query).first() is not None

    def caller_of(self, key: str) -> Caller | None:
        """Return who has a key; None for one that is revoked or was never made.

        Raises:
            MachineError: If the file with the secret of the HMACs is missing, or the database fails.
        """
        if len(key) > _MOST_KEY_CHARACTERS or not (key.isascii() and key.isprintable()):
            return None
        kind, _, rest = key.partition("_")
        key_id, _, secret = rest.partition("_")
        if kind != "mk" or not secret:
            return None
        with self._database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            return None
        # The id is no secret. The comparison takes as long for a beginning that is right as for one that is wrong.
        is_right = hmac.compare_digest(row.hmac, self._hmac(key))
        if not is_right or row.revoked_at is not None:
            return None
        return Caller(row.owner, frozenset(row.scopes), row.id, row.requests_per_minute, row.rows_per_minute)

    def _hmac(self, key: str) -> str:
        if self._secret is None:
            try:
                self._secret = self._file.read_bytes()
            except OSError as error:
                sentence = f"The file {self._file}, without which no API key can be checked, is missing: restore it."
                raise MachineError(sentence) from error
        return hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()

    def _make_secret(self) -> None:
        """Make the file with the secret where there is none, and was none: with another one, no key would be valid."""
        if self._file.exists():
            return
        if self.has_keys():
            remedy = "Restore it from a backup, or revoke all keys and make new ones."
            what = "the file without which no API key can be checked is missing"
            raise UserError("hmac_key_missing", what, remedy=remedy, file=self._file)
        aside = self._file.with_name(f"{self._file.name}-{secrets.token_hex(4)}")
        descriptor = os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            give_to_owner_of_folder(aside)
            # A link, unlike a rename, fails where another process was first; its secret counts then.
            os.link(aside, self._file)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        sync_folder(self._file.parent)
