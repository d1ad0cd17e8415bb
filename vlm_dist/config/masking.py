"""Secrets in paths of data: passwords and signatures in URLs and commands, left out of all that is written or logged.

`masked` is the one function for it. What it leaves stays comparable: a signature that was made anew changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: Stands in the place of a secret.
MASK = "***"

_SIGNING = ("x-amz-", "x-goog-")
_SIGNING_NAMES = frozenset(
    (
        *("signature", "sig", "expires", "awsaccesskeyid", "googleaccessid", "key-pair-id", "policy", "token"),
        *("access_token", "se", "sp", "sv", "sr", "st", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv"),
    )
)
# words that only a secret has in its name; `key` alone is none of them: it also names objects
_WORDS = (
    r"token|secret|passw(?:or)?d|passphrase|pwd|credentials?|signature|bearer|auth|authorization|jwt|sas|"
    r"(?:api|access|account|private|secret|subscription|customer|shared)[-_]?key(?:[-_]?id)?"
)
_SECRET_NAME = re.compile(rf"(?:.*[-_.])?(?:{_WORDS})[-_]?\d*", re.IGNORECASE)

_URL = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?P<rest>[^\s'\"`|<>]+)")
_PARAMETER = re.compile(r"(?P<before>[?&;])(?P<name>[^=&;?#]+)=(?P<value>[^&;#]*)")
# a reference to a variable or to a command's output is no secret, and a mask is none any more
_OPEN = r"(?!\$|['\"]\$[A-Za-z_{(]|\*\*\*)"
_VALUE = rf"{_OPEN}(?:'[^']*'|\"[^\"]*\"|[^\s'\"|;&)]+)+"
_OPTION = re.compile(rf"(?P<kept>(?<!\S)--?(?P<name>[A-Za-z][\w.-]*)(?:\s*=\s*|\s+))(?P<value>{_VALUE})")
_USER = re.compile(
    rf"(?P<kept>(?<!\S)(?:-[uU]|--user|--proxy-user)(?:\s*=\s*|\s*+))"
    rf"(?P<value>{_OPEN}(?:'[^':]*:[^']*'|\"[^\":]*:[^\"]*\"|[^\s:'\"]+:[^\s'\"|;&]+))"
)
_OTHER = re.compile(
    rf"(?P<kept>\bsshpass\s+-p\s*|(?<!\S)(?:--cookie|-b)(?:=|\s+)(?=['\"]?[\w.-]+=))(?P<value>{_VALUE})"
)
_ASSIGNMENT = re.compile(rf"(?P<kept>(?<![\w.-])(?P<name>[A-Za-z_][\w.-]*)=)(?P<value>{_VALUE})")
_HEADER = re.compile(
    r"(?P<kept>(?<!\S)(?:-H|--header)(?:\s*=\s*|\s*+)(?P<quote>['\"])?[\w-]+:\s*+)"
    r"(?!(?:[A-Za-z]+ )?\$\{?\w+\}?['\"])(?P<value>(?(quote)(?:(?!(?P=quote)).)*|\S+))"
)
_CREDENTIALS = re.compile(
    r"(?P<kept>\b(?:proxy-)?authorization:\s*+)(?!\*\*\*|(?:\w+ )?\$)(?P<value>[^'\"\n]+)", re.IGNORECASE
)
_BARE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{10,}|"
    r"AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)


def is_secret_name(name: str) -> bool:
    """Whether a parameter of a URL, a variable or an option of this name holds a secret, or what belongs to one."""
    lowered = name.lower()
    return lowered.startswith(_SIGNING) or lowered in _SIGNING_NAMES or _SECRET_NAME.fullmatch(lowered) is not None


def masked(text: str) -> str:
    """Return a path, a URL or a command (`pipe:…`) without the secrets in it; other text stays as it is.

    In URLs user and password go, and the values of parameters that sign; in commands also the values of options,
    variables and headers. To mask what is masked changes nothing.
    """
    text = _URL.sub(_masked_url, text)
    if "pipe:" not in text:
        return text
    text = _HEADER.sub(lambda found: f"{found['kept']}{MASK}", text)
    text = _CREDENTIALS.sub(lambda found: f"{found['kept']}{MASK}", text)
    text = _USER.sub(_masked_value, text)
    text = _OTHER.sub(_masked_value, text)
    text = _OPTION.sub(_masked_if_secret, text)
    text = _ASSIGNMENT.sub(_masked_if_secret, text)
    return _BARE.sub(MASK, text)


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration with its data sources' paths masked."""
    data = values.get("data")
    if not isinstance(data, Mapping):
        return dict(values)
    sources = {
        which: [_masked_source(source) for source in data[which]]
        for which in ("train", "eval")
        if isinstance(data.get(which), list)
    }
    return {**values, "data": {**data, **sources}}


def _masked_source(source: Any) -> Any:
    if not isinstance(source, Mapping):
        return source
    return {
        key: _masked_all(value) if key in ("path", "data_files", "name") else value for key, value in source.items()
    }


def _masked_all(value: Any) -> Any:
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, Mapping):
        return {key: _masked_all(child) for key, child in value.items()}
    return [_masked_all(child) for child in value] if isinstance(value, list) else value


def _masked_url(found: re.Match[str]) -> str:
    host, slash, path = found["rest"].partition("/")
    user, at, host = host.rpartition("@")
    plain = f"{found['scheme']}{MASK + at if user else ''}{host}{slash}{path}"

    def mask_parameter(parameter: re.Match[str]) -> str:
        is_secret = is_secret_name(parameter["name"]) or parameter["name"].lower().endswith("key")
        if not is_secret or parameter["value"].startswith("$"):
            return parameter[0]
        return f"{parameter['before']}{parameter['name']}={MASK}"

    before, mark, query = plain.partition("?")
    return before + _PARAMETER.sub(mask_parameter, mark + query)


def _masked_if_secret(found: re.Match[str]) -> str:
    return _masked_value(found) if is_secret_name(found["name"].lstrip("-")) else found[0]


def _masked_value(found: re.Match[str]) -> str:
    value = found["value"]
    quote = value[0] if value[0] in "'\"" and value.endswith(value[0]) else ""
    return f"{found['kept']}{quote}{MASK}{quote}"
