"""Reading of JSON and YAML files: limits, and the known fields of the files of checkpoints."""
