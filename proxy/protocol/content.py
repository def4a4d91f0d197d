"""Where money hides inside a request: content parts, items of the Responses API, tools, plugins. Each kind is known, or refused."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from billing.pricing.extras import (
    AUDIO_OUTPUT,
    IMAGE_OUTPUT,
    ROUTING,
    WEB_SEARCH,
    WEB_SEARCH_RESULT,
    tier_unit,
)
from proxy.http.errors import BadRequestError
from proxy.protocol.members import INSIDE, MESSAGE, PART, PLUGINS, TOOL, TYPES, Fields, Policy

_WEB_RESULTS = 5  # of OpenRouter's web plugin, where the request names no number
_WEB_RESULTS_MAX = 100
_PDF_ENGINES = ("native", "pdf-text", "cloudflare-ai")  # bill nothing beside tokens
_USUAL_TIERS = (None, "auto", "default", "standard", "standard_only")
_SEARCHES = ("web_search", "openrouter:web_search")  # so begin the names of the tools that search the web
_TOOL_ITEMS = (
    "additional_tools",
    "tool_search_output",
)  # items that hold tools, with the schemas of their arguments
_STORED = "name something that the provider has stored, in the account that all share"


def check_inside(fields: Fields, policy: Policy) -> None:
    """Check the members of objects that bound or route a call.

    Raises:
        BadRequestError: names the member.
    """
    for name, members in INSIDE.items():
        value = fields.get(name)
        if value is None or (name == "usage" and isinstance(value, bool)):
            continue
        if not isinstance(value, dict):
            raise BadRequestError(f"'{name}' must be an object.", param=name)
        members.check(value, policy, within=name)
    mode = (fields.get("reasoning") or {}).get("mode")
    if mode not in (None, "standard"):
        raise BadRequestError("'reasoning.mode' is not served but as 'standard'.", param="reasoning.mode")


def check_messages(messages: Iterable[Fields], policy: Policy) -> None:
    """Check the messages of a chat.

    Raises:
        BadRequestError: a part of a kind that is not known here, or something stored at the provider.
    """
    for message in messages:
        MESSAGE.check(message, "messages")
        if message.get("audio") is not None:
            raise BadRequestError(f"A message's 'audio' is not served: it would {_STORED}.", param="messages")
        check_parts(message.get("content"), "messages", policy)


def check_parts(content: object, within: str, policy: Policy) -> None:
    """Check the parts of a message or an output, at any depth.

    Raises:
        BadRequestError: see ``check_messages``.
    """
    for part in _parts(content):
        PART.check(part, within)
        kind = part.get("type")
        known = kind in TYPES["content"] if isinstance(kind, str) else kind is None and "text" in part
        if not known and policy.unknown == "refuse":
            raise BadRequestError(
                f"A content part of type {_shown(kind)} is not served: it is not known here what it costs.",
                param=within,
            )
        for value in part.values():
            if isinstance(value, dict):
                PART.check(value, within)


def _parts(content: object) -> Iterator[Fields]:
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += [part for part in item if isinstance(part, list | dict)]
        elif isinstance(item, dict):
            yield item
            waiting += [item[name] for name in ("content", "output") if isinstance(item.get(name), list)]


def check_no_files(items: object, within: str) -> None:
    """Refuse files that the provider has stored, at any depth: they are the account's, and their size is not known here.

    The tools of an item are not gone into: an argument of a caller's own function may well be named so.

    Raises:
        BadRequestError: there is a ``file_id``.
    """
    waiting = [items]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += [part for part in item if isinstance(part, list | dict)]
        elif isinstance(item, dict):
            if item.get("file_id") is not None:
                raise BadRequestError("A 'file_id' is not served: send the file itself.", param=within)
            tools = item.get("tools") if item.get("type") in _TOOL_ITEMS else None
            waiting += [part for part in item.values() if isinstance(part, list | dict) and part is not tools]


def check_items(items: Iterable[Fields], policy: Policy) -> None:
    """Check the items of a request to the Responses API: an allow-list of types, each with what it is and not only its id.

    Raises:
        BadRequestError: names what is not served.
    """
    for item in items:
        MESSAGE.check(item, "input")
        kind = item.get("type")
        if kind is None:
            if not {"role", "content"} <= item.keys():
                raise _item_refused("item_reference")
        elif not isinstance(kind, str) or kind not in TYPES["responses.input"]:
            raise _item_refused(kind)
        elif kind in ("reasoning", "compaction") and not (
            item.get("encrypted_content") or item.get("content")
        ):
            raise BadRequestError(
                f"An item of type '{kind}' without its 'encrypted_content' is not served: its id would {_STORED}. "
                "Ask for 'include': ['reasoning.encrypted_content'], or leave the item out.",
                param="input",
            )
        elif kind in _TOOL_ITEMS:
            check_tools(item.get("tools"), "responses.tools", within="input")
        check_parts(item.get("content"), "input", policy)
        check_parts(item.get("output"), "input", policy)


def _item_refused(kind: object) -> BadRequestError:
    if kind != "item_reference":
        return BadRequestError(
            f"An item of type {_shown(kind)} is not served: it is not known here what it costs, or it would {_STORED}.",
            param="input",
        )
    return BadRequestError(
        "An 'item_reference' is not served: send the item itself. An SDK that sends references does so where it is told 'store': false.",
        param="input",
    )


def check_tools(tools: object, kinds: str, *, within: str = "tools") -> None:
    """Check tools: those that the caller runs are served.

    Args:
        tools: of the request.
        kinds: ``chat.tools`` or ``responses.tools``.
        within: where they stand.

    Raises:
        BadRequestError: a tool is none, or is the provider's own.
    """
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRequestError(f"'{within}' must be an array of objects.", param=within)
    for tool in tools:
        TOOL.check(tool, within)
        kind = tool.get("type", "function" if "function" in tool else None)
        if not isinstance(kind, str) or kind not in TYPES[kinds] or not _is_callers(tool, kind):
            off = " Switch the client's own web search off." if str(kind).startswith(_SEARCHES) else ""
            raise BadRequestError(
                f"A tool of type {_shown(kind)} is not served: the provider runs it, and bills it apart from tokens. "
                f"Tools that the caller runs are served: 'function' and 'custom'.{off}",
                param=within,
            )
        if kind == "namespace":
            check_tools(tool.get("tools"), "chat.tools", within=f"{within}.tools")


def _is_callers(tool: Fields, kind: object) -> bool:
    if kind == "shell":
        environment = tool.get("environment")
        return isinstance(environment, dict) and environment.get("type") == "local"
    return kind != "tool_search" or tool.get("execution") == "client"


def find_extras(fields: Fields) -> Mapping[str, int]:
    """Return what is billed apart from tokens: how many of each unit at most; a unit that changes a price counts once.

    Raises:
        BadRequestError: a member that is priced cannot be read, or its count has no bound.
    """
    units: dict[str, int] = {}
    tier = fields.get("service_tier")
    if tier not in _USUAL_TIERS:
        if not isinstance(tier, str):
            raise BadRequestError("'service_tier' must be a text.", param="service_tier")
        units[tier_unit(tier)] = 1
    _find_modalities(fields, units)
    options = fields.get("web_search_options")
    if options is not None and options is not False:
        units[WEB_SEARCH] = 1
    routing = fields.get("provider")
    if isinstance(routing, dict) and (routing.get("order") or routing.get("only")):
        units[ROUTING] = 1  # the price book has the price of the endpoint that serves where none is named
    plugins = fields.get("plugins")
    if plugins is not None:
        _find_plugins(plugins, units)
    names = [fields.get("model"), *(fields.get("models") or ())]
    if any(isinstance(name, str) and name.endswith(":online") for name in names):
        units[WEB_SEARCH] = 1
        units[WEB_SEARCH_RESULT] = max(units.get(WEB_SEARCH_RESULT, 0), _WEB_RESULTS)
    return units


def _find_modalities(fields: Fields, units: dict[str, int]) -> None:
    modalities = fields.get("modalities") or []
    known = {"text": None, "audio": AUDIO_OUTPUT, "image": IMAGE_OUTPUT}
    if not isinstance(modalities, list) or not all(
        isinstance(name, str) and name in known for name in modalities
    ):
        raise BadRequestError(
            "'modalities' must be an array of 'text', 'audio' and 'image'.", param="modalities"
        )
    for unit in (known[name] for name in modalities):
        if unit is not None:
            units[unit] = 1
    if fields.get("audio") is not None:
        units[AUDIO_OUTPUT] = 1
    if fields.get("image_config") is not None or fields.get("image") is not None:
        units[IMAGE_OUTPUT] = 1


def _find_plugins(plugins: Any, units: dict[str, int]) -> None:
    if not isinstance(plugins, list) or not all(isinstance(plugin, dict) for plugin in plugins):
        raise BadRequestError("'plugins' must be an array of objects.", param="plugins")
    for plugin in plugins:
        name = plugin.get("id")
        reason = PLUGINS.refused.get(name) if isinstance(name, str) else None
        if plugin.get("enabled") is False or name in PLUGINS.free:
            continue
        if name == "web":
            units[WEB_SEARCH] = 1
            units[WEB_SEARCH_RESULT] = units.get(WEB_SEARCH_RESULT, 0) + _web_results(plugin)
        elif name == "file-parser":
            _check_file_parser(plugin)
        else:
            why = reason or "it is not known here what it costs"
            raise BadRequestError(f"The plugin {_shown(name)} is not served: {why}.", param="plugins")


def _web_results(plugin: Fields) -> int:
    if plugin.get("max_uses") not in (None, 1):
        raise BadRequestError("The plugin 'web' is served with 'max_uses' 1.", param="plugins")
    number = plugin.get("max_results")
    if number is None:
        return _WEB_RESULTS
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= _WEB_RESULTS_MAX:
        raise BadRequestError(
            f"'max_results' of the plugin 'web' must be a whole number from 1 to {_WEB_RESULTS_MAX}.",
            param="plugins",
        )
    return number


def _check_file_parser(plugin: Fields) -> None:
    pdf = plugin.get("pdf")
    if not isinstance(pdf, dict) or pdf.get("engine") not in _PDF_ENGINES:
        raise BadRequestError(
            "The plugin 'file-parser' is served where its 'pdf.engine' bills nothing beside tokens: "
            f"{', '.join(_PDF_ENGINES)}. How many pages another one would bill is not known before.",
            param="plugins",
        )


def _shown(name: object) -> str:
    return repr(name)[:80]
