"""From videos to a bank of features: the commands, and all code that reads videos."""

from shards.siblings import refuse_other_projects

refuse_other_projects("model")
