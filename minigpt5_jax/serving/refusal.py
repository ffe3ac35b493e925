"""What a client is told when a request is not answered."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is not answered, in the words and the form of OpenAI's API.

    Attributes:
      status: of HTTP.  message: what is wrong and what helps, for the client's user.
      code: one word for programs.  param: the field that is meant.
      retry_after: seconds after which the same request may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.retry_after = code, param, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}

    def body(self) -> dict[str, Any]:
        """Of the response."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
