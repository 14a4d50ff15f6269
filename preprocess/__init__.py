"""From videos to a bank of features: the commands, and all code that reads videos."""

from shards.siblings import refuse_other_projects

# before any import of ours: a working directory with a `model/` of its own would be taken for it
refuse_other_projects("model")
