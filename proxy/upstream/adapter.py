"""What every provider of OpenAI's protocol shares; ``openrouter`` and ``openai`` say how they differ."""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar, Literal
from uuid import UUID

import aiohttp
from yarl import URL

from billing.errors import ProviderUnavailableError
from billing.pricing.extras import CACHED_WRITE_1H
from billing.pricing.quote import Output, Quote
from billing.provider.records import Activity, Bill, Source
from billing.provider.refusals import Standing, Subject
from config.secrets import Redactor
from config.settings import UpstreamSettings
from proxy.http.errors import BadRequestError
from proxy.protocol.ask import Ask
from proxy.protocol.dialects import COMPLETION_TOKENS, COMPLETIONS, RESPONSES, count_of
from proxy.upstream.client import UpstreamClient, UpstreamResponse

RECORD_BYTES_MAX = 4 * 1024 * 1024
_RECORD_TIMEOUT_S = 10.0
_NARROW = "missing scopes"


class Upstream:
    """The provider: calls over warm connections of our own client, its records over a session of aiohttp's.

    Args:
        settings: where it is, its key, and how long to wait for it.
    """

    keeps_bills: ClassVar[bool] = False
    bills_by_price_book: ClassVar[bool] = True
    client_gone_default: ClassVar[Literal["abort", "drain"]] = "drain"
    completion_tokens_default: ClassVar[int] = COMPLETION_TOKENS  # 0: this provider has none of its own

    def __init__(self, settings: UpstreamSettings) -> None:
        self._settings = settings
        self._base_url = settings.base_url
        self._headers = {
            "Authorization": f"Bearer {settings.api_key.get_secret_value()}",
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",  # the meter looks at the bytes as they pass
        }
        account_key = settings.management_key.get_secret_value() or settings.api_key.get_secret_value()
        self._account_headers = {**self._headers, "Authorization": f"Bearer {account_key}"}
        self.redact = Redactor(
            key.get_secret_value() for key in (settings.api_key, settings.management_key)
        )  # what it says of its errors may show our key
        # Whether `usage.cost` is this provider's bill. A gateway's is its own estimate, by a price list that nobody here knows.
        self.reports_cost = settings.trust_cost or not self.bills_by_price_book
        self.on_client_gone = settings.on_client_gone or self.client_gone_default
        self._session: aiohttp.ClientSession | None = None
        self._client: UpstreamClient | None = None
        self._request_heads: dict[
            str, bytes
        ] = {}  # of the dialects' paths: all but what each call has of its own

    async def start(self) -> None:
        """Open the connection pools."""
        self._client = UpstreamClient(
            URL(self._base_url),
            connections_max=self._settings.connections_max,
            connect_timeout_s=self._settings.connect_timeout_s,
        )
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._settings.connections_max, keepalive_timeout=60, ttl_dns_cache=60
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=True,
            read_bufsize=64 * 1024,
            trust_env=False,  # neither a proxy of the environment nor ~/.netrc sees the key
        )

    async def close(self) -> None:
        """Close the connection pools."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    def output_of(self, ask: Ask) -> Output:
        """Return how much output is asked for, with the provider's own default where it has one."""
        output = ask.output
        if output.tokens is None and ask.dialect is COMPLETIONS and self.completion_tokens_default:
            return replace(output, tokens=self.completion_tokens_default)
        return output

    def check(self, ask: Ask) -> None:
        """Refuse what nobody could tell the price of afterwards.

        Raises:
            BadRequestError: several models may answer, and this provider names no price: it need not say which one did.
        """
        if not self.reports_cost and len(ask.models) > 1:
            raise BadRequestError(
                "'models' is not served: this provider reports tokens only, and need not say which model they are of.",
                param="models",
            )

    def extras_of(self, ask: Ask) -> Mapping[str, int]:
        """Return what is asked for that is billed apart from tokens, by unit of the price book.

        Raises:
            BadRequestError: this provider does not say what it bills, so nobody could know what it came to.
        """
        extras = ask.extras
        if not self.reports_cost and not extras.keys() <= {CACHED_WRITE_1H}:
            unit = next(unit for unit in extras if unit != CACHED_WRITE_1H)
            raise BadRequestError(
                f"What is billed as {unit!r} is not served: it is billed apart from tokens, and this provider reports tokens only."
            )
        return extras

    def bound_name(self, ask: Ask) -> str:
        """Return the member that bounds the output, hidden reasoning included, where the request has none."""
        return ask.dialect.bounds[-1]

    def request_changes(self, ask: Ask, quote: Quote) -> Mapping[str, str | None]:
        """Return the members of the request that are set, as JSON text, or left out: None.

        The bound that is held; that usage is reported; and that nothing of it is kept, as all who call here share the account.
        """
        changes: dict[str, str | None] = {**self._usage_changes(ask)}
        if ask.dialect is RESPONSES and ask.fields.get("store") is None:
            changes["store"] = "false"  # left out, OpenAI keeps the answer
        if quote.told_tokens and ask.dialect.bounds:
            names = ask.bound_names or [self.bound_name(ask)]
            for name in names:
                asked = count_of(ask.fields, name)
                if asked is None or asked > quote.told_tokens:
                    changes[name] = str(quote.told_tokens)
        return changes

    def _usage_changes(self, ask: Ask) -> Mapping[str, str]:
        if not ask.stream or not ask.dialect.usage_by_option:
            return {}
        options = ask.stream_options or {}
        if options.get("include_usage") is True:
            return {}
        return {"stream_options": json.dumps({**options, "include_usage": True})}

    async def send(
        self, ask: Ask, quote: Quote, *, call_id: UUID, trace: Mapping[str, str] | None = None
    ) -> UpstreamResponse:
        """Send the request once; a paid POST is never repeated by itself.

        Args:
            ask: what was asked.
            quote: what is held for it; the provider is told its bound.
            call_id: sent along as the request's id.
            trace: headers of a trace that the call is part of.

        Returns:
            the response, headers read, body not; the caller closes it.

        Raises:
            aiohttp.ClientError, TimeoutError: no answer came.
        """
        assert self._client is not None
        path = ask.dialect.path
        head = self._request_heads.get(path)
        if head is None:
            head = self._request_heads[path] = self._request_head(path)
        body = ask.body_with(self.request_changes(ask, quote))
        own = (
            f"X-Request-Id: {call_id}\r\n{_lines(trace) if trace else ''}Content-Length: {len(body)}\r\n\r\n"
        )
        settings = self._settings
        return await self._client.post(
            head + own.encode("ascii"),
            body,
            first_byte_s=settings.first_byte_timeout_s,
            idle_s=settings.idle_timeout_s if ask.stream else settings.first_byte_timeout_s,
        )

    def _request_head(self, path: str) -> bytes:
        url = URL(self._base_url + path)
        host = url.host_port_subcomponent or ""
        lines = _lines({"Host": host, **self._headers, "Accept": "*/*", "User-Agent": "tuma"})
        return f"POST {url.raw_path} HTTP/1.1\r\n{lines}".encode("ascii")

    def generation_id(self, response: UpstreamResponse) -> str | None:
        """Return the answer's id where the provider names it in a header, before the body."""
        return response.headers.get("x-generation-id")

    async def find_bill(self, generation_id: str) -> Bill | None:
        """Return the provider's record of an answer; this kind of provider has none."""
        raise ProviderUnavailableError(f"{self._settings.kind} keeps no record per answer ({generation_id})")

    async def find_totals_usd(self) -> Mapping[Source, Decimal | ProviderUnavailableError]:
        """Return what the provider billed in total; this kind of provider does not say."""
        return {}

    async def find_left_usd(self) -> Decimal | None:
        """Return how much more the provider lets us consume; this kind of provider does not say."""
        return None

    async def find_standing(self, subject: Subject) -> Standing:
        """Return how our account stands by its record; of money this kind of provider does not say.

        Of our key its list of models tells: where that is refused, so are calls. That it is shown proves nothing, as some
        servers show it to everybody; nor does a key that was made without the right to see it, which OpenAI refuses with
        words of missing scopes.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        if subject == "money":
            return "unknown"
        status, answer = await self.get_record("/models")
        is_narrow = _NARROW in json.dumps(answer, default=str).lower()
        return "refused" if status == 401 and not is_narrow else "unknown"  # noqa: PLR2004 - HTTP

    async def find_activity(self) -> list[Activity] | None:
        """Return what it billed per day and model; this kind of provider does not say."""
        return None

    async def list_models(self) -> list[Mapping[str, Any]]:
        """Return the provider's models as it lists them; floats as ``Decimal``.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        return await self._list_models("/models")

    async def _list_models(self, path: str) -> list[Mapping[str, Any]]:
        """Return one list of models.

        Raises:
            ProviderUnavailableError: it cannot be asked now.
        """
        status, answer = await self.get_record(path)
        models = answer.get("data") if isinstance(answer, Mapping) else None
        if status != 200 or not isinstance(models, list):  # noqa: PLR2004 - HTTP
            raise ProviderUnavailableError(f"the provider's {path} answered {status}")
        return [model for model in models if isinstance(model, Mapping)]

    async def get_record(self, path: str, *, account: bool = False, **params: str) -> tuple[int, Any]:
        """GET a JSON document of the provider's own; amounts come as ``Decimal``.

        Args:
            path: below the base URL.
            account: it is the whole account's, for which a provider may want another key.
            params: of the query.

        Raises:
            ProviderUnavailableError: no usable answer.
        """
        assert self._session is not None
        try:
            async with (
                asyncio.timeout(_RECORD_TIMEOUT_S),
                self._session.get(
                    f"{self._base_url}{path}",
                    params=params,
                    headers=self._account_headers if account else self._headers,
                    allow_redirects=False,
                ) as response,
            ):
                body = await response.content.read(RECORD_BYTES_MAX)
                while not response.content.at_eof() and len(body) < RECORD_BYTES_MAX:
                    body += await response.content.read(RECORD_BYTES_MAX - len(body))
                return response.status, json.loads(body or b"null", parse_float=Decimal)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise ProviderUnavailableError(
                f"the provider's {path} does not answer: {type(error).__name__}"
            ) from error


def _lines(headers: Mapping[str, str]) -> str:
    """Return headers as they go out.

    Raises:
        ValueError: one has what would end its line.
    """
    text = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    if text.count("\n") != len(headers) or text.count("\r") != len(headers) or "\0" in text:
        raise ValueError("a header for the provider has a line's end in it")
    return text
