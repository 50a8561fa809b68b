"""From what a user writes in ``data.train`` to a list of shards.

Only local paths, http(s) URLs and the object stores of ``remote.address`` are read. WebDataset also takes ``pipe:``
URLs, which run a shell command, and other schemes through commands; none of that exists here.
"""

from __future__ import annotations

import glob
import os
import re

from data2vec.core.data.shards.braces import expand
from data2vec.core.data.shards.remote.address import HTTP, SHOWN, is_url, is_usable, protocol
from data2vec.core.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SHOWN = 5  # names listed in an error
_LONGEST = 300  # characters of a specification in an error


def _shown(text: str) -> str:
    """A specification as errors show it."""
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")


def resolve(spec: str) -> list[str]:
    """The shards that a path, folder, glob, brace list or URL names, or several of those joined by ``::``.

    A folder stands for every ``*.tar`` in it. Local shards are checked to exist; URLs are not.

    Raises:
        DataError: nothing is found, a listed shard does not exist or is named twice, or another scheme.
    """
    shards: list[str] = []
    for part in re.split(r"::(?![^\[]*\])", spec):  # not inside the brackets of an IPv6 address
        part = part.strip()
        if not part:
            raise DataError(f"{_shown(spec)} names no shards: give a folder, a path, a glob, a brace list or a URL")
        shards += _resolve_part(part)
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise DataError(f"{_shown(spec)} names {shard} twice; a shard is read once per epoch")
        seen.add(shard)
    return shards


def _resolve_part(part: str) -> list[str]:
    if "\0" in part:
        raise DataError(f"{_shown(part)} is not read: no file's name has such a character")
    if is_url(part):
        return [_checked(url) for url in _expand(part)]
    if part.startswith("pipe:") or (_SCHEME.match(part) and not os.path.exists(part)):
        raise DataError(
            f"{_shown(part)} is not read: shards come from local paths, {SHOWN}; nothing else is opened or executed"
        )
    path = os.path.expanduser(part)
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise DataError(f"{part}: the folder has no *.tar shards; {_nearest(path)}")
        return found
    if os.path.exists(path):
        return [path]
    found = []
    missing = []
    for name in _expand(path):
        if glob.has_magic(name):
            matches = sorted(match for match in _matches(name) if os.path.isfile(match))
        else:
            matches = [name] if os.path.isfile(name) else []
        found += matches
        missing += [] if matches else [name]
    if missing and not found:
        raise DataError(f"no shard matches {_shown(part)}; {_nearest(missing[0])}")
    if missing:
        names = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        raise DataError(f"{len(missing)} of {len(missing) + len(found)} shards of {_shown(part)} do not exist: {names}")
    return found


def _matches(pattern: str) -> list[str]:
    try:
        return glob.glob(pattern)
    except (ValueError, OSError, RecursionError, re.error):  # letters that no name has, or thousands of folders
        raise DataError(f"{_shown(pattern)} is no pattern of file names; check data.train") from None


def _checked(url: str) -> str:
    """A URL that can be one."""
    if not is_usable(url) and protocol(url) in HTTP:
        raise DataError(
            f"{_shown(url)} is no URL such as https://host/folder/train-000000.tar; write what is no letter, digit or "
            "sign of ASCII as %20"
        )
    if not is_usable(url):
        raise DataError(f"{_shown(url)} is no address such as {protocol(url)}://bucket/folder/train-000000.tar")
    return url


def _expand(pattern: str) -> list[str]:
    try:
        return expand(pattern) if "{" in pattern else [pattern]
    except ValueError as error:
        raise DataError(f"{_shown(pattern)} is no brace list such as train-{{0000..0999}}.tar: {error}") from None


def _nearest(path: str) -> str:
    """Describe what lies where the user looked: the content of the nearest folder that exists."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    try:
        names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(folder))
    except OSError as error:
        return f"the folder {folder} cannot be read ({error.strerror})"
    if not names:
        return f"the folder {folder} is empty"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the folder {folder} has {', '.join(names[:_SHOWN])}{more}"
