"""Who sends a request: the owner of an API key, or on loopback without keys, the user of this machine."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from manyicl.errors import UserError
from manyicl.server.records import LOCAL_OWNER, Caller, Scope

LOCAL_CALLER = Caller(LOCAL_OWNER)
# Answered without a key: they hold nothing of any task.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/openapi.json"})
_BEARER = re.compile(r"bearer +(mk_[A-Za-z0-9_-]{1,200})", re.IGNORECASE)
_REMEDY = "Send `Authorization: Bearer mk_…` with a key of `manyicl keys create`."

# For the OpenAPI document alone: the middleware has read the header when a route is called.
KEY_SCHEME = HTTPBearer(
    auto_error=False, scheme_name="key", bearerFormat="mk_…", description="A key of `manyicl keys create`."
)


def key_in(header: str | None) -> str:
    """Return the key in the header ``Authorization``.

    Raises:
        UserError: If there is none, or something else.
    """
    if header is None:
        raise UserError("key_needed", "an API key is needed", remedy=_REMEDY)
    found = _BEARER.fullmatch(header.strip())
    if found is None:
        raise wrong_key()
    return found[1]


def wrong_key() -> UserError:
    """Make the error for a key that does not exist or was revoked; it does not say which."""
    return UserError("wrong_key", "the API key is not valid", remedy=_REMEDY)


def caller_of(request: Request) -> Caller:
    """Return who sends a request, as the middleware found."""
    caller: Caller = request.state.caller
    return caller


def _require_scope(request: Request, scope: Scope) -> Caller:
    caller = caller_of(request)
    if scope not in caller.scopes:
        remedy = f"Use a key with the scope {scope!r}."
        raise UserError("not_allowed", f"this key does not allow to {scope}", remedy=remedy)
    return caller


async def _manages(request: Request, _key: Annotated[object, Depends(KEY_SCHEME)]) -> Caller:
    return _require_scope(request, "manage")


async def _predicts(request: Request, _key: Annotated[object, Depends(KEY_SCHEME)]) -> Caller:
    return _require_scope(request, "predict")


# A route's parameter of this type is its caller, who may manage tasks, or read and use them.
Manager = Annotated[Caller, Depends(_manages)]
Predictor = Annotated[Caller, Depends(_predicts)]
