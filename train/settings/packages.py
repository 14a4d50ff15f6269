"""Packages and keys that a run's settings need: found before anything heavy is imported or loaded."""

import configparser
import importlib.util
import netrc
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from train.settings.parse import Origin

NEEDS = (
    ("wandb", True, ("wandb",), "pip install wandb, or set wandb: false"),
    ("tune_llm", "lora", ("peft",), "pip install peft, or set tune_llm: full or frozen"),
    (
        "attn",
        "flash_attention_2",
        ("flash_attn", "kernels"),  # transformers takes it from the Hub by the latter
        "pip install flash-attn --no-build-isolation, or set attn: auto",
    ),
)
"""(setting, value, packages of which one is needed, the fix without them)."""
WANDB_HOST = "https://api.wandb.ai"
WITHOUT_KEY = ("offline", "dryrun", "disabled")
"""W&B's modes in which nothing is sent."""


def missing_packages(
    asked: Mapping[str, object], origins: Mapping[str, Origin], environ: Mapping[str, str]
) -> list[str]:
    """Return a line for each package or key that settings ask for and that is not here.

    asked: setting -> value.
    """
    problems = []
    # curves are written by every run, whatever its settings
    if not installed("tensorboard"):
        problems.append(
            "tensorboard: not installed, a run writes curves by it; pip install tensorboard"
        )
    for name, value, packages, fix in NEEDS:
        if asked[name] == value and not any(map(installed, packages)):
            given = "" if value is True else f" {value}"
            package = packages[0].replace("_", "-")
            problems.append(
                f"{origins.get(name, name)} {name}{given}: {package} is not installed; {fix}"
            )
    first = environ.get("RANK", "0") == "0"  # which alone writes to W&B
    if asked["wandb"] and first and installed("wandb") and not has_wandb_key(environ):
        problems.append(
            f"{origins.get('wandb', 'wandb')} wandb: no key to log in with, and nobody to ask; run "
            "`wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline to send the run later"
        )
    return problems


def installed(package: str) -> bool:
    """Return whether a package can be imported; a mere folder of its name (W&B's logs) is none."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # put aside in sys.modules without a spec
        return False
    return spec is not None and spec.origin is not None


def has_wandb_key(environ: Mapping[str, str]) -> bool:
    """Return whether W&B can log in without a prompt, or is set to send nothing.

    As `wandb.init` looks: environment, netrc, then the settings that `wandb login` and `wandb
    offline` write.
    """
    settings = _wandb_settings(environ)
    if environ.get("WANDB_MODE", settings.get("mode", "")).lower() in WITHOUT_KEY:
        return True
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = environ.get("WANDB_BASE_URL", settings.get("base_url", WANDB_HOST))
    return bool(settings.get("api_key")) or _in_netrc(urlsplit(url).hostname or "", environ)


def _wandb_settings(environ: Mapping[str, str]) -> dict[str, str]:
    home = Path(environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    here = Path(environ.get("WANDB_DIR", "."))
    found: dict[str, str] = {}
    for path in (home / "settings", here / ".wandb" / "settings", here / "wandb" / "settings"):
        # a key may hold percent signs
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path)
            found |= dict(parser.items("default"))
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
    return found


def _in_netrc(host: str, environ: Mapping[str, str]) -> bool:
    given = environ.get("NETRC")
    paths = [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for path in paths:
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
