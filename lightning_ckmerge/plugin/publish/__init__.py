"""The output of a search: the artifact, its formats, records, reports and logs."""
