"""Training, evaluation and questions on banked features."""

from shards.siblings import refuse_strangers

refuse_strangers("model", "preprocess")
