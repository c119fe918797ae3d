"""Tells which failures of a disk or a bucket are worth another try."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


CREDENTIAL_ERRORS = frozenset(
    {
        "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
        "UnauthorizedSSOTokenError", "SSOTokenLoadError", "ProfileNotFound",  # botocore
        "RefreshError", "DefaultCredentialsError",  # google.auth
        "ClientAuthenticationError",  # azure.core
    }
)  # fmt: skip
"""Names of what the drivers' own libraries raise for credentials, told by name: none of them need be installed."""
REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
"""No space, no permission, larger than a file may be: another try finds the same."""
REFUSED_CODES = frozenset(
    {"InvalidToken", "TokenRefreshRequired", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}
)
"""The same by services of S3, in words that s3fs has no such number for."""
REFUSED_STATUSES = frozenset({"401", "403"})
"""Of HTTP. Where drivers have no exception of their own for them, they stand in one of these attributes."""
STATUS_ATTRIBUTES = ("status_code", "status", "code")  # azure.core, aiohttp, gcsfs
GCS_FORBIDDEN = "Forbidden: "
"""How gcsfs begins what it says of a 403, which has no status of its own there."""
GCS_THROTTLED = "ratelimitexceeded"
"""A 403 of Google Cloud Storage that passes."""
POINTLESS = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR})
"""The request itself is at fault."""


def is_refusal(error: BaseException) -> bool:
    """Tells whether the disk or the service said no in a way that another try cannot change."""
    return any(
        isinstance(link, PermissionError)
        or (isinstance(link, OSError) and link.errno in REFUSED)
        or type(link).__name__ in CREDENTIAL_ERRORS
        or _code(link) in REFUSED_CODES
        or _is_forbidden(link)
        for link in _chain(error)
    )


def may_pass(error: BaseException) -> bool:
    """Tells whether another try may succeed: throttling, 5xx, resets, time-outs. Not for a request that is wrong."""
    if isinstance(error, ValueError | TypeError | AttributeError | RuntimeError | ImportError):
        return False
    return not (isinstance(error, OSError) and error.errno in POINTLESS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_forbidden(error: BaseException) -> bool:
    statuses = {str(getattr(error, name, None)) for name in STATUS_ATTRIBUTES}
    text = str(error)
    said_no = not statuses.isdisjoint(REFUSED_STATUSES) or (isinstance(error, OSError) and GCS_FORBIDDEN in text[:20])
    return said_no and GCS_THROTTLED not in text.lower()


def _code(error: BaseException) -> object:
    """Returns what S3 calls an error, where botocore says it."""
    response = getattr(error, "response", None)
    answer = response.get("Error") if isinstance(response, dict) else None
    return answer.get("Code") if isinstance(answer, dict) else None
