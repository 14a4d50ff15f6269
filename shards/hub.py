"""Check whether a repository of the Hub is available: one request of a few seconds, before any download.

The Hub's own clients retry for minutes on a machine without a network; a mistyped path, which looks like
a repository name, would wait that long.
"""

import os
import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TIMEOUT = 5.0
"""Seconds within which the Hub must answer."""
PROBES = {"model": "config.json", "dataset": ".gitattributes"}
"""By kind of repository, the file that is requested; a gated repository refuses it."""


def refusal(repo: str, kind: str = "model") -> str | None:
    """Return why a repository is not available; None if it is, or was downloaded before.

    If the Hub cannot be reached and the repository was downloaded before, HF_HUB_OFFLINE is set for this
    process and those that it starts, so that they do not try the Hub again.
    """
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    probe = PROBES[kind]
    place = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    # what was downloaded before serves without the Hub: a training node often has no network
    cached = is_cached(repo, kind)
    if constants.HF_HUB_OFFLINE:
        where = f"not among the downloads in {constants.HF_HUB_CACHE}"
        return None if cached else f"offline mode is set (HF_HUB_OFFLINE), and it is {where}"
    try:
        # the metadata of one small file: a gated repository shows its page, and refuses its files
        url = f"{place}/resolve/main/{probe}"
        get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=constants.ENDPOINT)
    except GatedRepoError:
        asked = f"the Hub's {repo} is gated: ask for access at {place}, then `hf auth login`"
        return None if cached else f"{asked} or set HF_TOKEN"
    # the Hub answers alike for both, so that nobody can find out which private names exist
    except RepositoryNotFoundError:
        has = f"the Hub has no {kind} of that name, or a private one (`hf auth login`, HF_TOKEN)"
        return None if cached else has
    except EntryNotFoundError:
        return None if kind == "dataset" or cached else f"the Hub's {repo} has no {probe}"
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no status"
        return None if cached else f"the Hub answers with an error ({code})"
    except Exception as error:  # any type of its HTTP library: no network, unknown host, timeout
        if not cached:
            return f"the Hub does not answer ({type(error).__name__}: {place})"
        constants.HF_HUB_OFFLINE = True  # here, where the variable was read at import
        os.environ["HF_HUB_OFFLINE"] = "1"  # in processes that are started from here
    return None


def absent(name: str, kind: str = "model") -> str | None:
    """Return why a name is neither a local path nor a repository; None if it is one, or is not a name."""
    # a path that exists is never asked for: a folder may look like owner/name
    if Path(name).exists():
        return None
    if not NAME.fullmatch(name):
        # a bare name may be one of the Hub's own models, which have no owner
        return "no such folder" if "/" in name else None
    why = refusal(name, kind)
    return why and f"no such folder, and as a name of the Hub: {why}"


def is_cached(repo: str, kind: str) -> bool:
    """Return whether any snapshot of a repository has been downloaded."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def cached_file(repo: str, name: str) -> str | None:
    """Return the path of a file of a downloaded model; None if it was not downloaded."""
    if not NAME.fullmatch(repo):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return found if isinstance(found, str) else None
