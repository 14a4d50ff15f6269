"""What the published files of single benchmarks hold, as plain items: read here, written as records by
`train.data.importers`."""
