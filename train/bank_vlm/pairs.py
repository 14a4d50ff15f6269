"""Do a model and its processor read banks of one tower?

Each is told of its bank alone, and the features of another tower have the same shapes: only here the
two meet, by the config that both are given.
"""

import weakref
from typing import Any

from shards.errors import UserError
from shards.read.bank import Bank

_READERS: "weakref.WeakKeyDictionary[Any, tuple[type, weakref.ref[Any], Bank]]" = (
    weakref.WeakKeyDictionary()
)
"""Every processor's source and every model's stand-in for its tower -> its type, the model's config,
its bank."""


def join(reader: Any, config: Any, bank: Bank) -> None:
    """Note which bank a reader reads; UserError where its counterpart reads one of another tower.

    Banks of other videos may differ: one to train on, one to evaluate on.
    """
    # no other reader in a variable: the traceback of the error would keep it, and it be refused for ever
    for kind, of, theirs in list(_READERS.values()):
        is_counterpart = of() is config and kind is not type(reader)
        if is_counterpart and theirs.config.tower_digest != bank.config.tower_digest:
            raise UserError(
                "processor and model read banks of different towers",
                got=f"{bank.config.tower_digest[:12]} here, {theirs.config.tower_digest[:12]} in "
                f"{theirs.where}",
                where=bank.where,
                fix="give bank_processor and use_bank banks of the model's own tower",
            )
    _READERS[reader] = type(reader), weakref.ref(config), bank
