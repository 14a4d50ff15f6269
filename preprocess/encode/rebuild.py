"""`preprocess index --rebuild`: catalogue and manifest anew, from tars, commit records and plan."""

from pathlib import Path

from preprocess.encode.repair import tower_facts
from shards.care.inventory import read_books
from shards.care.verify import refuse_damaged_shards
from shards.errors import UserError
from shards.format.commits import read_commits
from shards.format.plan import read_plan
from shards.write.finish import finish
from shards.write.lock import BankLock


def rebuild(bank: Path) -> int:
    """Write `index.zarr` and `bank.json` as the encoder wrote them; return the clips they serve.

    Raises UserError that names each shard whose sha256 is not that of its commit record.
    """
    if not (bank / "plan.json").exists():
        raise UserError(f"{bank}: no bank to index (plan.json is missing); copy it again")
    with BankLock(bank, "preprocess index"):
        plan = read_plan(bank)
        assert plan
        commits = read_commits(bank, plan)
        if len(commits) < len(plan.units):
            raise UserError(
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
