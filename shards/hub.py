"""Whether the Hub gives a repository: asked once, for a few seconds, before anything is downloaded.

The Hub's own clients try again for minutes where a machine has no network; a name that is a mistyped
path would wait so long.
"""

import os
import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TIMEOUT = 5.0
"""Seconds that the Hub has to answer."""
PROBES = {"model": "config.json", "dataset": ".gitattributes"}
"""A file of each kind of repository that is asked for; a gated one does not give it."""


def refusal(repo: str, kind: str = "model") -> str | None:
    """Return why the Hub does not give a repository, None where it does or has been given before.

    Where the Hub cannot be reached, what was downloaded before serves: this process and those that it
    starts are then offline, and ask no more.
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
    cached = is_cached(repo, kind)
    if constants.HF_HUB_OFFLINE:
        where = f"not among the downloads in {constants.HF_HUB_CACHE}"
        return None if cached else f"offline mode is set (HF_HUB_OFFLINE), and it is {where}"
    try:
        url = f"{place}/resolve/main/{probe}"
        get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=constants.ENDPOINT)
    except GatedRepoError:
        asked = f"the Hub's {repo} is gated: ask for access at {place}, then `hf auth login`"
        return None if cached else f"{asked} or set HF_TOKEN"
    except RepositoryNotFoundError:
        has = f"the Hub has no {kind} of that name, or a private one (`hf auth login`, HF_TOKEN)"
        return None if cached else has
    except EntryNotFoundError:
        return None if kind == "dataset" or cached else f"the Hub's {repo} has no {probe}"
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no status"
        return None if cached else f"the Hub answers with an error ({code})"
    except Exception as error:  # of its HTTP library: no network, no such host, no answer in time
        if not cached:
            return f"the Hub does not answer ({type(error).__name__}: {place})"
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
    return None


def absent(name: str, kind: str = "model") -> str | None:
    """Return why a name is neither a path here nor a repository; None where it is, or is no name."""
    if Path(name).exists() or not NAME.fullmatch(name):
        return None
    why = refusal(name, kind)
    return why and f"no such folder, and as a name of the Hub: {why}"


def is_cached(repo: str, kind: str) -> bool:
    """Tell whether any snapshot of a repository has been downloaded."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def cached_file(repo: str, name: str) -> str | None:
    """Return where a file of a model that was downloaded lies, None of what is no such thing."""
    if not NAME.fullmatch(repo):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name)
    return found if isinstance(found, str) else None
