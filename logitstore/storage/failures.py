"""Classifies the errors of disks and buckets: those that a retry may cure, and those that no retry can cure."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from logitstore.errors import StorageError

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
"""Class names of the credential errors that the drivers' libraries raise. The classes are compared by name,
because the libraries may not be installed."""
REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
"""Error numbers that mean a refusal: no space, no permission, or a file larger than allowed. A retry cannot succeed."""
REFUSED_CODES = frozenset(
    {"InvalidToken", "TokenRefreshRequired", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}
)
"""S3 error codes that mean a refusal, and that s3fs does not translate into an error number."""
NO_SPACE_CODES = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"})
"""S3 error codes that mean that the service has no space left."""
REFUSED_STATUSES = frozenset({"401", "403"})
"""HTTP statuses that mean a refusal, for drivers that raise no exception class of their own."""
STATUS_ATTRIBUTES = ("status_code", "status", "code")  # azure.core, aiohttp, gcsfs
"""Names of the attributes in which the drivers' exceptions hold the HTTP status."""
GCS_FORBIDDEN = "Forbidden: "
"""Beginning of the message of the exception that gcsfs raises for status 403. This exception has no status
attribute."""
GCS_THROTTLED = "ratelimitexceeded"
"""Reason that Google Cloud Storage gives in a response with status 403 when it throttles requests. A retry of such a
request may succeed."""
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, a full quota, or a file larger than allowed."""
POINTLESS = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR})
"""Error numbers that mean that the request is wrong, so that every retry fails too."""


def is_refusal(error: BaseException) -> bool:
    """Returns whether an error, or one of its causes, means that a disk or a service refused a request."""
    return any(
        isinstance(link, PermissionError)
        or (isinstance(link, OSError) and link.errno in REFUSED)
        or type(link).__name__ in CREDENTIAL_ERRORS
        or _code(link) in REFUSED_CODES
        or _is_forbidden(link)
        for link in _chain(error)
    )


def cause(error: BaseException) -> str:
    """Returns the reason of a refusal as a clause for a message, such as "permission was denied".

    Args:
        error: An error for which `is_refusal` is true.
    """
    links = list(_chain(error))
    numbers = {link.errno for link in links if isinstance(link, OSError)}
    if any(type(link).__name__ in CREDENTIAL_ERRORS for link in links):
        return "no valid credentials were found"
    if numbers & NO_SPACE or any(_code(link) in NO_SPACE_CODES for link in links):
        return "there is no space left"
    if errno.EROFS in numbers:
        return "the file system is read-only"
    if any(_code(link) in REFUSED_CODES for link in links):
        return "the credentials are no longer valid"
    return "permission was denied"


def may_pass(error: BaseException) -> bool:
    """Returns whether a retry may succeed, for example after throttling, a 5xx status, a connection reset or a timeout.

    A retry of a wrong request cannot succeed. Check `is_refusal` first: this function does not recognise refusals.
    """
    # These classes mean that the request or the code is wrong, not that the service failed.
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
    is_refused = not statuses.isdisjoint(REFUSED_STATUSES) or (
        isinstance(error, OSError) and GCS_FORBIDDEN in text[:20]
    )
    # Google Cloud Storage answers with the same status when it throttles requests, and then a retry may succeed.
    return is_refused and GCS_THROTTLED not in text.lower()


def _code(error: BaseException) -> object:
    """Returns the S3 error code in an exception of botocore; None for other exceptions."""
    response = getattr(error, "response", None)
    answer = response.get("Error") if isinstance(response, dict) else None
    return answer.get("Code") if isinstance(answer, dict) else None


def is_of_storage(error: BaseException) -> bool:
    """Returns whether a disk or a storage service caused an error, by failing or by refusing a request."""
    return isinstance(error, StorageError) or (isinstance(error, OSError) and is_refusal(error)) or _no_space(error)


def _no_space(error: BaseException | None) -> bool:
    """Returns whether an error, or one of its causes, means that a disk is full."""
    if error is None:
        return False
    return (isinstance(error, OSError) and error.errno in NO_SPACE) or _no_space(error.__cause__ or error.__context__)
