"""Addresses of remote files: the protocols there are, and what lies beside a shard.

The list of protocols is closed. fsspec knows dozens, some of which chain others or run commands; a list of shards
names none of them.
"""

from __future__ import annotations

import re
import urllib.parse

HTTP = ("http", "https")
OBJECTS = ("s3", "gs", "hf")  # stores that are read through the library of each
SHOWN = "http(s)://, s3://, gs:// and hf://"


def protocol(location: str) -> str:
    """The protocol of a remote file; empty for a local path."""
    name, found, _ = location.partition("://")
    return name if found and name in (*HTTP, *OBJECTS) else ""


def is_url(location: str) -> bool:
    """Tell whether a resolved shard is fetched."""
    return bool(protocol(location))


def url_name(url: str) -> str:
    """The file name at the end of a URL's path."""
    if protocol(url) in HTTP:
        return urllib.parse.unquote(urllib.parse.urlsplit(url).path).rsplit("/", 1)[-1]
    return url.rpartition("/")[2]


def sibling(url: str, name: str) -> str:
    """Make the address of a file in the same folder; a query (an access token) is kept."""
    if protocol(url) in HTTP:
        parts = urllib.parse.urlsplit(url)
        return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()
    return f"{url.rpartition('/')[0]}/{name}"


def is_usable(url: str) -> bool:
    """Tell whether a URL names a host and a port that is a number, or a bucket and an object."""
    if protocol(url) in HTTP:
        try:
            parts = urllib.parse.urlsplit(url)
            return bool(parts.hostname) and parts.port != 0 and re.fullmatch(r"[!-~]+", url) is not None
        except ValueError:  # brackets that do not match, or a port that is no number
            return False
    return re.fullmatch(r"[a-z0-9]+://[A-Za-z0-9._-]+/[^\0-\x1f\x7f]*[^/\0-\x1f\x7f]", url) is not None
