"""From videos to a bank of features: the commands, and everything that may touch a video."""

from shards.siblings import refuse_strangers

refuse_strangers("model")
