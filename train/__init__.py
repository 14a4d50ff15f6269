"""Training, evaluation and questions on banked features."""

from shards.siblings import refuse_other_projects

refuse_other_projects("model", "preprocess")
