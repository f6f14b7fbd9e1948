"""What a search leaves behind: the artifact, its formats, records, reports and what loggers are told."""
