"""`preprocess index --rebuild`: catalogue and manifest anew, from tars, commit records and plan."""

from pathlib import Path

from preprocess.encode import finish, read_commits
from preprocess.lock import BankLock
from preprocess.plan import read_plan
from preprocess.repair import tower_facts
from shards.books import read_books
from shards.catalogue import refuse_damaged_shards


def rebuild(bank: Path) -> int:
    """Write `index.zarr` and `bank.json` as the encoder wrote them; return the clips they serve.

    Raises ValueError that names each shard whose sha256 is not that of its commit record.
    """
    if not (bank / "plan.json").exists():
        raise ValueError(f"{bank}: no bank to index (plan.json is missing); copy it again")
    with BankLock(bank, "preprocess index"):
        plan = read_plan(bank)
        assert plan
        commits = read_commits(bank, plan)
        if len(commits) < len(plan.units):
            raise ValueError(
                f"{bank}: {len(plan.units) - len(commits)} of {len(plan.units)} shards are not "
                "finished; `preprocess encode` writes the catalogue when they are"
            )
        refuse_damaged_shards(bank / "shards", commits)
        finish(bank, plan, tower_facts(read_books(bank), plan))
        served = plan.served()
        return sum(
            served.get(sample["key"]) == commit["unit"]
            for commit in commits
            for sample in commit["samples"]
        )
