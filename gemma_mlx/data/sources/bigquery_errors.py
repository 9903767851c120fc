"""What BigQuery's and Google's client libraries raise, as one line for the user."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from gemma_mlx.errors import InputError, SourceError

_LOGIN = "log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
_BUSY = {"quotaExceeded", "rateLimitExceeded", "backendError", "jobRateLimitExceeded"}


@contextlib.contextmanager
def errors_told(name: str) -> Iterator[None]:
    """Turn what the client libraries raise into an `InputError` or, where the service failed, a `SourceError`."""
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        told = _told(e, name)
        if told is None:
            raise
        raise told from None


def _told(e: Exception, name: str) -> InputError | None:
    import requests.exceptions
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth

    said = _line(e)
    if isinstance(e, auth.DefaultCredentialsError):
        return InputError(f"{name}: no Google credentials ({said.rstrip('.')}); {_LOGIN}")
    if isinstance(e, auth.RefreshError | api.Unauthorized):
        return InputError(f"{name}: the Google credentials are not accepted ({said}); {_LOGIN}")
    if isinstance(e, api.NotFound):
        return InputError(f"{name}: {said}; check the names of project, dataset and table")
    if "responseTooLarge" in _reasons(e):
        return InputError(f"{name}: {said}; write the result to a table (CREATE TABLE ... AS ...) and read that table")
    if isinstance(e, api.Forbidden) and not _reasons(e) & _BUSY:
        return InputError(
            f"{name}: {said}; reading needs the roles bigquery.dataViewer on the data, and bigquery.jobUser and "
            "bigquery.readSessionUser in the project that pays"
        )
    if isinstance(e, api.BadRequest):
        return InputError(f"{name}: BigQuery refuses it: {said}")
    failed = (api.GoogleAPICallError, api.RetryError, auth.GoogleAuthError, requests.exceptions.RequestException)
    if isinstance(e, (*failed, ConnectionError, TimeoutError)):
        return SourceError(f"{name}: BigQuery does not answer ({said}); try again later")
    if isinstance(e, OSError):
        return SourceError(f"{name}: the snapshot cannot be written ({said}); free space or give another folder")
    return None


def _reasons(e: Exception) -> set[str]:
    return {str(error.get("reason")) for error in getattr(e, "errors", ()) if isinstance(error, dict)}


def _line(e: Exception) -> str:
    """The first line of the server's own message, without the request in front of it."""
    cause = getattr(e, "cause", None)  # a RetryError's last failure
    text = str(getattr(cause or e, "message", None) or cause or e).strip()
    return re.sub(r"^(GET|POST) \S+?: ", "", (text.splitlines() or [type(e).__name__])[0])[:300]
